"""Any rows of a split, read by the row group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets import DataError
from datasets.cache import GroupCache
from datasets.layout import Dataset
from datasets.storage import open_parquet, parquet, parquet_errors, persistent

AT_ONCE = 16
"""Row groups that are fetched at a time from a store far away."""

OPEN = 256
"""Local shards that are kept open."""


@dataclass(frozen=True)
class Record:
    """One row: the encoded image, its label, where it stands (for messages), its number, and the
    name that the image came with, if any.
    """

    image: bytes
    label: int
    place: str
    row: int
    path: str | None


class BadRow(DataError):
    """A row is bad, and others in its file need not be."""


@dataclass
class _Group:
    """A row group in memory: its columns, where it begins within the split, and in which file.

    `paths` and `labels` may be None, as may each label.
    """

    images: Any
    paths: Any
    labels: list[int | None] | None
    bytes: int
    start: int
    shard: str
    first: int


@dataclass
class Rows:
    """Reads any rows of one split, and keeps the row groups that were used last.

    Unless they have to be `labelled`, labels are not read, and are -1. `cache_groups` row groups at
    most, of `cache_bytes` bytes together, are kept (always the last). Those of a store far away the
    machine keeps too, for all processes, in `disk_bytes` of its disk.
    """

    dataset: Dataset
    split: str
    cache_groups: int = 1024
    cache_bytes: int = 256 << 20
    labelled: bool = True
    disk_bytes: float = 0
    _cache: OrderedDict[int, _Group] = field(default_factory=OrderedDict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._shards = self.dataset.shards(self.split)
        self._ends = np.cumsum(self.dataset.groups(self.split), dtype=np.int64)
        self._first = np.cumsum([0, *(len(shard.groups) for shard in self._shards)])
        self._bytes = 0  # of what is in the cache
        self._footers: dict[int, Any] = {}  # of shards far away
        self._opened = lru_cache(OPEN)(open_parquet)
        self._columns = [self.dataset.image, *([self.dataset.label] if self.labelled else [])]
        self._far = self.dataset.far(self.split)
        disk = self.disk_bytes if self._far else 0
        self._kept = GroupCache(self.dataset, self.split, self._columns, disk)
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self._coming: dict[int, Future[_Group]] = {}

    def read(
        self,
        rows: NDArray[np.int64],
        faults: list[str] | None = None,
        then: NDArray[np.int64] | None = None,
    ) -> list[Record]:
        """The rows numbered `rows` (int64 [n], within the split, in file order), in that order.

        Each row group is fetched once at most, and of it the two columns; those of a store far away
        several at a time, and in the end those of `then`, which will be asked for next. Raises
        IndexError for a row that the split doesn't have, and DataError, naming file and row, for a
        file that can't be read, a missing image or label, or a label that is none of the classes.
        With a list of `faults`, bad rows are left out instead, and the list says why.
        """
        total = int(self._ends[-1]) if len(self._ends) else 0
        if len(rows) and not 0 <= rows.min() <= rows.max() < total:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {total} in {self.split}")
        groups = np.searchsorted(self._ends, rows, side="right")
        found: dict[int, Record] = {}
        # By group, so that each is fetched once however small the cache is.
        numbers, counts = np.unique(groups, return_counts=True)
        parts = np.split(np.argsort(groups, kind="stable"), np.cumsum(counts))[:-1]
        later: list[int] = []
        if self._far and then is not None:
            later = np.unique(np.searchsorted(self._ends, then, side="right")).tolist()
        for group, part in zip(self._groups(numbers.tolist(), later), parts, strict=True):
            for index in part.tolist():
                try:
                    found[index] = self._record(group, int(rows[index]))
                except BadRow as error:
                    if faults is None:
                        raise
                    faults.append(str(error))
        return [found[index] for index in sorted(found)]

    def _record(self, group: _Group, row: int) -> Record:
        at = row - group.start
        place = f"{group.shard} row {group.first + at}"
        image = group.images[at].as_py()
        path = None if group.paths is None else group.paths[at].as_py()
        path = path if path is None else str(path)
        if not image and path:
            raise BadRow(
                f"{place}: {self.dataset.image!r} holds a path, {path}, and no bytes; "
                "embed the images in the Parquet"
            )
        if not image:
            raise BadRow(f"{place}: {self.dataset.image!r} is empty; remove the row")
        if group.labels is None:
            return Record(image, -1, place, row, path)
        label, classes = group.labels[at], len(self.dataset.classes)
        if label is None or not 0 <= label < classes:
            what = "is empty" if label is None else f"is {label}, outside 0 to {classes - 1}"
            raise BadRow(f"{place}: {self.dataset.label!r} {what}; correct or remove the row")
        return Record(image, int(label), place, row, path)

    def _locate(self, number: int) -> tuple[int, int]:
        """The shard of a row group, and the group's index there."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])

    def _groups(self, numbers: list[int], later: list[int]) -> Iterator[_Group]:
        """The row groups of these `numbers`, in this order. What is far away is asked for early, as
        a store takes longer to answer than to send a row group.
        """
        wanted = {*numbers, *later}
        for number, coming in list(self._coming.items()):
            # What failed is asked for again: the store may be back since.
            if number not in wanted or (coming.done() and coming.exception()):
                self._coming.pop(number).cancel()
        for at, number in enumerate(numbers):
            if self._far:
                self._ask(numbers[at : at + AT_ONCE])
            yield self._group(number)
        self._ask(later)

    def _ask(self, numbers: list[int]) -> None:
        for number in numbers:
            if number not in self._cache and number not in self._coming:
                self._coming[number] = self._threads.submit(self._fetch, number)

    def _group(self, number: int) -> _Group:
        """A row group, kept for the next time."""
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        coming = self._coming.pop(number, None)
        self._cache[number] = group = coming.result() if coming else self._fetch(number)
        self._bytes += group.bytes
        while len(self._cache) > 1 and (
            len(self._cache) > self.cache_groups or self._bytes > self.cache_bytes
        ):
            self._bytes -= self._cache.popitem(last=False)[1].bytes
        return group

    def _fetch(self, number: int) -> _Group:
        shard_number, index = self._locate(number)
        shard = self._shards[shard_number]

        def read() -> Any:
            if not self._far:
                # To open it anew, to fetch all first, and threads cost more than the reading.
                with parquet_errors(shard.path):
                    file = self._opened(shard.path)
                    return file.read_row_group(index, columns=self._columns, use_threads=False)
            with parquet(shard.path, self._footers.get(shard_number)) as file:
                self._footers[shard_number] = file.metadata
                return file.read_row_group(index, columns=self._columns)

        table = self._kept.table(shard, index, partial(persistent, shard.path, read))
        # More than 2 GiB are in several pieces, and would not fit in one.
        images, *labels = (
            column.chunk(0) if column.num_chunks == 1 else column
            for column in map(table.column, self._columns)
        )
        if len(table) != shard.groups[index]:
            raise DataError(
                f"{shard.path}: row group {index} has {len(table)} rows and had "
                f"{shard.groups[index]}; the file changed: start again"
            )
        paths = None
        if pa.types.is_struct(images.type):
            fields = dict(zip(images.type.names, images.flatten(), strict=True))
            images, paths = fields["bytes"], fields.get("path")
        return _Group(
            images,
            paths,
            labels[0].to_pylist() if labels else None,
            table.nbytes,
            int(self._ends[number - 1]) if number else 0,
            shard.name,
            sum(shard.groups[:index]),
        )
