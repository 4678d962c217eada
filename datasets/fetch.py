"""The bytes of a source's images, wherever they lie."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from datasets.images import MAX_BYTES
from datasets.layout import Dataset
from datasets.rows import Rows
from datasets.storage import passing, persistent, said, storage

_BATCH_BYTES = 32 << 20
_BATCH = 64
_UNKNOWN = 2 << 20  # bytes that an image may well have whose source does not say


class Entry(NamedTuple):
    """An image of a source, as `scanning.ENTRIES` has it; `label` is the number of its class."""

    file: str
    offset: int
    length: int
    packed: int
    check: int
    name: str
    label: int


def entries_of(table: Any) -> list[Entry]:
    """The rows of a table of entries."""
    columns = [table.column(name).to_pylist() for name in Entry._fields]
    return [Entry(*row) for row in zip(*columns, strict=True)]


def fetch(entries: Sequence[Entry], dataset: Dataset | None, split: str) -> Iterator[bytes | str]:
    """Each entry's bytes, or what is wrong with it, in order; a few megabytes at a time.

    `dataset` and `split` are those of a source that is Parquet. Raises DataError if a store does
    not answer or a whole file is gone or damaged.
    """
    if dataset:
        yield from _rows(entries, Rows(dataset, split, labelled=False))  # entries have labels
        return
    start = 0
    while start < len(entries):
        stop, size = start, 0
        while stop < len(entries) and stop - start < _BATCH and size < _BATCH_BYTES:
            size += entries[stop].length if entries[stop].length >= 0 else _UNKNOWN
            stop += 1
        yield from _ranges(entries[start:stop])
        start = stop


def _rows(entries: Sequence[Entry], rows: Rows) -> Iterator[bytes | str]:
    for entry in entries:
        faults: list[str] = []
        found = rows.read(np.array([entry.offset]), faults)
        yield found[0].image if found else faults[0]


def _ranges(entries: Sequence[Entry]) -> Iterator[bytes | str]:
    got: list[bytes | Exception | None] = [None] * len(entries)
    places = {file: storage(file) for file in {e.file for e in entries}}
    small = []
    for n, entry in enumerate(entries):
        if max(entry.length, entry.packed) <= MAX_BYTES:
            if _stored(entry):
                small.append(n)
            else:  # asked for nothing, a store sends the whole file
                got[n] = b""
    for fs in {places[entries[n].file][0] for n in small}:  # a list may name several stores
        asked = [n for n in small if places[entries[n].file][0] == fs]
        paths = [places[entries[n].file][1] for n in asked]
        bounds = [_bounds(entries[n]) for n in asked]
        found = persistent(entries[asked[0]].file, partial(_get, fs, paths, bounds))
        for n, result in zip(asked, found, strict=True):
            got[n] = result
    for n, entry in enumerate(entries):
        data, got[n] = got[n], None
        yield _checked(entry, data)


def _get(fs: Any, paths: list[str], bounds: list[tuple[int, int]]) -> list[bytes | Exception]:
    got: list[bytes | Exception] = fs.cat_ranges(
        paths,
        [start for start, _ in bounds],
        [stop for _, stop in bounds],
        on_error="return",
        # Else a store that is not asked all at once is read megabytes ahead.
        **({} if fs.async_impl else {"cache_type": "none"}),
    )
    for found in got:
        if isinstance(found, Exception) and passing(found):
            raise found
    return got


def _bounds(entry: Entry) -> tuple[int, int]:
    stored = _stored(entry)
    return entry.offset, entry.offset + (stored if stored >= 0 else MAX_BYTES + 1)


def _stored(entry: Entry) -> int:
    """Bytes that it takes in its file, less than 0 if unknown."""
    return entry.length if entry.packed < 0 else entry.packed


def _checked(entry: Entry, data: bytes | Exception | None) -> bytes | str:
    """What was got, unpacked, if it is what the source says."""
    what = entry.name
    if isinstance(data, FileNotFoundError):
        return f"{what}: no such file ({entry.file}); correct the list or add the file"
    if isinstance(data, Exception):
        return f"{what}: cannot be read ({entry.file}: {said(data)}); correct the source"
    if data is None or len(data) > MAX_BYTES:
        return f"{what}: more than {MAX_BYTES >> 20} MiB; is it an image?"
    if entry.packed >= 0:
        if len(data) == entry.packed:
            try:
                data = zlib.decompressobj(-15).decompress(data, entry.length + 1)
            except zlib.error as error:
                return f"{what}: damaged ({entry.file}: {error}); pack it again"
        else:
            data = b""
    if entry.length >= 0 and len(data) != entry.length:
        return f"{what}: its file ends inside it ({entry.file}); copy it again"
    if entry.check >= 0 and zlib.crc32(data) != entry.check:
        return f"{what}: damaged ({entry.file} has another checksum); copy it again"
    return data
