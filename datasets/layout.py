"""What a data set is: splits of Parquet shards, as small values that travel to every worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from datasets import DataError
from datasets.storage import storage


@dataclass(frozen=True)
class Shard:
    """One Parquet file: a path or URL that `fsspec.open` takes, and the rows of its row groups."""

    path: str
    groups: tuple[int, ...]

    @property
    def name(self) -> str:
        """The file's name without its folders."""
        return self.path.rpartition("/")[2]

    @property
    def rows(self) -> int:
        """Rows in all row groups."""
        return sum(self.groups)

    def state(self) -> str:
        """The file as its store describes it: other if the file has changed since."""
        fs, path = storage(self.path)
        return f"{self.path} {sorted(fs.info(path).items())!r}"


@dataclass(frozen=True)
class Dataset:
    """What a folder of shards holds, as a small value that travels to every worker.

    `image` and `label` are names of columns, `classes` the labels' names in order, `size` the side
    in pixels of every image if all are square and alike, else None; `splits` has the shards of
    "train", "val", "test" and so on.
    """

    root: str
    image: str
    label: str
    classes: tuple[str, ...]
    size: int | None
    splits: Mapping[str, tuple[Shard, ...]]

    @property
    def held_out(self) -> str | None:
        """The split to evaluate on: "val", else "test", else None."""
        return next((split for split in ("val", "test") if split in self.splits), None)

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of `split`. Raises DataError if there is no such split."""
        if split not in self.splits:
            raise DataError(f"{self.root}: no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def far(self, split: str) -> bool:
        """Whether shards of `split` are in a store that takes its time to answer."""
        return any("://" in shard.path for shard in self.shards(split))

    def rows(self, split: str) -> int:
        """Rows of `split`."""
        return sum(shard.rows for shard in self.shards(split))

    def first(self, split: str, rows: int) -> Dataset:
        """The same with only the first row groups of `split`, enough for so many rows."""
        kept: list[Shard] = []
        for shard in self.shards(split):
            before = [rows - sum(shard.groups[:n]) for n in range(len(shard.groups))]
            groups = tuple(g for g, n in zip(shard.groups, before, strict=True) if n > 0)
            rows -= sum(groups)
            if groups:
                kept.append(replace(shard, groups=groups))
        return replace(self, splits={**self.splits, split: tuple(kept)})

    def place(self, split: str, row: int) -> str:
        """File and row there of a row of `split`, for messages."""
        for shard in self.shards(split):
            if row < shard.rows:
                return f"{shard.name} row {row}"
            row -= shard.rows
        raise IndexError(f"{split} has no such row")

    def groups(self, split: str) -> tuple[int, ...]:
        """Rows of each row group of `split`, in file order."""
        return tuple(rows for shard in self.shards(split) for rows in shard.groups)
