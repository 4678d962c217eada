"""`towers evaluate`: how often networks are right, by as many workers as the cluster has.

Each worker holds the whole networks. What is worked on together is cut by the data alone, and sums
are exact, so that the result does not depend on how many workers there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.augmentation import Batch
from datasets.layout import Dataset
from datasets.shards import open_dataset
from pipeline.evaluation import Verdicts, average, judge
from workers.cluster import connected
from workers.config import UserError
from workers.data import (
    classes_of,
    keep,
    known_statistics,
    measured,
    numbered,
    training_data,
)
from workers.evaluation_file import write_evaluation
from workers.output import attempted
from workers.progress import Progress
from workers.spread import only_here
from workers.sweep import Device, OnError, Swept, Work, checked_views, pick_split, sweep
from workers.trained import Step, Trained, open_trained


@dataclass(frozen=True)
class Outcome(Swept):
    """What became of some rows: the verdicts of each network and, of several, of their average."""

    verdicts: list[Verdicts]


def evaluate(
    runs: Sequence[str],
    *,
    data: str = "",
    split: str = "",
    crops: int = 1,
    step: Step = None,
    weights: Sequence[float] | None = None,
    on_error: OnError = "fail",
    workers: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates runs, and of several their averaged prediction too, on every row of a split once.

    `data`: shards, those of the first run's training if unset; `split`: val, or test if there is no
    val, if unset, and of train, if `data` is unset, the images that the first run was trained on;
    `crops`: 1, the centre, or 10; `step`: of the checkpoints; `weights`: of the
    average. Returns the keys of `towers evaluate --json`; the whole evaluation is kept in each run.
    Raises UserError and DataError for what the user can mend, RunFailed if rows were lost.
    """
    progress = progress or Progress()
    views = checked_views(crops)
    networks = [open_trained(run, step) for run in runs]
    if weights is not None:
        try:
            average([torch.zeros(1)] * len(runs), weights)
        except ValueError as error:
            raise UserError(str(error)) from None
    config = networks[0].config
    dataset = open_dataset(data or config.shards or f"{runs[0]}/shards")
    split = pick_split(dataset, split)
    if split == "train" and config.images and not data:
        dataset = dataset.first(split, config.images)
    for network in networks:
        check_classes_fit(network, dataset)
    with connected(unless=only_here(dataset.root)):
        work = Work(
            dataset,
            split,
            views,
            on_error,
            tuple(complete(network, dataset, progress) for network in networks),
            tuple(weights) if weights is not None else None,
            device,
        )
        found = list(sweep(_evaluate, work, "evaluated", workers, progress))
    rows = np.concatenate([outcome.rows for outcome in found])
    verdicts = [_joined(of_one) for of_one in zip(*(o.verdicts for o in found), strict=True)]
    skipped = sum(outcome.skipped for outcome in found)
    return write_evaluation(work, rows, verdicts, skipped, progress)


def complete(network: Trained, dataset: Dataset, progress: Progress) -> Trained:
    """A network that knows its classes and statistics, which are then kept in its run: those of its
    training data or else of `dataset`, measured if nobody has. Raises UserError if there is nothing
    to measure.
    """
    if network.classes and network.statistics:
        return network
    trained_on = training_data(network.run, network.config)
    if not trained_on or len(trained_on.classes) != network.network.classes:
        trained_on = dataset  # others may lie now where the run's lay
    # Numbers alone may be of fewer classes than there are.
    classes = network.classes or numbered(classes_of(trained_on), network.network.classes)
    statistics = network.statistics or known_statistics(network.config.image, trained_on.root)
    if not statistics and "train" not in trained_on.splits:
        raise UserError(
            f"{network.run} does not know the mean of its training images, and {trained_on.root} "
            "has no train split to measure it on; name shards that have one by --data"
        )
    if not statistics:
        one = {"CPU": 1.0}
        statistics = measured(trained_on, network.config, one, progress)
    lost = f"{network.run} cannot keep what was found of its data"
    with attempted(lambda why: progress.say(f"{lost}: {why}")):
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


def _joined(parts: Sequence[Verdicts]) -> Verdicts:
    names = (field.name for field in fields(Verdicts))
    return Verdicts(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _evaluate(work: Work, batches: list[NDArray[np.int64]]) -> Iterator[Outcome]:
    shapes = [network.shape for network in work.networks]
    loaders = {shape: work.loader(shape) for shape in shapes}
    for numbers in batches:
        loaded = {shape: load.load_views(numbers, work.views) for shape, load in loaders.items()}
        # Where bad rows are skipped, one may be bad for the greater crop alone.
        seen = reduce(np.intersect1d, (batch.rows for batch in loaded.values()))
        crops = {shape: torch.from_numpy(_of(batch, seen)) for shape, batch in loaded.items()}
        some = [c.probabilities(crops[s]) for c, s in zip(work.classifiers, shapes, strict=True)]
        if len(some) > 1:
            some.append(average(some, work.shares))
        first = loaded[shapes[0]]
        labels = torch.from_numpy(first.labels[np.isin(first.rows, seen)])
        faults = {fault for batch in loaded.values() for fault in batch.faults}
        verdicts = [judge(p, labels) for p in some]
        yield Outcome(seen, len(numbers) - len(seen), sorted(faults), verdicts)


def _of(batch: Batch, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The crops of those rows of a batch."""
    return batch.crops if len(rows) == len(batch.rows) else batch.crops[np.isin(batch.rows, rows)]
