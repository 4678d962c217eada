"""Every row of a split once, by as many workers as the cluster has, each with the whole networks.

What is worked on together is cut by the data alone, so that the result does not depend on how many
workers there were.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from datasets.augmentation import Augmentation, Loader
from datasets.layout import Dataset
from pipeline import host
from pipeline.evaluation import Classifier
from workers.config import UserError
from workers.devices import gpu
from workers.errors import RunFailed
from workers.placement import gpus_of
from workers.progress import Progress
from workers.room import cluster_nodes
from workers.spread import only_here, spread
from workers.trained import Trained

BATCH = 64  # images that are computed together
ITEM = 256  # rows that a worker takes at once, at least: whole row groups
SHOWN = 20  # faults that are printed

Views = Literal[1, 10]
OnError = Literal["fail", "skip"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Work:
    """What every worker knows. `shares`: the networks' weights in their average, if not equal;
    `device`: what is asked for, and in `sweep` what there is.
    """

    dataset: Dataset
    split: str
    views: Views
    on_error: OnError
    networks: tuple[Trained, ...]
    shares: tuple[float, ...] | None
    device: Device = "auto"

    @property
    def here(self) -> bool:
        """Whether all is done in this process, as the data is or a run."""
        return only_here(self.dataset.root, *(network.run for network in self.networks))

    @cached_property
    def classifiers(self) -> list[Classifier]:
        """Its networks where this worker computes. Raises UserError for a GPU that torch cannot
        use.
        """
        device = str(gpu()) if self.device == "cuda" else "cpu"
        return [network.classifier(device) for network in self.networks]

    def loader(self, shape: tuple[int, int], *, labelled: bool = True) -> Loader:
        """Loads its images for networks of this `shape`, sides of images and crops."""
        aug = Augmentation(*shape)
        return Loader(
            self.dataset, self.split, aug, None, seed=0, on_error=self.on_error, labelled=labelled
        )


@dataclass(frozen=True)
class Swept:
    """Rows (int64 [n]) that were worked on, how many beside them were `skipped`, and why."""

    rows: NDArray[np.int64]
    skipped: int
    faults: list[str]


P = TypeVar("P", bound=Swept)


def checked_views(crops: int) -> Views:
    """The number of crops of each image. Raises UserError unless it is 1 or 10."""
    if crops not in (1, 10):
        raise UserError(f"crops is {crops}: 1, the centre, or 10")
    return cast(Views, crops)


def pick_split(dataset: Dataset, split: str) -> str:
    """`split`, or the one that is held out if unset. Raises UserError if none is, and DataError if
    there is no such split.
    """
    if not (split := split or dataset.held_out or ""):
        raise UserError(f"{dataset.root}: no val or test split; --split train takes train")
    dataset.shards(split)
    return split


def sweep(
    function: Callable[[Work, list[NDArray[np.int64]]], Iterator[P]],
    work: Work,
    what: str,
    workers: int | None,
    progress: Progress,
) -> Generator[P, None, None]:
    """What `function(work, batches)` yields for each batch of rows, in the order of the rows; held
    are only those that overtook others. Close it if it is left before its end.

    `what`: what has been done with the rows, for progress. Raises RunFailed unless each was dealt
    with once, UserError if all were skipped or there are no GPUs for `device` cuda.
    """
    gpus = _gpus(work)
    work = replace(work, device="cuda" if gpus else "cpu")
    total = work.dataset.rows(work.split)
    items = row_ranges(work.dataset.groups(work.split))
    came: dict[int, list[P]] = defaultdict(list)
    dealt: Counter[int] = Counter()  # rows of each range, used or skipped
    turn, last = 0, -1  # the range of rows that is next, and the row that was last
    used, skipped, shown, start = 0, 0, 0, time.monotonic()
    for number, part in spread(
        _batches, (function, work), items, workers=workers, here=work.here, gpus=gpus
    ):
        for fault in part.faults[: SHOWN - shown]:
            progress.say(f"skipped: {fault}")
            shown += 1
        used += len(part.rows)
        skipped += part.skipped
        progress.done(what, used + skipped, total, start)
        came[number].append(part)
        dealt[number] += len(part.rows) + part.skipped
        while turn < len(items) and dealt[turn] == len(items[turn]):
            for one in came.pop(turn):
                if (np.diff(one.rows, prepend=last) <= 0).any():
                    raise RunFailed(f"rows were {what} twice")
                last = int(one.rows[-1]) if len(one.rows) else last
                yield one
            turn += 1
    if turn < len(items):
        raise RunFailed(f"{used} rows were {what} and {skipped} skipped, of {total}")
    if not used:
        raise UserError(f"{work.dataset.root}: {work.split} has no row that can be used")


def _gpus(work: Work) -> int:
    """GPUs to use: the cluster's, unless `device` or, if that is auto, a run says otherwise, or all
    is done here.
    """
    cpu = work.device == "auto" and any(each.config.device == "cpu" for each in work.networks)
    if cpu or work.device == "cpu" or work.here:
        return 0
    gpus = gpus_of(cluster_nodes())
    if work.device == "cuda" and not gpus:
        raise UserError("device is cuda: the cluster has no GPU; --device cpu does without")
    return gpus


def row_ranges(groups: Sequence[int]) -> list[range]:
    """Ranges of rows, in whole row groups of `ITEM` rows together or more."""
    least = max(ITEM, sum(groups) // 4096)
    ranges, start, stop = [], 0, 0
    for size in groups:
        stop += size
        if stop - start >= least:
            ranges.append(range(start, stop))
            start = stop
    return [*ranges, range(start, stop)] if stop > start else ranges


def _batches(shared: tuple[Callable[..., Iterator[P]], Work], rows: range) -> Iterator[P]:
    """The parts of a range of rows, a batch at a time."""
    function, work = shared
    if not work.here:
        host.prepare(1)
    numbers = np.arange(rows.start, rows.stop)
    yield from function(work, [numbers[n : n + BATCH] for n in range(0, len(numbers), BATCH)])
