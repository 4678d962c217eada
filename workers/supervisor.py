"""A run from its configuration to its result: what it is of, and where it is to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets.layout import Dataset
from datasets.plan import Itinerary
from datasets.shards import open_dataset
from datasets.statistics import Statistics
from workers import room
from workers.attempts import Attempts, last_start
from workers.cluster import connected
from workers.config import Config
from workers.data import check_classes, classes_of, drawn, keep, known_statistics, measured
from workers.fleet import Fleet
from workers.guard import in_order
from workers.placement import Placement
from workers.pool import Pool
from workers.progress import Progress
from workers.run import RunFolder
from workers.towers import Job

if TYPE_CHECKING:
    from workers.initial import Initial


def train(
    config: Config,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    deaths: int = 0,
    since: float = 0.0,
    sized: bool = False,
    progressed: Callable[[int], object] | None = None,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """Trains as configured and returns the result: the keys of `towers train --json`.

    Starts Ray on this machine unless a cluster is at hand. With a `pool`, whose augmenters it
    takes, it is one of several runs side by side. `deaths` is how many processes before
    this one died at the same run, `since` when the first began; `progressed` is called with the
    step of each checkpoint. A run that goes on has the fleet that `towers scale` asked for last,
    with `sized` the one of its configuration. Raises UserError or `DataError` for what the user can
    mend, RunFailed for a run that could not go on, `ClusterLost` if that is because this process
    has no Ray any more.
    """
    progress = progress or Progress()
    if config.shards:
        dataset = open_dataset(config.shards)  # before anything is made or started
        dataset.shards("train")
        check_classes(dataset)
    folder = RunFolder(config, resume=None if deaths else resume)
    initial = _initial(config) if config.init and not folder.checkpoints() else None
    with connected(), folder.held(progress.say):
        before = last_start(folder) if deaths else {}
        if before.get("time", 0.0) < since:  # as another command had it
            before = {}
        where = _placed(config, before, progress, pool)
        asked = "" if folder.new else folder.wanted_augmenters()
        superseded = asked if sized and not before else ""
        if asked and not superseded:  # of a fleet, any size: as many run as find room
            config = folder.config = replace(config, augmenters=asked)
        if not config.shards:
            dataset = drawn(folder.url, progress)
        if config.images:
            dataset = dataset.first("train", config.images)
        statistics = known_statistics(config.image, dataset.root, folder.url)
        statistics = statistics or measured(dataset, config, where.augmenter, progress)
        config = replace(config, towers=where.mesh.towers)
        job = _job(config, where, dataset, statistics, folder)
        fleet = Fleet(dataset, job.itinerary, config, where, statistics, pool)
        if advice := config.advice(len(dataset.classes)):
            progress.say(advice)
        if not dataset.held_out:
            fixed = (
                ", and schedule 'plateau' keeps its rate" if config.schedule == "plateau" else ""
            )
            progress.say(f"no val or test split: nothing is evaluated{fixed}")

        def begin() -> None:
            folder.forget_scale(superseded)
            classes = classes_of(dataset)
            keep(folder.url, classes, statistics)
            if initial:
                new = initial.begin(folder, config, classes)
                for line in filter(None, (new, initial.otherwise(config))):
                    progress.say(line)

        run = Attempts(job, fleet, folder, progress, begin, deaths, since, progressed)
        with in_order(partial(setattr, run, "stopping")):
            return run.result()


def _placed(
    config: Config, before: dict[str, Any], progress: Progress, pool: Pool | None
) -> Placement:
    """Where the run is to be: on as many towers, threads and the same devices as `before`, if it
    started already, as the weights are to have the bits that they would have had.
    """
    if before:
        towers = int(before["mesh"].rpartition("x")[2])
        config = replace(config, device=before.get("device", config.device), towers=towers)
    where = room.place(config, progress.say, pool.runs if pool else 0)
    return replace(where, threads=before.get("threads") or where.threads)


def _initial(config: Config) -> Initial:
    from workers.initial import read_initial  # torch, which all else here does without

    return read_initial(config)


def _job(
    config: Config,
    where: Placement,
    dataset: Dataset,
    statistics: Statistics,
    folder: RunFolder,
) -> Job:
    held_out = dataset.held_out
    itinerary = Itinerary(
        dataset.groups("train"),
        (held_out, dataset.groups(held_out)) if held_out else None,
        batch=config.batch,
        seed=config.seed,
        epochs=config.epochs,
        steps=config.steps,
    )
    crop = config.build(len(dataset.classes)).crop
    mean = statistics.centre(crop)
    return Job(config, where, itinerary, len(dataset.classes), mean, folder.url)
