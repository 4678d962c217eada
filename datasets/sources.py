"""What people have labelled images in, found by what lies at a URL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import pyarrow as pa

from datasets import DataError
from datasets.archives import HEADERS, Member, tar_members
from datasets.foreign import SPLITS, holds_images, split_word
from datasets.images import is_image
from datasets.layout import Dataset
from datasets.listing import list_columns, stem
from datasets.shards import DEEP, open_dataset
from datasets.storage import (
    address,
    existing,
    hidden,
    inside,
    opened,
    parquet,
    persistent,
    storage,
)
from datasets.webdataset import holds_samples

Kind = Literal["files", "list", "tar", "webdataset", "zip", "parquet"]

HEAD = 64  # members of a tar that tell what it is


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


def _paths(schema: Any) -> bool:
    at = list_columns(schema.names)
    kind = schema.field(at["path"]).type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _split_of(path: str, base: str) -> str:
    """By its name or the folder that it lies in, if that is below `base`."""
    return split_word("/".join(path.removeprefix(base).strip("/").split("/")[-2:]))


def _last(path: str) -> str:
    return path.rpartition("/")[2]
