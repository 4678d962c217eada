"""How fast this cluster's towers and augmenters are."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from datasets.layout import Dataset
from datasets.plan import Itinerary
from datasets.statistics import Statistics, sums_of_groups
from pipeline.mesh import Mesh
from workers import room
from workers.actors import Actors, end
from workers.cluster import connected
from workers.config import Config
from workers.feed import Feed
from workers.fleet import Fleet
from workers.parts import READ_AHEAD
from workers.placement import Placement
from workers.progress import Progress
from workers.towers import Job

SECONDS = 6.0  # that each measurement lasts, once warm
WARM = 4  # steps before that, twice
STEPS = 4096  # batches that there are to measure with, at most


@dataclass(frozen=True)
class Rates:
    """Images a second of all `towers` together while they don't wait for data, and of one
    `augmenter`.
    """

    towers: float
    augmenter: float

    @property
    def need(self) -> float:
        """Augmenters, or parts of one, that keep the towers from waiting."""
        return self.towers / self.augmenter

    def reached(self, augmenters: int) -> float:
        """Images a second with so many augmenters."""
        return min(self.towers, augmenters * self.augmenter)


def measure(
    dataset: Dataset, config: Config, progress: Progress | None = None
) -> tuple[Rates, Mesh]:
    """Measures an augmenter alone, and then towers at work beside the fleet, placed as a run's, so
    that they share what they will share; and says on which mesh that was. Images are decoded each
    time, as in a run's first epoch.

    Raises UserError and DataError as a run does.
    """
    progress = progress or Progress()
    with connected():
        where = room.place(config, progress.say)
        config = replace(config, towers=where.mesh.towers, cache=0.0)
        some = sums_of_groups(dataset, "train", config.image, range(1), on_error=config.on_error)
        arguments = dataset, config, where, some.finish()
        progress.say("measuring an augmenter")
        room.await_room("an augmenter", where.augmenter)
        augmenter = _augmenter(*arguments)
        progress.say(f"measuring {where.mesh.size} tower actor(s) on {where.device}")
        return Rates(_towers(*arguments), augmenter), where.mesh


def _itinerary(dataset: Dataset, config: Config) -> Itinerary:
    groups = dataset.groups("train")
    return Itinerary(groups, None, batch=config.batch, seed=0, epochs=STEPS, steps=STEPS)


def _augmenter(dataset: Dataset, config: Config, where: Placement, statistics: Statistics) -> float:
    """Images a second of a fleet of one, which nobody keeps waiting."""
    config = replace(config, augmenters="1:1", replicas=1, stages=1, cuts="", microbatches=1)
    alone = replace(where, mesh=Mesh(1, 1, 1))
    fleet = Fleet(dataset, _itinerary(dataset, config), config, alone, statistics)
    feed: Any = ray.remote(Feed).options(num_cpus=0, max_concurrency=8).remote(fleet)
    try:
        ray.get(feed.open.remote(0))
        start, images = 0.0, 0
        for index in range(STEPS):
            ray.get(ray.get(feed.take.remote(index, 0, True)))
            now = time.perf_counter()
            if index == 2 * READ_AHEAD:  # what was made before anybody asked is gone
                start = now
            elif start:
                images += len(fleet.itinerary.rows(index))
                if now - start > SECONDS:
                    break
        return images / (now - start)
    finally:
        end(feed)


def _towers(dataset: Dataset, config: Config, where: Placement, statistics: Statistics) -> float:
    """Images a second of all towers while they don't wait for data, which the fleet makes."""
    itinerary, classes = _itinerary(dataset, config), len(dataset.classes)
    mean = statistics.centre(config.build(classes).crop)
    job = Job(config, where, itinerary, classes, mean, "")
    fleet = Fleet(dataset, itinerary, config, where, statistics)
    group = room.reserve(where)
    try:
        with Actors(job, fleet, group) as actors:
            ray.get(actors.feed.open.remote(0))
            address = ray.get(actors.towers[0].address.remote())
            ray.get([tower.join.remote(address, None) for tower in actors.towers])

            def measured(start: int, steps: int) -> tuple[float, float]:
                calls = [t.measure.remote(actors.feed, start, steps) for t in actors.towers]
                return ray.get(calls)[0]

            measured(0, WARM)
            each = measured(WARM, WARM)[0] / WARM
            steps = min(STEPS // 2, max(WARM, math.ceil(SECONDS / each)))
            seconds, waited = measured(2 * WARM, steps)
            return steps * config.batch / (seconds - waited)
    finally:
        ray.util.remove_placement_group(group)
