"""The images of a source as a table of where each one's bytes lie."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from datasets import DataError
from datasets.archives import HEADERS, Member, tar_members, zip_members
from datasets.foreign import SPLITS
from datasets.images import is_image
from datasets.layout import Dataset
from datasets.listing import list_columns, read_list
from datasets.sources import Part, Source
from datasets.storage import address, files_below, hidden, opened, parquet, persistent, storage
from datasets.webdataset import samples

ENTRIES = pa.schema(
    [
        ("file", pa.dictionary(pa.int32(), pa.large_string())),  # beyond 2 GB of names, too
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("packed", pa.int64()),
        ("check", pa.int64()),
        ("name", pa.large_string()),
        ("label", pa.dictionary(pa.int32(), pa.string())),
        ("split", pa.dictionary(pa.int32(), pa.string())),
    ]
)
"""An image: `length` bytes (-1: all) from `offset` on in `file`, `packed` and `check` as in
`Member`; for Parquet, `offset` is its row within the split. `label` is the class's name, null if
only folders in `name` tell or the row has none; `split` is "" if the source names none.
"""


def plain(schema: Any) -> Any:
    """A schema with strings in the stead of dictionaries and large strings, for a few rows."""
    integer = pa.types.is_integer
    return pa.schema([(f.name, f.type if integer(f.type) else pa.string()) for f in schema])


_PLAIN = plain(ENTRIES)
Found = tuple[str, Member, str | None]  # the file that it lies in, and its label if that is known


def scan(source: Source, part: Part) -> tuple[Any, list[str]]:
    """The images of one part as a table of `ENTRIES`, and the names of files that were passed by
    because they are none. Raises DataError, naming the place, for damage.
    """
    return persistent(part.file, lambda: _scan(source, part))


def _scan(source: Source, part: Part) -> tuple[Any, list[str]]:
    if source.kind == "parquet":
        assert source.dataset
        return _table(_parquet_rows(source.dataset, part)), []
    if source.kind == "list":
        return _table(_listed(part)), []
    if source.kind == "webdataset":
        found: Iterator[Found] = ((part.file, *sample) for sample in samples(part.file))
    elif source.kind == "files":
        found = _files(source, part)
    else:
        found = _members(source, part)
    passed: list[str] = []
    return _table(_images(found, part, passed)), passed


def _parquet_rows(dataset: Dataset, part: Part) -> Iterator[tuple[Any, ...]]:
    with parquet(part.file) as file:
        labels = file.read(columns=[dataset.label]).column(dataset.label).to_pylist()
    shard = part.file.rpartition("/")[2]
    for row, label in enumerate(labels):
        known = label is not None and 0 <= label < len(dataset.classes)
        name = f"{shard} row {row}"
        told = dataset.classes[label] if known else None
        yield part.file, part.start + row, -1, -1, -1, name, told, part.split


def _listed(part: Part) -> Iterator[tuple[Any, ...]]:
    base = part.file.rpartition("/")[0]
    lines = (
        _listed_parquet(part.file)
        if part.file.lower().endswith(".parquet")
        else read_list(part.file)
    )
    for path, label, split in lines:
        whole = path if "://" in path or path.startswith("/") else f"{base}/{path}"
        yield whole, 0, -1, -1, -1, path, label, split


def _listed_parquet(url: str) -> Iterator[tuple[str, str, str]]:
    with parquet(url) as file:
        names = file.schema_arrow.names
        at = list_columns(names)
        kept = [names[at[field]] for field in ("path", "label", "split") if field in at]
        for batch in file.iter_batches(columns=kept):
            columns = [batch.column(name).to_pylist() for name in kept]
            for row in zip(*columns, strict=True):
                if row[0] is None or row[1] is None:
                    raise DataError(f"{url}: a row without path or label; fill or remove it")
                split = str(row[2] or "") if len(row) > 2 else ""
                yield str(row[0]), str(row[1]), SPLITS.get(split.lower(), split)


def _files(source: Source, part: Part) -> Iterator[Found]:
    fs, path = storage(part.file)
    _, root = storage(source.url)
    # A web server's names are links, and their list has no sizes.
    named = partial(unquote, errors="surrogateescape") if "http" in fs.protocol else str
    for name, size in files_below(fs, path).items():
        inner = named(name).removeprefix(named(root)).strip("/")
        member = Member(inner, 0, -1 if size is None else size)
        yield address(fs, name), member, None


def _members(source: Source, part: Part) -> Iterator[Found]:
    place = f"{part.file} {part.label}.tar" if part.length else part.file
    with opened(part.file, **HEADERS) as file:
        if source.kind == "zip":
            members = zip_members(file, place)
        else:
            members = tar_members(file, place, part.start, part.length)
        yield from ((part.file, member, part.label or None) for member in members)


def _images(found: Iterator[Found], part: Part, passed: list[str]) -> Iterator[tuple[Any, ...]]:
    for file, member, label in found:
        if hidden(member.name) or not is_image(member.name):
            passed.append(member.name)
            continue
        try:
            member.name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{part.file}: {member.name!a} is no UTF-8; rename it") from None
        yield file, *member[1:], member.name, label, part.split


def _table(rows: Iterator[tuple[Any, ...]]) -> Any:
    tables = []
    while some := list(islice(rows, 1 << 14)):
        columns = zip(*some, strict=True)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, _PLAIN, strict=True)]
        tables.append(pa.table(arrays, schema=_PLAIN).cast(ENTRIES))
    return pa.concat_tables(tables) if tables else ENTRIES.empty_table()
