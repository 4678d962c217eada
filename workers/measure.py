"""Statistics of a data set, measured by tasks on the cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator

import ray

from datasets import DataError
from datasets.layout import Dataset
from datasets.statistics import Statistics, Sums, sums_of_groups
from workers.progress import Progress
from workers.room import await_room

GROUPS_ROWS = 2048  # rows that a task goes through


def measure(
    dataset: Dataset,
    size: int,
    on_error: str,
    resources: dict[str, float],
    progress: Progress | None = None,
) -> Statistics:
    """Mean image and colours of the training split at `size` pixels, by tasks on the cluster.

    Raises DataError at a bad row unless `on_error` is skip, UserError if the cluster has no room.
    """
    await_room("what measures mean and colours", resources)
    groups = dataset.groups("train")
    extra = dict(resources)
    task = ray.remote(_sums).options(num_cpus=extra.pop("CPU"), resources=extra or None)
    shared = ray.put(dataset)
    waiting = [task.remote(shared, size, part, on_error) for part in _parts(groups)]
    total, start = Sums(size), time.monotonic()
    while waiting:
        done, waiting = ray.wait(waiting)
        found, error = ray.get(done[0])
        if error:
            for ref in waiting:
                ray.cancel(ref)
            raise error
        total.merge(found)
        if progress:
            progress.done("measured", total.images, sum(groups), start)
    return total.finish()


def _sums(
    dataset: Dataset, size: int, groups: range, on_error: str
) -> tuple[Sums, DataError | None]:
    try:
        return sums_of_groups(dataset, "train", size, groups, on_error=on_error), None
    except DataError as error:
        return Sums(size), error


def _parts(groups: tuple[int, ...]) -> Iterator[range]:
    """Ranges of row groups that hold about `GROUPS_ROWS` rows each."""
    first, rows = 0, 0
    for number, size in enumerate(groups):
        rows += size
        if rows >= GROUPS_ROWS or number == len(groups) - 1:
            yield range(first, number + 1)
            first, rows = number + 1, 0
