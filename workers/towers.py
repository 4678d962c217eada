"""The tower actors, as whoever creates them sees them: without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.plan import Itinerary
from workers.config import Config
from workers.placement import Placement


@dataclass(frozen=True)
class Job:
    """What every rank of a run needs to know.

    `mean` float32 [crop, crop, 3]; `folder` is the run's path or URL, "" where nothing is kept.
    """

    config: Config
    placement: Placement
    itinerary: Itinerary
    classes: int
    mean: np.ndarray[Any, Any]
    folder: str


class TowerActor:
    """A `workers.rank.Rank`, which imports torch, as a Ray actor."""

    def __init__(self, job: Job, rank: int) -> None:
        from workers.rank import Rank

        self.rank = Rank(job, rank)

    def address(self) -> tuple[str, int]:
        return self.rank.address()

    def join(self, address: tuple[str, int], resume: str | None) -> dict[str, Any]:
        return self.rank.join(address, resume)

    def train(self, feed: Any, start: int) -> Iterator[dict[str, Any]]:
        yield from self.rank.train(feed, start)

    def measure(self, feed: Any, start: int, steps: int) -> tuple[float, float]:
        return self.rank.measure(feed, start, steps)

    def weights_sha256(self, path: str) -> str:
        return self.rank.weights_sha256(path)
