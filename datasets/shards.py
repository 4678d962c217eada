"""Folders of Parquet shards: opened, ours or any of Hugging Face's, and written.

A row of ours is `image: struct<bytes: binary, path: string>` and `label: int64`, which any Hugging
Face tool opens; `dataset.json` beside the shards is written last and says what belongs to it.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datasets import DataError
from datasets.foreign import check_columns, class_names, columns, numbered_classes, split_files
from datasets.layout import Dataset, Shard
from datasets.statistics import STATISTICS
from datasets.storage import (
    address,
    existing,
    files_below,
    hidden,
    matching,
    parquet,
    persistent,
    said,
    storage,
    writable,
    write_whole,
)

FORMAT = 1
"""Version of `dataset.json`."""

MANIFEST = "dataset.json"

LARGEST = 1 << 14  # side in pixels that images may be brought to

DEEP = 4  # levels of folders, its own the first, in which a data set's files are looked for
WORK = ".prepare"
"""Folder in which `towers prepare` keeps what it needs until it has ended."""

Encoded = tuple[bytes, str, int]
"""An encoded image, its name and its label."""


def open_dataset(url: str, *, check: bool = True, labelled: bool = True) -> Dataset:
    """The data set at `url`: a folder of ours, a Hugging Face folder, or one Parquet file.

    Reads the manifest, if there is one, and the files' footers; the label column only if nothing
    names the classes. Unless it has to be `labelled`, others' shards may lack labels, and then have
    no classes. Raises DataError if nothing is there, a file is not Parquet, image or label column
    is missing, or manifest and files disagree (unless `check` is off).
    """
    fs, root = existing(url)
    place = address(fs, root)
    if fs.isfile(root):
        return _foreign(place, {"train": [place]}, labelled)
    if fs.isfile(f"{root}/{MANIFEST}"):
        dataset = _ours(place, fs.cat_file(f"{root}/{MANIFEST}"))
        if check:
            _check_footers(dataset)
        return dataset
    if fs.exists(f"{root}/{WORK}"):
        raise DataError(f"{url}: its preparation has not ended; run `towers prepare` again")
    found = [path for path in files_below(fs, root, DEEP) if path.endswith(".parquet")]
    found = [path for path in found if not hidden(path.removeprefix(root))]
    if not found:
        raise DataError(f"{url}: no Parquet files there; `towers prepare` makes them of images")
    splits = split_files(root, found)
    files = {split: [address(fs, path) for path in found] for split, found in splits.items()}
    return _foreign(place, files, labelled)


def write_split(
    url: str,
    split: str,
    records: Iterable[Encoded],
    classes: Sequence[str],
    *,
    rows_per_group: int = 64,
    shard_bytes: int = 256 << 20,
) -> tuple[Shard, ...]:
    """Write `records` (encoded image, its name, label) as the shards of `split` in folder `url`.

    A shard ends once it has `shard_bytes` of images. The files get their names when all are
    complete. An older `split` goes, and so do the manifest (`write_manifest` comes last) and, with
    "train", the statistics. Raises DataError if there are no records or a label is none of the
    classes.
    """
    fs, root = storage(url)
    fs.makedirs(root, exist_ok=True)
    for stale in (MANIFEST, *([STATISTICS] if split == "train" else [])):
        if fs.exists(f"{root}/{stale}"):
            fs.rm_file(f"{root}/{stale}")
    partials: list[tuple[str, tuple[int, ...]]] = []
    groups = row_groups(records, split, classes, rows_per_group)
    try:
        for first in groups:
            partial = f"{root}/.{split}-{uuid.uuid4().hex}.partial"
            partials.append((partial, ()))
            with writable(fs, partial) as file:
                sizes = tuple(write_shard(file, classes, chain([first], groups), shard_bytes))
            partials[-1] = (partial, sizes)
    except BaseException:
        for partial, _ in partials:
            if fs.exists(partial):
                fs.rm_file(partial)
        raise
    if not partials:
        raise DataError(f"{url}: no image for split {split!r}; is the source empty?")
    for old in matching(fs, root, f"{split}-*-of-*.parquet"):
        fs.rm_file(old)
    shards = []
    for number, (partial, rows) in enumerate(partials):
        path = f"{root}/{split}-{number:05d}-of-{len(partials):05d}.parquet"
        fs.mv(partial, path)
        shards.append(Shard(address(fs, path), rows))
    return tuple(shards)


def write_manifest(
    url: str,
    splits: Mapping[str, Sequence[Shard]],
    classes: Sequence[str],
    *,
    size: int | None = None,
    skipped: Mapping[str, int] | None = None,
    words: Mapping[str, str] | None = None,
    prepared: Mapping[str, str] | None = None,
) -> None:
    """Write `dataset.json`: what belongs to the data set, and how often what was skipped, why.

    `words` say what classes mean whose names don't; `prepared` which preparation made each split.
    """
    manifest = {
        "format": FORMAT,
        "image": "image",
        "label": "label",
        "size": size,
        "rows": {split: sum(s.rows for s in shards) for split, shards in splits.items()},
        "skipped": dict(skipped or {}),
        "classes": list(classes),
        "words": dict(words or {}),
        "prepared": dict(prepared or {}),
        "splits": {
            split: [{"file": s.name, "rows": s.rows, "groups": list(s.groups)} for s in shards]
            for split, shards in splits.items()
        },
    }
    fs, root = storage(url)
    write_whole(fs, f"{root}/{MANIFEST}", (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(url: str) -> dict[str, Any] | None:
    """`dataset.json` of the folder `url` as it stands there; None if there is none.

    Raises DataError if it is something else.
    """
    fs, root = storage(url)
    try:  # `exists` is False on some stores whatever failed
        return _parsed(url, persistent(url, lambda: fs.cat_file(f"{root}/{MANIFEST}")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise DataError(f"{url}: may not be read ({said(error)}); check its permissions") from None


def _parsed(url: str, text: bytes) -> dict[str, Any]:
    """The manifest that a text is. Raises DataError if it is something else."""
    place = f"{url.rstrip('/')}/{MANIFEST}"
    try:
        manifest = json.loads(text)
        if (version := manifest["format"]) != FORMAT:
            raise DataError(f"{place}: format {version!r}; this version reads {FORMAT}")
        for name in ("splits", "rows", "skipped", "words", "prepared"):
            if not isinstance(manifest.setdefault(name, {}), dict):
                raise TypeError(f"{name} is no table")
        for name in ("rows", "skipped"):
            _numbers(manifest[name].values())
        names, words, size = manifest["classes"], manifest["words"], manifest["size"]
        if not isinstance(names, list) or not _texts([*names, *words.values()]):
            raise TypeError("classes and words are no names")
        if size is not None and not 1 <= _numbers([size])[0] <= LARGEST:
            raise ValueError(f"size is {size}")
        if not _texts([manifest["image"], manifest["label"]]):
            raise TypeError("image and label are no names of columns")
        for file in chain(*manifest["splits"].values()):
            _numbers(file["groups"])
            if not _texts([file["file"]]):
                raise TypeError(f"{file['file']!r} is no file's name")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{place}: not a manifest ({error!r}); prepare the data set again, or remove it"
        ) from error
    return manifest


def row_groups(
    records: Iterable[Encoded], split: str, classes: Sequence[str], rows: int
) -> Iterator[list[Encoded]]:
    """The records in groups of `rows`. Raises DataError for a label that is none of the classes."""
    left = iter(records)
    while group := list(islice(left, rows)):
        for _, name, label in group:
            if not 0 <= label < len(classes):
                raise DataError(
                    f"{split} {name}: label is {label}, outside 0 to {len(classes) - 1}"
                )
        yield group


def write_shard(
    file: Any, classes: Sequence[str], groups: Iterable[list[Encoded]], limit: float = math.inf
) -> Iterator[int]:
    """Write one Parquet file of those groups, up to `limit` bytes of images; yields the rows of
    each group once it is written.
    """
    schema, size = _schema(classes), 0
    # Encoded images neither compress nor repeat, and their least and greatest say nothing.
    with pq.ParquetWriter(
        file, schema, compression="none", use_dictionary=["label"], write_statistics=["label"]
    ) as writer:
        for group in groups:
            images = [{"bytes": data, "path": name} for data, name, _ in group]
            labels = [label for _, _, label in group]
            writer.write_table(pa.table({"image": images, "label": labels}, schema=schema))
            size += sum(len(data) for data, _, _ in group)
            yield len(group)
            if size >= limit:
                return


def _schema(classes: Sequence[str]) -> Any:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
    }
    fields = [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("label", pa.int64()),
    ]
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def read_shard(path: str) -> tuple[Shard, Any]:
    """A file's shard and schema, as its footer has them."""
    with parquet(path) as file:
        meta = file.metadata
        groups = (meta.row_group(i).num_rows for i in range(meta.num_row_groups))
        return Shard(path, tuple(groups)), file.schema_arrow


def _footers(paths: Sequence[str]) -> list[tuple[Shard, Any]]:
    """Each file's shard and schema. Far away footers take long, so many are asked for at once."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda path: persistent(path, lambda: read_shard(path)), paths))


def _foreign(root: str, files: dict[str, list[str]], labelled: bool) -> Dataset:
    paths = [path for split in files.values() for path in split]
    read = _footers(paths)
    image, label, classes = columns(paths[0], read[0][1], labelled)
    for shard, schema in read:
        for name in (image, label) if labelled else (image,):
            if name not in schema.names:
                there = ", ".join(schema.names)
                raise DataError(
                    f"{shard.path}: no column {name!r} as in {paths[0]}; it has {there}"
                )
        check_columns(shard.path, schema, image, label if labelled else "")
        names = class_names(schema, label) if labelled else ()
        if names and names != (classes := classes or names):
            raise DataError(
                f"{shard.path}: {label!r} has other classes than in {paths[0]}; encode them alike"
            )
    shards = {shard.path: shard for shard, _ in read}
    splits = {split: tuple(shards[path] for path in found) for split, found in files.items()}
    if labelled and not classes:
        classes = numbered_classes([shard for shard, _ in read], label)
    return Dataset(root, image, label, classes, None, splits)


def _ours(root: str, text: bytes) -> Dataset:
    manifest = _parsed(root, text)
    splits = {
        split: tuple(Shard(f"{root}/{f['file']}", tuple(f["groups"])) for f in files)
        for split, files in manifest["splits"].items()
    }
    names = ("image", "label", "classes", "size")
    image, label, classes, size = (manifest[name] for name in names)
    return Dataset(root, image, label, tuple(classes), size, splits)


def _texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _numbers(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise TypeError(f"{values!r} are no integers")
    return tuple(values)


def _check_footers(dataset: Dataset) -> None:
    shards = [shard for split in dataset.splits.values() for shard in split]
    for shard, found in zip(shards, _footers([s.path for s in shards]), strict=True):
        check_footer(dataset, shard, *found)


def check_footer(dataset: Dataset, shard: Shard, found: Shard, schema: Any) -> None:
    """Raises DataError if a file's row groups or columns are others than the manifest says."""
    for name in (dataset.image, dataset.label):
        if name not in schema.names:
            raise DataError(
                f"{shard.path}: no column {name!r} as by {MANIFEST}; prepare the data set again"
            )
    check_columns(shard.path, schema, dataset.image, dataset.label)
    if found.groups != shard.groups:
        raise DataError(
            f"{shard.path}: {found.rows} rows in {len(found.groups)} row groups, "
            f"{shard.rows} in {len(shard.groups)} by {MANIFEST}; prepare the data set again"
        )
