"""`towers predict --data`: the likeliest classes of every row of a split, in one Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from datasets.augmentation import evaluation_views
from datasets.shards import open_dataset
from pipeline.evaluation import best
from workers.cluster import connected
from workers.output import check_output, written
from workers.predict import open_known
from workers.progress import Progress
from workers.spread import only_here
from workers.sweep import Device, OnError, Swept, Work, checked_views, pick_split, sweep
from workers.trained import Step

GROUP = 1 << 16  # rows of a row group of the file
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "path": pa.string(),
        "classes": pa.list_(pa.string()),
        "probabilities": pa.list_(pa.float64()),
    }
)


@dataclass(frozen=True)
class Seen(Swept):
    """What a network sees in n rows: their `paths`, and the likeliest `classes` (int64) with their
    `probabilities` (float64), each [n, 5 at most], falling.
    """

    paths: list[str | None]
    classes: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def predict_rows(
    run: str,
    data: str,
    output: str,
    *,
    split: str = "",
    crops: int = 1,
    step: Step = None,
    on_error: OnError = "fail",
    workers: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes what a run's network sees in every row of the shards `data`, labelled or not, to the
    Parquet file `output`, complete or not at all.

    A row there has `row`, its number in the split (int64); `path`, the name that the image came
    with (string); `classes`, the names of the five likeliest, falling (list of string); and their
    `probabilities` (list of double). `split`: val, or test if there is no val, if unset. Returns
    the keys of `towers predict --data --json`. Raises UserError and DataError for what the user can
    mend, RunFailed if rows were lost.
    """
    progress = progress or Progress()
    views, network = checked_views(crops), open_known(run, step)
    dataset = open_dataset(data, labelled=False)
    split = pick_split(dataset, split)
    check_output(
        output, ".parquet", [shard.path for shards in dataset.splits.values() for shard in shards]
    )
    assert network.classes
    with connected(unless=only_here(dataset.root)):
        work = Work(dataset, split, views, on_error, (network,), None, device)
        with closing(sweep(_predict, work, "predicted", workers, progress)) as found:
            rows, skipped = _write(output, found, network.classes.names)
    return {
        "run": run,
        "step": network.step,
        "data": dataset.root,
        "split": split,
        "crops": crops,
        "rows": rows,
        "skipped": skipped,
        "file": output,
    }


def _predict(work: Work, batches: list[NDArray[np.int64]]) -> Iterator[Seen]:
    (network,) = work.networks
    (classifier,), (_, crop) = work.classifiers, network.shape
    loader = work.loader(network.shape, labelled=False)
    for numbers in batches:
        faults: list[str] = []
        rows, paths, views = [], [], []
        for record, pixels in loader.images(numbers, faults):
            rows.append(record.row)
            paths.append(record.path)
            views.append(evaluation_views(pixels, crop, work.views))
        chosen = torch.empty(0, network.network.classes, dtype=torch.float64)
        if rows:
            chosen = classifier.probabilities(torch.from_numpy(np.stack(views)))
        classes, chances = best(chosen)
        kept = np.array(rows, np.int64)
        yield Seen(kept, len(faults), faults, paths, classes.numpy(), chances.numpy())


def _write(output: str, found: Iterator[Seen], names: tuple[str, ...]) -> tuple[int, int]:
    """Writes the file as rows come, and counts them and those that were skipped."""
    rows = skipped = 0
    with written(output) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        for parts in _groups(found):
            table = _table(parts, names)
            writer.write_table(table)
            rows += len(table)
            skipped += sum(part.skipped for part in parts)
    return rows, skipped


def _groups(found: Iterator[Seen]) -> Iterator[list[Seen]]:
    """Parts of a row group together."""
    parts: list[Seen] = []
    for part in found:
        parts.append(part)
        if sum(len(one.rows) for one in parts) >= GROUP:
            yield parts
            parts = []
    if parts:
        yield parts


def _table(found: list[Seen], names: tuple[str, ...]) -> pa.Table:
    classes = np.concatenate([part.classes for part in found])
    chances = np.concatenate([part.probabilities for part in found])
    ends = pa.array(np.arange(len(classes) + 1, dtype=np.int32) * classes.shape[1])
    return pa.table(
        {
            "row": np.concatenate([part.rows for part in found]),
            "path": pa.array([path for part in found for path in part.paths], pa.string()),
            "classes": pa.ListArray.from_arrays(ends, pa.array(names).take(classes.ravel())),
            "probabilities": pa.ListArray.from_arrays(ends, chances.ravel()),
        },
        SCHEMA,
    )
