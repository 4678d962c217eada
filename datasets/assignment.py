"""Which class, which split and which place each image of a source has: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets import DataError
from datasets.layout import Dataset
from datasets.listing import by_folder, ordered, plain_path, stem
from datasets.plan import WINDOW, Plan
from datasets.randomness import stream
from datasets.rows import Rows
from datasets.sources import Source
from datasets.storage import persistent, storage

WINDOW_BYTES = Rows.cache_bytes // 2
"""Of Parquet, within which rows are shuffled, at most."""


def hold_out(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Which of the images, by their labels (int64 [n]), make the validation split: bool [n].

    The same share of each class to within one image, and never the only image of one.
    """
    order = stream("holdout", seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    ends = np.floor(share * np.cumsum(counts) + 0.5).astype(np.int64)
    take = np.minimum(np.diff(ends, prepend=0), np.maximum(counts - 1, 0))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(labels), bool)
    chosen[order] = rank < np.repeat(take, counts)
    return chosen


def labels_of(
    source: Source, entries: Any, labels: Mapping[str, tuple[str, str]] | Sequence[str] | None
) -> tuple[list[str | None], list[str]]:
    """Each image's class name, None if it has none, and its split, "" if the source has none."""
    names: list[str] = entries["name"].to_pylist()
    given: list[str] = entries["split"].to_pylist()
    if labels is not None and not isinstance(labels, Mapping):
        if len(labels) != len(names):
            raise DataError(f"{source.url}: {len(names)} images, and {len(labels)} labels")
        places = list(range(len(names)))
        if not source.dataset:  # whose rows have an order of their own
            places.sort(key=names.__getitem__)
        by_place = dict(zip(places, labels, strict=True))
        return [by_place[i] for i in range(len(names))], given
    if labels is not None:
        counts = Counter(map(stem, names))
        found = [_told(labels, name, counts[stem(name)] == 1) for name in names]
        if source.dataset and any(split for _, split in found):
            raise DataError(f"{source.url}: Parquet has its own splits; leave the column out")
        splits = [split or own for (_, split), own in zip(found, given, strict=True)]
        return [label for label, _ in found], splits
    known: list[str | None] = entries["label"].to_pylist()
    if source.kind in ("files", "tar", "zip") and None in known:
        pairs = by_folder(names)
        splits = [pair[1] or own for pair, own in zip(pairs, given, strict=True)]
        return [pair[0] for pair in pairs], splits
    if source.kind == "list":
        told: dict[str, str | None] = {}
        for name, label in zip(names, known, strict=True):
            if told.setdefault(name, label) != label:
                raise DataError(
                    f"{source.url}: {name} is {told[name]!r} and {label!r}; remove a line"
                )
    return known, given


def _told(labels: Mapping[str, tuple[str, str]], name: str, only: bool) -> tuple[str, str]:
    """What `read_labels` has for an image, the only one with its name, or one of several."""
    short = stem(name)
    found = labels.get(plain_path(name)) or labels.get(short)
    found = found or (labels.get(f"*/{short}") if only else None)
    if not found:
        raise DataError(
            f"{name}: the list of labels has no such path, nor one label for its name alone"
        )
    return found


def classes_of(
    source: Source, names: list[str | None], before: dict[str, Any] | None, split: str | None
) -> tuple[str, ...]:
    if before and split:
        return tuple(before["classes"])
    if source.dataset:
        return source.dataset.classes
    return ordered([name for name in names if name is not None])


def codes_of(
    source: Source, names: list[str | None], classes: tuple[str, ...]
) -> NDArray[np.int64]:
    """Class numbers, -1 for none. A number counts the classes from 0 if none is called by one."""
    known = {name: number for number, name in enumerate(classes)}
    numbered = any(map(str.isdecimal, classes))  # then a number is a name, and no other class's
    for name in sorted({name for name in names if name is not None and name not in known}):
        if numbered or not (name.isdecimal() and int(name) < len(classes)):
            raise DataError(
                f"{source.url}: class {name!r} is none of the {len(classes)} that are there already"
            )
        known[name] = int(name)
    return np.array([-1 if name is None else known[name] for name in names], np.int64)


def splits_of(
    given: list[str], codes: NDArray[np.int64], split: str | None, share: float, seed: int
) -> dict[str, NDArray[np.int64]]:
    """The entries of each split, in order.

    With `split`, the source's split of that name alone, or, if it has none, all of it under that
    name. A source without splits is held out from. Raises DataError if it has others.
    """
    everything = np.arange(len(codes))
    told = any(name != "train" for name in given if name)
    given = [name or "train" for name in given]
    names = sorted(set(given))
    if split and len(names) == 1:
        return {split: everything}
    if split:
        if split not in names:
            raise DataError(f"split is {split!r}: the source has {', '.join(names)}")
        return {split: everything[np.array(given) == split]}
    if not told:
        labelled = np.flatnonzero(codes >= 0)
        chosen = np.zeros(len(codes), bool)
        chosen[labelled] = hold_out(codes[labelled], share, seed)
        parts = {"train": everything[~chosen], "val": everything[chosen]}
        return {name: rows for name, rows in parts.items() if len(rows)}
    return {name: everything[np.array(given) == name] for name in names}


def order_of(
    rows: NDArray[np.int64], split: str, source: Source, seed: int, entries: Any
) -> NDArray[np.int64]:
    """The entries of a split, shuffled. Rows of Parquet cannot be fetched one by one, so there row
    groups are permuted and rows within windows of them, as in an epoch's plan.
    """
    if not source.dataset:
        return rows[stream("prepare", seed, split).permutation(len(rows))]
    given = np.array(entries["split"].to_pylist())[rows]
    numbers = np.array(entries["offset"].to_pylist())[rows]
    ordered_rows = []
    for part in sorted(set(given.tolist())):
        groups = source.dataset.groups(part or "train")
        window = _window(source.dataset, part or "train")
        plan = Plan(groups, sum(groups), seed=seed, epoch=0, window=window)
        place = np.full(sum(groups), -1)
        place[numbers[given == part]] = rows[given == part]
        drawn = place[plan.batch_rows(0)]
        ordered_rows.append(drawn[drawn >= 0])
    return np.concatenate(ordered_rows)


def _window(dataset: Dataset, split: str) -> int:
    """Rows of a window: as in an epoch, but no more than a reader keeps by the sizes of some files,
    so that it reads each row group once.
    """
    some = dataset.shards(split)[:8]
    rows, places = sum(shard.rows for shard in some), [storage(shard.path) for shard in some]
    size = persistent(dataset.root, lambda: sum(fs.size(path) or 0 for fs, path in places))
    return max(1, min(WINDOW, WINDOW_BYTES * rows // max(size, 1)))
