"""Parquet that others made: which files are which split, which columns are image and label."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from datasets import DataError
from datasets.layout import Shard
from datasets.storage import parquet

T = TypeVar("T")

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Names of splits as others call them, and as we do."""

PARTIAL = "partial-"  # train, of which the hub has made only the first gigabytes Parquet
SHARD = r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$"  # the hub has a hash behind its numbers

MOST_CLASSES = 100_000  # by numbers in few rows; beyond, they are no classes' but something else's

IMAGES = ("image", "img", "jpg", "jpeg", "png", "picture", "photo")
LABELS = ("label", "labels", "fine_label", "cls", "class", "target", "y")


def split_word(path: str) -> str:
    """The split that a file's name begins with, else one of its folders, the nearest first, is
    called, else another word of its name; "" if none is.
    """
    *folders, name = path.lower().split("/")
    folders = [folder.removeprefix(PARTIAL) for folder in folders]
    first, *others = re.split(r"[-_.]", name)
    words = [first, *reversed(folders), *others]
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def split_files(root: str, paths: list[str]) -> dict[str, list[str]]:
    """The Parquet files below `root` by split, each split in the order of names.

    A file `train-*`, `*_train` or in a folder `train` belongs to "train"; all of them do if no name
    tells, and beside such a one `other-00000` or a folder `other` to "other".
    Raises DataError if files that names like `train-00000-of-00042` speak of are missing, or there
    are several data sets in folders of their own, as Hugging Face has configurations.
    """
    splits: dict[str, list[str]] = defaultdict(list)
    sets: dict[str, set[str]] = defaultdict(set)
    below = {path: path.removeprefix(root).strip("/") for path in sorted(paths)}
    told = any(map(split_word, below.values()))
    above = {
        folders[:at]
        for folders in (tuple(inner.split("/")[:-1]) for inner in below.values())
        for at, folder in enumerate(folders)
        if _is_split(folder)
    }
    for path, inner in below.items():
        *folders, name = inner.split("/")
        known = split_word(inner)
        numbered = re.match(r"(\w+)-\d+", name) if told else None
        beside = (f for at, f in enumerate(folders) if tuple(folders[:at]) in above)
        splits[known or (numbered[1] if numbered else next(beside, "train"))].append(path)
        if known:
            sets[known].add("/".join(takewhile(lambda f: not _is_split(f), folders)))
    for split, several in sets.items():
        if len(several) > 1:
            names = ", ".join(sorted(name or "its top" for name in several))
            raise DataError(f"{root}: several data sets have a {split} split ({names}); name one")
    for files in splits.values():
        _check_complete(root, files)
    return in_order(splits)


def _is_split(folder: str) -> bool:
    return folder.lower().removeprefix(PARTIAL) in SPLITS


def in_order(splits: Mapping[str, T]) -> dict[str, T]:
    """Training first, then validation, and a fixed order whatever the others are called."""
    order = sorted(splits, key=lambda split: (split != "train", split != "val", split))
    return {split: splits[split] for split in order}


def _check_complete(root: str, files: list[str]) -> None:
    counts = [re.search(SHARD, path) for path in files]
    totals = {int(match[2]) for match in counts if match}
    there = {int(match[1]) for match in counts if match}
    if len(totals) == 1 and all(counts) and len(there) < (total := totals.pop()):
        missing = next(number for number in range(total) if number not in there)
        stem = re.sub(SHARD, "", files[0])
        raise DataError(
            f"{root}: {len(there)} of {total} files are there, {stem}-{missing:05d}-of-"
            f"{total:05d}.parquet is not; fetch the rest, or rename these without '-of-'"
        )


def columns(path: str, schema: Any, labelled: bool = True) -> tuple[str, str, tuple[str, ...]]:
    """Names of the image and the label column, and of the classes: () if the schema has none.

    Raises DataError, saying which columns there are, if one of the two is not among them; unless
    `labelled`, a missing label column is "".
    """
    features = _features(schema)
    images = [field.name for field in schema if holds_images(field.type)]
    labels = [field.name for field in schema if pa.types.is_integer(field.type)]
    said = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    image = _first(said, IMAGES) or _first(images, IMAGES)
    said = [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in labels if name.lower() in LABELS]
    label = _first(said, LABELS) or _first(named, LABELS)
    there = ", ".join(f"{field.name}: {field.type}" for field in schema) or "none"
    if image is None:
        raise DataError(
            f"{path}: no column of encoded images (struct<bytes, path> or binary); it has {there}"
        )
    if label is None and labelled:
        raise DataError(
            f"{path}: no column of integer labels (ClassLabel, or called label); it has {there}"
        )
    return image, label or "", class_names(schema, label or "")


def class_names(schema: Any, label: str) -> tuple[str, ...]:
    """What a file's schema calls the classes of its label column; () if it does not."""
    names = _features(schema).get(label, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def check_columns(path: str, schema: Any, image: str, label: str) -> None:
    """Raises DataError if these columns of a file hold no images and labels; "" is no column."""
    for name in filter(None, (image, label)):
        if (count := schema.names.count(name)) > 1:
            raise DataError(f"{path}: {count} columns are called {name!r}; rename all but one")
    if not holds_images(kind := schema.field(image).type):
        raise DataError(f"{path}: {image!r} is {kind}, no encoded images")
    if label and not pa.types.is_integer(kind := schema.field(label).type):
        raise DataError(f"{path}: {label!r} is {kind}, no integer")


def numbered_classes(shards: list[Shard], label: str) -> tuple[str, ...]:
    """Classes "0" to the greatest label, for which the label column is read.

    Raises DataError if there is no label at all, or if they are too great to be classes.
    """
    greatest, rows = -1, sum(shard.rows for shard in shards)
    for shard in shards:
        with parquet(shard.path) as file:
            found = pc.max(file.read(columns=[label]).column(label)).as_py()
        greatest = max(greatest, -1 if found is None else found)
    if greatest < 0:
        raise DataError(f"{shards[0].path}: {label!r} holds no label of 0 or more; add labels")
    if greatest >= max(MOST_CLASSES, 10 * rows):
        raise DataError(
            f"{shards[0].path}: {label!r} is up to {greatest} in {rows} rows, no classes' number; "
            "number those from 0"
        )
    return tuple(str(number) for number in range(greatest + 1))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The Hugging Face features in the schema's metadata, {} if there are none."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        features = metadata["info"]["features"].items()
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return {name: value for name, value in features if isinstance(value, dict)}


def holds_images(kind: Any) -> bool:
    """Whether a column of this type may be of encoded images."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        kind = kind.field(at).type if at >= 0 else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _first(names: list[str], preferred: tuple[str, ...]) -> str | None:
    """The name that comes first in `preferred`; the first of all if none is there."""
    chosen = [name for want in preferred for name in names if name.lower() == want]
    return next(iter(chosen + names), None)
