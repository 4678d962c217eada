"""Whether a data set is what it says: every row read, every image decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets import DataError
from datasets.images import decode
from datasets.layout import Dataset
from datasets.rows import Rows
from datasets.shards import MANIFEST, check_footer, read_shard
from datasets.statistics import STATISTICS, Statistics, Sums
from datasets.storage import matching, passing, persistent, storage

NEAR = 4.0  # grey levels that statistics may be off: they are taken before JPEG rounds


@dataclass(frozen=True)
class Checked:
    """What was found in a row group of `split`, or with a whole shard.

    `contents` uint64 [n] are hashes of the pixels, `labels` int64 [n] the labels of those `rows`
    (int64 [n], within the split) that are good; `sums` come with a training shard's last part.
    """

    split: str
    rows: NDArray[np.int64]
    contents: NDArray[np.uint64]
    labels: NDArray[np.int64]
    faults: tuple[str, ...]
    sums: Sums | None = None


def check_shard(dataset: Dataset, item: tuple[str, int]) -> Iterator[Checked]:
    """Reads a shard, `item` is its split and number; yields what each row group is like."""
    split, number = item
    shards = dataset.shards(split)
    shard, row = shards[number], sum(s.rows for s in shards[:number])
    rows = Rows(dataset, split, cache_groups=1)
    sums = Sums(dataset.size) if split == "train" and dataset.size else None
    try:
        found = persistent(shard.path, lambda: read_shard(shard.path))
        check_footer(dataset, shard, *found)
    except DataError as error:
        yield _checked(split, [], (str(error),), sums)
        return
    for count in shard.groups:
        try:
            yield _check_rows(dataset, split, rows, np.arange(row, row + count), sums)
        except DataError as error:
            yield _checked(split, [], (str(error),), None)
            if error.__cause__ and passing(error.__cause__):
                break  # a store that does not answer
        row += count
    yield _checked(split, [], (), sums)


def _check_rows(
    dataset: Dataset, split: str, rows: Rows, wanted: NDArray[np.int64], sums: Sums | None
) -> Checked:
    faults: list[str] = []
    good: list[tuple[int, int, int]] = []
    for record in rows.read(wanted, faults):
        try:
            pixels = decode(record.image, record.place)
            height, width = pixels.shape[:2]
            if dataset.size and (height, width) != (dataset.size, dataset.size):
                raise DataError(
                    f"{record.place}: the image is {width}x{height}, and {dataset.size} pixels "
                    f"each way by {MANIFEST}; prepare the data set again"
                )
        except DataError as error:
            faults.append(str(error))
            continue
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=8, salt=b"%dx%d" % (height, width))
        good.append((record.row, int.from_bytes(digest.digest(), "little"), record.label))
        if sums:
            sums.add(pixels)
    return _checked(split, good, tuple(faults), None)


def _checked(
    split: str, good: list[tuple[int, int, int]], faults: tuple[str, ...], sums: Sums | None
) -> Checked:
    rows, contents, labels = zip(*good, strict=True) if good else ((), (), ())
    return Checked(
        split,
        np.array(rows, np.int64),
        np.array(contents, np.uint64),
        np.array(labels, np.int64),
        faults,
        sums,
    )


class Findings:
    """What was found so far: `add` each part, then `judge` the whole."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.parts: dict[str, list[Checked]] = {split: [] for split in dataset.splits}
        self.sums = Sums(dataset.size) if dataset.size else None
        self.faults = 0

    def add(self, part: Checked) -> None:
        """Takes in a part; its sums and faults are added up, not kept."""
        self.faults += len(part.faults)
        if self.sums and part.sums:
            self.sums.merge(part.sums)
        self.parts[part.split].append(replace(part, faults=(), sums=None))

    def judge(self) -> tuple[list[str], list[str]]:
        """What is wrong with the whole that no row shows, and what is worth knowing.

        Wrong: an image in two splits, files that the manifest does not name, statistics of other
        images. Worth knowing: duplicates inside a split, classes without images.
        """
        dataset, faults, notes = self.dataset, list(_strays(self.dataset)), []
        contents = {s: _joined([c.contents for c in self.parts[s]]) for s in dataset.splits}
        rows = {s: _joined([c.rows for c in self.parts[s]]) for s in dataset.splits}
        for one, other in combinations(dataset.splits, 2):
            if not len(contents[one]):
                continue
            values, first = np.unique(contents[one], return_index=True)
            at = np.searchsorted(values, contents[other])
            for j in np.flatnonzero(values.take(at, mode="clip") == contents[other]).tolist():
                faults.append(
                    f"{dataset.place(other, int(rows[other][j]))}: the image is also in "
                    f"{dataset.place(one, int(rows[one][first[at[j]]]))}; remove one"
                )
        for split, hashes in contents.items():
            if twice := int((np.unique(hashes, return_counts=True)[1] > 1).sum()):
                notes.append(f"{split}: {twice} image(s) are there more than once")
        seen = np.unique(_joined([c.labels for c in self.parts.get("train", [])]))
        if lacking := len(dataset.classes) - len(seen):
            notes.append(f"train: {lacking} of {len(dataset.classes)} classes have no image")
        faults += _statistics(dataset, self.sums)
        return faults, notes


def _strays(dataset: Dataset) -> Iterator[str]:
    """Shards that the manifest does not name."""
    fs, root = storage(dataset.root)
    if not fs.exists(f"{root}/{MANIFEST}"):
        return
    named = {shard.name for shards in dataset.splits.values() for shard in shards}
    for path in matching(fs, root, "*.parquet"):
        if (name := path.rpartition("/")[2]) not in named:
            yield f"{name}: not in {MANIFEST}; remove it or prepare the data set again"


def _statistics(dataset: Dataset, sums: Sums | None) -> Iterator[str]:
    """Whether the statistics beside the shards are those of the training images."""
    fs, root = storage(dataset.root)
    url = f"{dataset.root}/{STATISTICS}"
    # Where rows are bad, what is left has other statistics.
    if (
        not sums
        or not sums.images
        or sums.images < dataset.rows("train")
        or not fs.exists(f"{root}/{STATISTICS}")
    ):
        return
    try:
        kept, true = Statistics.load(url), sums.finish()
    except DataError as error:
        yield str(error)
        return
    same = kept.images == true.images and kept.mean_image.shape == true.mean_image.shape
    if not same or np.abs(kept.mean_image - true.mean_image).mean() > NEAR:
        yield f"{url}: of {kept.images} other images; prepare the data set again"


def _joined(parts: list[Any]) -> Any:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
