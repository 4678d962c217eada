"""The features of all rows of a split, kept in a run, and the search among them."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.layout import Dataset
from datasets.storage import matching, parquet, remove, storage, write_whole
from workers.cluster import connected
from workers.config import UserError
from workers.output import check_output, writing
from workers.progress import Progress
from workers.spread import only_here, spread
from workers.sweep import Device, OnError, Swept, Work, sweep
from workers.trained import Trained

INDEX, ABOUT = "neighbours", "index.json"  # a folder in the run, and what it says of itself, last
SMALL = 256 << 20  # bytes of features up to which this process searches them itself


class Near(NamedTuple):
    """A row that is near, by falling likeness if sorted."""

    distance: float
    row: int
    label: int


@dataclass(frozen=True)
class FeatureIndex:
    """What the last layer of a network reads of each row of a split: float32 [rows, units] as
    Parquet files in the network's run, one for each range of rows.

    The cluster's workers make it, `workers` of them if given, on `device`. It is kept until the
    checkpoint or the rows are others.
    """

    network: Trained
    dataset: Dataset
    split: str
    on_error: OnError
    workers: int | None
    device: Device
    progress: Progress

    def nearest(self, features: Tensor, k: int) -> list[list[Near]]:
        """The `k` rows of least Euclidean distance to each of the features, float32 [n, units].

        Raises RunFailed if rows were lost; UserError if the run cannot be written, or the index is
        not whole, as where another process makes it anew.
        """
        kept = self._kept()
        of = self._depends_on()
        # Where no image was skipped, all are there for who would skip some.
        fresh = kept.get("of") in (of, {**of, "on_error": "fail"})
        size = self.dataset.rows(self.split) * features.shape[1] * features.element_size()
        here = size <= SMALL or only_here(self.place)
        with connected(unless=only_here(self.dataset.root) or (fresh and here)):
            if not fresh:
                kept = self._build(of)
            return self._search(kept, features, k, here)

    @property
    def place(self) -> str:
        """Its folder."""
        return f"{self.network.run}/{INDEX}"

    def _depends_on(self) -> dict[str, Any]:
        shards = [[shard.state(), list(shard.groups)] for shard in self.dataset.shards(self.split)]
        of = {"step": self.network.step, "data": self.dataset.root, "split": self.split}
        return {**of, "shards": shards, "on_error": self.on_error}

    def _kept(self) -> dict[str, Any]:
        """What the index says of itself; nothing if there is none that is complete."""
        fs, path = storage(self.place)
        try:
            return dict(json.loads(fs.cat_file(f"{path}/{ABOUT}")))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return {}

    def _build(self, of: dict[str, Any]) -> dict[str, Any]:
        """Writes the features of all rows into a folder of this build's own; returns what the index
        then says of itself.
        """
        folder = uuid.uuid4().hex
        fs, path = storage(self.place)
        with writing(self.place):
            if fs.exists(path):
                with suppress(FileNotFoundError):  # first: what is left may be half of it
                    fs.rm_file(f"{path}/{ABOUT}")
                remove(fs, path)
            fs.makedirs(f"{path}/{folder}", exist_ok=True)
        check_output(f"{self.place}/{ABOUT}")
        networks = (self.network,)
        work = Work(self.dataset, self.split, 1, self.on_error, networks, None, self.device)
        write = partial(_write, f"{self.place}/{folder}")
        parts = sweep(write, work, "indexed", self.workers, self.progress)
        kept = {"of": of, "folder": folder, "rows": sum(len(part.rows) for part in parts)}
        write_whole(fs, f"{path}/{ABOUT}", json.dumps(kept).encode())
        return kept

    def _search(
        self, kept: dict[str, Any], features: Tensor, k: int, here: bool
    ) -> list[list[Near]]:
        fs, path = storage(f"{self.place}/{kept['folder']}")
        files = [str(fs.unstrip_protocol(file)) for file in matching(fs, path, "*.parquet")]
        found: list[list[Near]] = [[] for _ in features]
        rows, shared = 0, (features.numpy(), k)
        for _, (count, part) in spread(_nearest, shared, files, workers=self.workers, here=here):
            rows += count
            found = [sorted(own + more)[:k] for own, more in zip(found, part, strict=True)]
        if rows != kept["rows"]:
            raise UserError(
                f"{self.place}: {rows} of {kept['rows']} rows are there; if no other `towers "
                "neighbours` makes it anew right now, remove it"
            )
        return found


def _write(index: str, work: Work, batches: list[NDArray[np.int64]]) -> Iterator[Swept]:
    """Writes the features of a range of rows."""
    (classifier,) = work.classifiers
    loader = work.loader(work.networks[0].shape)
    tables, skipped, faults = [], 0, []
    for numbers in batches:
        batch = loader.load(numbers, 0, False)
        skipped += batch.skipped
        faults += batch.faults
        if not len(batch.rows):
            continue
        features = classifier.features(torch.from_numpy(batch.crops)).numpy()
        flat = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
        columns = {"row": batch.rows, "label": batch.labels, "features": flat}
        tables.append(pa.table(columns))
    rows = np.empty(0, np.int64)
    if tables:
        rows = np.concatenate([table["row"].to_numpy() for table in tables])
        buffer = io.BytesIO()
        pq.write_table(pa.concat_tables(tables), buffer, compression="zstd")
        fs, path = storage(index)
        write_whole(fs, f"{path}/rows-{batches[0][0]:012d}.parquet", buffer.getvalue())
    yield Swept(rows, skipped, faults)  # in one, once the file is there: none is made of half of it


def _nearest(
    shared: tuple[NDArray[np.float32], int], file: str
) -> Iterator[tuple[int, list[list[Near]]]]:
    """How many rows a file of the index has, and the nearest of them to each of some features."""
    wanted, k = shared
    with parquet(file) as source:
        table = source.read()
    flat = table["features"].combine_chunks().flatten().to_numpy()
    rows, labels = (table[name].to_numpy() for name in ("row", "label"))
    # Not by products, whose rounding hides how near the nearest are.
    distances = torch.cdist(
        torch.from_numpy(wanted),
        torch.from_numpy(flat.reshape(len(rows), -1).copy()),
        compute_mode="donot_use_mm_for_euclid_dist",
    ).numpy()
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    nearest = [
        [Near(float(d[n]), int(rows[n]), int(labels[n])) for n in places]
        for d, places in zip(distances, order, strict=True)
    ]
    yield len(rows), nearest
