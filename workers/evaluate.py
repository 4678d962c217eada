"""`towers evaluate`: how often networks are right, by as many workers as the cluster has.

Each worker holds the whole networks. What is worked on together is cut by the data alone, and sums
are exact, so that the result does not depend on how many workers there were.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.augmentation import Augmentation, Batch, Loader
from datasets.layout import Dataset
from datasets.shards import open_dataset
from pipeline import host
from pipeline.evaluation import Verdicts, average, judge
from workers.cluster import connected
from workers.config import UserError
from workers.data import classes_of, keep, known_statistics, measured, training_data
from workers.errors import RunFailed
from workers.evaluation_file import Work, write_evaluation
from workers.placement import cluster_nodes
from workers.progress import Progress
from workers.spread import only_here, spread
from workers.trained import Trained, open_trained

BATCH = 64  # images that are computed together
ITEM = 256  # rows that a worker takes at once, at least: whole row groups
SHOWN = 20  # faults that are printed


@dataclass(frozen=True)
class Outcome:
    """What became of some rows (int64 [n]): the verdicts of each network and, of several, those of
    their average; how many rows were `skipped`, and their `faults`.
    """

    rows: NDArray[np.int64]
    verdicts: list[Verdicts]
    skipped: int
    faults: list[str]


def evaluate(
    runs: Sequence[str],
    *,
    data: str = "",
    split: str = "",
    crops: int = 1,
    step: int | None = None,
    weights: Sequence[float] | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates runs, and of several their averaged prediction too, on every row of a split once.

    `data`: shards, those of the first run's training if unset; `split`: val, or test if there is no
    val, if unset; `crops`: 1, the centre, or 10; `step`: of the checkpoints, the last if None;
    `weights`: of the average. Returns the keys of `towers evaluate --json`; the whole evaluation is
    kept in each run. Raises UserError and DataError for what the user can mend, RunFailed if rows
    were lost.
    """
    progress = progress or Progress()
    if crops not in (1, 10):
        raise UserError(f"crops is {crops}: 1, the centre, or 10")
    networks = [open_trained(run, step) for run in runs]
    if weights is not None:
        try:
            average([torch.zeros(1)] * len(runs), weights)
        except ValueError as error:
            raise UserError(str(error)) from None
    config = networks[0].config
    dataset = open_dataset(data or config.shards or f"{runs[0]}/shards")
    split = split or dataset.held_out or ""
    if not split:
        raise UserError(f"{dataset.root}: no val or test split; --split train evaluates on train")
    total = dataset.rows(split)
    for network in networks:
        check_classes_fit(network, dataset)
    here = only_here(dataset.root)
    with nullcontext() if here else connected():
        gpus = 0 if here else _gpus(networks)
        work = Work(
            dataset,
            split,
            crops,  # type: ignore[arg-type]
            on_error,
            tuple(complete(network, dataset, progress) for network in networks),
            tuple(weights) if weights is not None else None,
            "cuda" if gpus else "cpu",
            None if here else 1,
        )
        rows, verdicts, skipped = _gather(work, total, workers, progress, here, gpus)
    return write_evaluation(work, rows, verdicts, skipped, progress)


def complete(network: Trained, dataset: Dataset, progress: Progress) -> Trained:
    """A network that knows its classes and statistics, which are then kept in its run: those of its
    training data or else of `dataset`, measured if nobody has. Raises UserError if there is nothing
    to measure.
    """
    if network.classes and network.statistics:
        return network
    trained_on = training_data(network.run, network.config) or dataset
    classes = network.classes or classes_of(trained_on)
    statistics = network.statistics or known_statistics(network.config.image, trained_on.root)
    if not statistics and "train" not in trained_on.splits:
        raise UserError(
            f"{network.run} does not know the mean of its training images, and {trained_on.root} "
            "has no train split to measure it on; name shards that have one by --data"
        )
    if not statistics:
        one = {"CPU": 1.0}
        statistics = measured(trained_on, network.config, network.run, one, progress)
    keep(network.run, classes, statistics)
    return replace(network, classes=classes, statistics=statistics)


def check_classes_fit(network: Trained, dataset: Dataset) -> None:
    """Raises UserError if a data set's classes are not those that a network tells apart."""
    ours, theirs = network.network.classes, classes_of(dataset)
    fewer = theirs.numbered and len(theirs.names) <= ours  # labels alone, of which some lack
    if len(theirs.names) != ours and not fewer:
        raise UserError(
            f"{network.run} tells {ours} classes apart, {dataset.root} has {len(theirs.names)}"
        )
    if not network.classes or network.classes.numbered or theirs.numbered:
        return
    for number, (a, b) in enumerate(zip(network.classes.names, theirs.names, strict=True)):
        if a != b:
            raise UserError(
                f"{network.run} was trained with {a!r} as class {number}, {dataset.root} has {b!r}"
            )


def _gpus(networks: Sequence[Trained]) -> int:
    """GPUs to use: the cluster's, unless a run says otherwise."""
    if any(network.config.device == "cpu" for network in networks):
        return 0
    return sum(int(node.get("GPU", 0)) for node in cluster_nodes())


def _gather(
    work: Work, total: int, workers: int | None, progress: Progress, here: bool, gpus: int
) -> tuple[NDArray[np.int64], list[Verdicts], int]:
    """The rows that were evaluated, in order, their verdicts, and how many rows were skipped."""
    found: list[Outcome] = []
    done, start, skipped, shown = 0, time.monotonic(), 0, 0
    items = row_ranges(work.dataset.groups(work.split))
    for _, outcome in spread(_evaluate, work, items, workers=workers, here=here, gpus=gpus):
        found.append(outcome)
        for fault in outcome.faults[: SHOWN - shown]:
            progress.say(f"skipped: {fault}")
            shown += 1
        skipped += outcome.skipped
        done += len(outcome.rows) + outcome.skipped
        progress.done("evaluated", done, total, start)
    rows = np.concatenate([outcome.rows for outcome in found])
    order = np.argsort(rows)
    if len(rows) != len(np.unique(rows)) or len(rows) + skipped != total:
        raise RunFailed(f"{len(rows)} rows were evaluated and {skipped} skipped, of {total}")
    if not len(rows):
        raise UserError(f"{work.dataset.root}: {work.split} has no row that could be evaluated")
    joined = []
    for parts in zip(*(outcome.verdicts for outcome in found), strict=True):
        columns = [torch.cat([getattr(part, name) for part in parts])[order] for name in _COLUMNS]
        joined.append(Verdicts(*columns))
    return rows[order], joined, skipped


_COLUMNS = ("labels", "predicted", "ranks", "losses")


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


def _evaluate(work: Work, rows: range) -> Iterator[Outcome]:
    """The outcomes of a range of rows, a batch at a time."""
    if work.threads:
        host.prepare(work.threads)
    classifiers = [network.classifier(work.device) for network in work.networks]
    shapes = [network.shape for network in work.networks]
    loaders = {shape: _loader(work, *shape) for shape in shapes}
    for start in range(rows.start, rows.stop, BATCH):
        numbers = np.arange(start, min(start + BATCH, rows.stop))
        batches = {shape: load.load_views(numbers, work.views) for shape, load in loaders.items()}
        # Where bad rows are skipped, one may be bad for the greater crop alone.
        seen = reduce(np.intersect1d, (batch.rows for batch in batches.values()))
        crops = {shape: torch.from_numpy(_of(batch, seen)) for shape, batch in batches.items()}
        some = [c.probabilities(crops[s]) for c, s in zip(classifiers, shapes, strict=True)]
        if len(some) > 1:
            some.append(average(some, work.shares))
        first = batches[shapes[0]]
        labels = torch.from_numpy(first.labels[np.isin(first.rows, seen)])
        faults = {fault for batch in batches.values() for fault in batch.faults}
        verdicts = [judge(p, labels) for p in some]
        yield Outcome(seen, verdicts, len(numbers) - len(seen), sorted(faults))


def _of(batch: Batch, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The crops of those rows of a batch."""
    return batch.crops if len(rows) == len(batch.rows) else batch.crops[np.isin(batch.rows, rows)]


def _loader(work: Work, image: int, crop: int) -> Loader:
    aug = Augmentation(image, crop)
    return Loader(work.dataset, work.split, aug, None, seed=0, on_error=work.on_error)
