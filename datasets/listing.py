"""Labels as people write them down: lists of paths and labels, class folders, synset words."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import DataError
from datasets.foreign import LABELS, SPLITS
from datasets.images import is_image
from datasets.storage import opened

PATHS = (
    *("path", "file", "filename", "file_name", "filepath", "filepaths", "image_path", "img_path"),
    *("image", "img", "image_name", "name", "image_id", "id"),
)
CATEGORIES = (*LABELS, "category", "class_name", "label_name", "synset", "wnid")
SUBSETS = ("split", "subset", "set")
KAGGLE = {"imageid": "path", "predictionstring": "label"}
"""Columns of the validation list that Kaggle hands out; the label is the first word of it."""


def read_fields(url: str) -> Iterator[tuple[int, list[str]]]:
    """Line number (from 1) and fields of each line that is not empty.

    Fields are parted by tabs or commas if the first such line has one, else by white space. Raises
    DataError if the file is not text.
    """
    with opened(url, "r") as file:
        try:
            blank, first = 0, ""
            for first in file:
                if first.strip():
                    break
                blank += 1
            lines = (line for part in ([first], file) for line in part)
            parter = next((mark for mark in "\t," if mark in first), None)
            rows = (
                csv.reader(lines, delimiter=parter) if parter else (line.split() for line in lines)
            )
            for number, fields in enumerate(rows, 1 + blank):
                if any(fields):
                    yield number, [field.strip() for field in fields]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{url}: not a text file of columns ({error})") from None


def read_list(url: str) -> Iterator[tuple[str, str, str]]:
    """Path, label and split ("" if it has none) of each line of a list.

    The first line may name the columns; without names path and label are the first two. Raises
    DataError, naming the line, where one of them is missing.
    """
    at = {"path": 0, "label": 1}
    for place, (number, fields) in enumerate(read_fields(url)):
        if place == 0 and (named := list_columns(fields)):
            at = named
            continue
        if place == 0 and not is_image(fields[0]) and _names_columns(fields):
            raise DataError(
                f"{url} line {number}: names columns, but not both path and label; call them so"
            )
        try:
            path, label = fields[at["path"]], fields[at["label"]]
            split = fields[at["split"]] if "split" in at else ""
        except IndexError:
            raise DataError(f"{url} line {number}: {len(fields)} fields; path and label?") from None
        if not path or not label:
            raise DataError(f"{url} line {number}: an empty path or label; fill or remove it")
        yield path, label.split()[0] if "kaggle" in at else label, SPLITS.get(split.lower(), split)


def list_columns(names: Sequence[str]) -> dict[str, int]:
    """Where path, label and, if there is one, split stand among the columns; {} if two are not."""
    lower = [name.lower() for name in names]
    found: dict[str, int] = {}
    for field, known in (("path", PATHS), ("label", CATEGORIES), ("split", SUBSETS)):
        for name in known:
            if name in lower and lower.index(name) not in found.values():
                found[field] = lower.index(name)
                break
    if all(name in lower for name in KAGGLE):
        found = {KAGGLE[name]: lower.index(name) for name in KAGGLE} | {"kaggle": 0}
    return found if {"path", "label"} <= found.keys() else {}


def _names_columns(fields: Sequence[str]) -> bool:
    known = [field.lower() in (*PATHS, *CATEGORIES, *SUBSETS) for field in fields]
    return known[0] or sum(known) > 1  # one may be a label that is called so


def read_labels(url: str, synsets: Sequence[str]) -> dict[str, tuple[str, str]] | list[str]:
    """Labels of images that stand in no class folder, with their splits ("" for none): by the
    image's path, and by its name alone without ending where that tells one label (after */ if the
    file has it in folders); or, if the file has numbers alone, labels in the order of the images'
    names.

    Such numbers, as in ILSVRC's ground truth, count `synsets` from 1. Raises DataError, naming the
    line or path.
    """
    numbers: list[str] = []
    rows = list(read_fields(url))
    if all(len(fields) == 1 and fields[0].isdecimal() for _, fields in rows):
        if not synsets:
            raise DataError(
                f"{url}: numbers alone; name the synsets that they count by --synsets FILE"
            )
        for line, (number,) in rows:
            if not 1 <= int(number) <= len(synsets):
                raise DataError(f"{url} line {line}: {number}, outside 1 to {len(synsets)}")
            numbers.append(synsets[int(number) - 1])
        return numbers
    told: dict[str, tuple[str, str]] = {}
    agreed: dict[str, tuple[str, str] | None] = {}
    bare: set[str] = set()
    for given, label, split in read_list(url):
        path, found = plain_path(given), (label, split)
        if told.setdefault(path, found) != found:
            raise DataError(f"{url}: {path} is {told[path][0]!r} and {label!r}; remove a line")
        name = stem(path)
        agreed[name] = found if agreed.get(name, found) == found else None
        if "/" not in path:
            bare.add(name)
    short = {name if name in bare else f"*/{name}": one for name, one in agreed.items() if one}
    return short | told


def plain_path(path: str) -> str:
    """A path without what changes nothing at its beginning."""
    return path.removeprefix("./")


def read_words(url: str) -> dict[str, str]:
    """What each synset of a file like synset_words.txt means, in the file's order."""
    with opened(url, "r") as file:
        try:
            pairs = [(*line.split(None, 1), "")[:2] for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{url}: not a text file ({error})") from None
    return {key: words.strip() for key, words in pairs}


def by_folder(names: Sequence[str]) -> list[tuple[str, str]]:
    """Label and split ("" if folders name none) of images by their names, paths with folders.

    Folders that hold everything are passed over; then one called train, val or the like is a split,
    and the next is the class. Raises DataError for an image in no class folder.
    """
    folders = [[p for p in name.split("/")[:-1] if p not in ("", ".")] for name in names]
    folders = _without_common(folders)
    splits = [""] * len(names)
    named = _splits({f[0] for f in folders if f})
    # Not of a class that is called so: below it there are classes.
    parts = {named[f[0]] for f in folders if len(f) > 1 and f[0] in named}
    odd = next((f[0] for f in folders if f and f[0] not in named), "")
    if parts and odd:
        raise DataError(
            f"{odd}: a folder beside those of the splits ({', '.join(sorted(parts))}); move it "
            "away, or call it like a split"
        )
    # Not of classes that are called so: below one of them there are others.
    if all(f and f[0] in named for f in folders) and any(len(f) > 1 for f in folders):
        splits = [named[f[0]] for f in folders]
        # As seg_train/seg_train, which unpacking an archive into a folder of its name leaves.
        cut = 2 if all(f[1:2] == f[:1] and len(f) > 2 for f in folders) else 1
        folders = _without_common([f[cut:] for f in folders])
    for name, path in zip(names, folders, strict=True):
        if not path:
            raise DataError(
                f"{name}: in no class folder; say what images show by --labels FILE, or put them "
                "into a folder for each class"
            )
    return [(path[0], split) for path, split in zip(folders, splits, strict=True)]


def _splits(folders: set[str]) -> dict[str, str]:
    """The split that each of some folders is called; those without one are left out. Other words
    may stand beside it in all, as in seg_train and seg_test.
    """
    if called := {name: SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}:
        return called
    alike: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for name in folders:
        words = re.split(r"[-_. ]", name.lower())
        for word in set(words) & SPLITS.keys():
            alike[tuple(w for w in words if w != word)][name] = SPLITS[word]
    return next((found for found in alike.values() if len(set(found.values())) > 1), {})


def _without_common(folders: list[list[str]]) -> list[list[str]]:
    """Paths without the leading folders that all share, at least the last one left to each."""
    while folders and all(len(f) > 1 for f in folders) and len({f[0] for f in folders}) == 1:
        folders = [f[1:] for f in folders]
    return folders


def stem(name: str) -> str:
    """A path's last part without its ending."""
    last = name.rpartition("/")[2]
    return last.rpartition(".")[0] or last


def ordered(labels: Sequence[Any]) -> tuple[str, ...]:
    """Class names in order: by number if all are numbers, then from 0 to the greatest; else by
    name, as torchvision's ImageFolder has it.
    """
    names = {str(label) for label in labels}
    if names and all(name.isdecimal() and str(int(name)) == name for name in names):
        greatest = max(map(int, names))
        if greatest < 10 * len(names) + 100:
            return tuple(str(number) for number in range(greatest + 1))
    return tuple(sorted(names))
