"""What people have labelled images in, scanned into a table of where each image's bytes lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa

from datasets import DataError
from datasets.archives import HEADERS, Member, tar_members, zip_members
from datasets.foreign import SPLITS, holds_images, split_word
from datasets.images import is_image
from datasets.layout import Dataset
from datasets.listing import list_columns, read_list, stem
from datasets.shards import DEEP, open_dataset
from datasets.storage import (
    address,
    existing,
    files_below,
    hidden,
    inside,
    opened,
    parquet,
    persistent,
    storage,
)
from datasets.webdataset import holds_samples, samples

Kind = Literal["files", "list", "tar", "webdataset", "zip", "parquet"]

ENTRIES = pa.schema(
    [
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("packed", pa.int64()),
        ("check", pa.int64()),
        ("name", pa.string()),
        ("label", pa.dictionary(pa.int32(), pa.string())),
        ("split", pa.dictionary(pa.int32(), pa.string())),
    ]
)
"""An image: `length` bytes (-1: all) from `offset` on in `file`, `packed` and `check` as in
`Member`; for Parquet, `offset` is its row within the split. `label` is the class's name, null if
only folders in `name` tell or the row has none; `split` is "" if the source names none.
"""


def plain(schema: Any) -> Any:
    """A schema with the values of its dictionaries in their stead."""
    return pa.schema([(f.name, getattr(f.type, "value_type", f.type)) for f in schema])


_PLAIN = plain(ENTRIES)
HEAD = 64  # members of a tar that tell what it is
Found = tuple[str, Member, str | None]  # the file that it lies in, and its label if that is known


@dataclass(frozen=True)
class Part:
    """What one worker scans: a file or folder, or an archive of `length` bytes at `start` in it.

    `label` and `split`, if given, are those of all its images.
    """

    file: str
    start: int = 0
    length: int | None = None
    label: str = ""
    split: str = ""


@dataclass(frozen=True)
class Source:
    """A source as found: its kind, its parts in order, and `dataset` if it is Parquet."""

    url: str
    kind: Kind
    parts: tuple[Part, ...]
    dataset: Dataset | None = None


def find_source(url: str) -> Source:
    """What lies at `url`: ILSVRC's tar of tars, another tar or zip of images, a folder of class
    folders, of tars or of Parquet, WebDataset's tars (a `*` in the name is filled in), a CSV or
    Parquet list of paths and labels.

    Raises DataError if nothing is there, or nothing that images are taken from.
    """
    return persistent(url, lambda: _find(url))


def _find(url: str) -> Source:
    fs, root = storage(url)
    if "*" in root:
        files = sorted(fs.glob(root))
        base = root.partition("*")[0].rpartition("/")[0]
        return _archives(url, fs, [f for f in files if f.endswith(".tar")], base)
    fs, root = existing(url)
    if fs.isdir(root):
        return _folder(url, fs, root)
    ending = root.rpartition(".")[2].lower()
    place = address(fs, root)
    if ending == "tar":
        return _archives(url, fs, [root], root.rpartition("/")[0])
    if ending == "zip":
        return Source(url, "zip", (Part(place),))
    if ending in ("csv", "tsv", "txt"):
        return Source(url, "list", (Part(place),))
    if ending == "parquet":
        with parquet(place) as file:
            schema = file.schema_arrow
            whole = any(holds_images(field.type) for field in schema)  # and no list of paths
            if not whole and list_columns(schema.names) and _paths(schema):
                return Source(url, "list", (Part(place),))
        return _parquet(url)
    if ending in ("gz", "tgz", "bz2", "xz", "zst"):
        raise DataError(
            f"{url}: compressed as a whole, so that no image can be read alone; decompress it "
            "first (photographs are not smaller for it)"
        )
    raise DataError(
        f"{url}: no source of images; a tar or zip, a folder, Parquet, or a CSV list is"
    )


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


def _folder(url: str, fs: Any, root: str) -> Source:
    """A folder: looks at what lies in it, or in its folders that are named like splits."""
    files, folders = _parted(fs, root)
    if tars := [f for f in files if f.endswith(".tar")]:
        if left := next((f for f in folders if _has_images(fs, f)), None):
            raise DataError(
                f"{url}: {_last(tars[0])} is a tar, and {_last(left)} a folder of images; name "
                "the tars alone, as FOLDER/*.tar, or move them"
            )
        return _archives(url, fs, tars, root)
    deeper = {f: _parted(fs, f) for f in folders if _last(f).lower() in (*SPLITS, "data")}
    below = sorted(file for own, _ in deeper.values() for file in own)
    if any(f.endswith(".parquet") for f in [*files, *below]) or _deep_parquet(fs, folders):
        return _parquet(url)
    if tars := [f for f in below if f.endswith(".tar")]:
        return _archives(url, fs, tars, root)
    # A part for each class folder, so that they are listed side by side, unless images lie there.
    parts = [f for f in folders if f not in deeper]
    for folder, (own, classes) in deeper.items():
        parts += [folder] if any(map(is_image, own)) else classes
    if any(map(is_image, files)):
        parts = [root]
    if not parts:
        raise DataError(f"{url}: no Parquet, no tars and no images there")
    return Source(url, "files", tuple(Part(address(fs, path)) for path in sorted(parts)))


def _deep_parquet(fs: Any, folders: Sequence[str], deep: int = DEEP - 1) -> bool:
    """Whether the files nearest below some folders, as deep as data sets are, are Parquet: told by
    the first that are Parquet or images.
    """
    for folder in folders if deep else ():
        files, inner = _parted(fs, folder)
        if any(map(is_image, files)):
            return False
        if any(f.endswith(".parquet") for f in files) or _deep_parquet(fs, inner, deep - 1):
            return True
    return False


def _has_images(fs: Any, folder: str) -> bool:
    """Whether images lie in a folder, as far as one may see."""
    try:
        return any(map(is_image, _parted(fs, folder)[0]))
    except PermissionError:
        return False


def _parted(fs: Any, folder: str) -> tuple[list[str], list[str]]:
    """Files and folders that lie in a folder, but for hidden ones."""
    found = [entry for entry in inside(fs, folder) if not hidden(_last(entry["name"]))]
    files = [entry["name"] for entry in found if entry["type"] == "file"]
    return files, [entry["name"].rstrip("/") for entry in found if entry["type"] == "directory"]


def _archives(url: str, fs: Any, paths: Sequence[str], base: str) -> Source:
    """One or more tars in or below the folder `base`, of which the first tells what they are."""
    if not paths:
        raise DataError(f"{url}: no tars of such a name")
    first = address(fs, paths[0])
    with opened(first, **HEADERS) as file:
        head = list(islice(tar_members(file, first), HEAD))
        if head and head[0].name.endswith(".tar"):
            if len(paths) > 1:
                raise DataError(
                    f"{url}: {_last(first)} is a tar of tars, and there are {len(paths) - 1} more; "
                    "prepare them one by one"
                )
            return Source(url, "tar", tuple(_inner(first, file)))
    splits = [_split_of(path, base) for path in paths]
    if holds_samples(head):
        files = (Part(address(fs, p), split=s) for p, s in zip(paths, splits, strict=True))
        return Source(url, "webdataset", tuple(files))
    if len(paths) == 1:
        return Source(url, "tar", (Part(first),))
    if all(split_word(_last(path)) for path in paths) or _in_pieces(fs, paths, head):
        parts = (Part(address(fs, p), split=s) for p, s in zip(paths, splits, strict=True))
        return Source(url, "tar", tuple(parts))
    # ILSVRC's outer tar, unpacked: a tar for each class.
    several = len({path.rpartition("/")[0] for path in paths}) > 1
    parts = (
        Part(address(fs, p), label=stem(p), split=s if several else "")
        for p, s in zip(paths, splits, strict=True)
    )
    return Source(url, "tar", tuple(parts))


def _in_pieces(fs: Any, paths: Sequence[str], head: Sequence[Member]) -> bool:
    """Whether these are class folders in numbered pieces, such as photos-07.tar, and not classes:
    by their names, and by the folders that the first and the last of them begin with.
    """
    if len({stem(path).rstrip("0123456789") for path in paths}) > 1:
        return False
    if stem(paths[0]).rstrip("0123456789")[-1:] not in ("-", "_", "."):
        return False
    last = address(fs, paths[-1])
    with opened(last, **HEADERS) as file:
        both = [*head, *islice(tar_members(file, last), HEAD)]
    return len({member.name.rpartition("/")[0] for member in both}) > 1


def _inner(outer: str, file: Any) -> Iterator[Part]:
    for member in tar_members(file, outer):
        if not member.name.endswith(".tar"):
            raise DataError(f"{outer}: {member.name} among tars of classes; remove it")
        yield Part(outer, member.offset, member.length, label=stem(member.name))


def _parquet(url: str) -> Source:
    dataset = open_dataset(url)
    parts = []
    for split, shards in dataset.splits.items():
        row = 0
        for shard in shards:
            parts.append(Part(shard.path, row, shard.rows, split=split))
            row += shard.rows
    return Source(url, "parquet", tuple(parts), dataset)


def _parquet_rows(dataset: Dataset, part: Part) -> Iterator[tuple[Any, ...]]:
    with parquet(part.file) as file:
        labels = file.read(columns=[dataset.label]).column(dataset.label).to_pylist()
    for row, label in enumerate(labels):
        known = label is not None and 0 <= label < len(dataset.classes)
        name = f"{_last(part.file)} row {row}"
        told = dataset.classes[label] if known else None
        yield part.file, part.start + row, -1, -1, -1, name, told, part.split


def _listed(part: Part) -> Iterator[tuple[Any, ...]]:
    base = part.file.rpartition("/")[0]
    lines = _listed_parquet(part.file) if part.file.endswith(".parquet") else read_list(part.file)
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
    plain = partial(unquote, errors="surrogateescape") if "http" in fs.protocol else str
    for name, size in files_below(fs, path).items():
        inner = plain(name).removeprefix(plain(root)).strip("/")
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


def _paths(schema: Any) -> bool:
    at = list_columns(schema.names)
    kind = schema.field(at["path"]).type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _split_of(path: str, base: str) -> str:
    """By its name or the folder that it lies in, if that is below `base`."""
    return split_word("/".join(path.removeprefix(base).strip("/").split("/")[-2:]))


def _last(path: str) -> str:
    return path.rpartition("/")[2]
