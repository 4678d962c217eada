"""What a preparation is, and what of it lies in `SHARDS/.prepare` until it has ended.

Whoever makes a shard, on whatever machine and after whatever end, needs no more than that.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from datasets import DataError
from datasets.fetch import Entry, entries_of
from datasets.layout import Dataset
from datasets.scanning import plain
from datasets.shards import WORK, read_manifest
from datasets.statistics import Sums
from datasets.storage import matching, parquet, persistent, remove, storage, writable, write_whole


@dataclass(frozen=True)
class Options:
    """How images become rows. Raises ValueError, naming field, value and what is allowed.

    `size`: side in pixels; `quality`: of JPEG, 1 to 100; `keep`: store the images as they came;
    `holdout`: share of a source without splits that becomes "val"; `seed`: of order and split.
    """

    size: int = 256
    quality: int = 95
    keep: bool = False
    holdout: float = 0.05
    seed: int = 0
    on_error: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise ValueError(f"size is {self.size}: 1 to 4096")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}: 1 to 100")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is {self.holdout}: at least 0 and less than 1")


@dataclass(frozen=True)
class Preparation:
    """What was laid out; `shards` counts those of each split, `images` the images, `dataset` and
    `origin` (split to split of the source) are for a source that is Parquet.
    """

    url: str
    options: Options
    classes: tuple[str, ...]
    words: Mapping[str, str]
    shards: Mapping[str, int]
    images: Mapping[str, int]
    group_rows: int
    dataset: Dataset | None
    origin: Mapping[str, str]
    digest: str = ""

    def name(self, split: str, number: int) -> str:
        """A shard's file name."""
        return f"{split}-{number:05d}-of-{self.shards[split]:05d}.parquet"

    def bounds(self, split: str, number: int) -> tuple[int, int]:
        """Where a shard's entries begin and end in those of its split."""
        n, count = self.images[split], self.shards[split]
        return n * number // count, n * (number + 1) // count


@dataclass(frozen=True)
class Made:
    """One finished shard: the rows of its row groups, what was skipped and, as often, the reasons
    in short; sums if for training.
    """

    groups: tuple[int, ...]
    faults: tuple[str, ...]
    reasons: tuple[str, ...]
    sums: Sums | None


def keep(plan: Preparation, tables: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Keeps the plan for workers and for a later start, unless one that is the same lies there;
    `tables` are the entries of each split, `before` the manifest that is there.

    Raises DataError if something else lies there, or it cannot be written.
    """
    fs, root = storage(plan.url)
    made = (before or {}).get("prepared", {})
    for split in plan.shards:
        if before and split in before["splits"] and made.get(split) != plan.digest:
            raise DataError(
                f"{plan.url}: already holds a split {split!r}, prepared from something else or "
                "otherwise; remove it or name another folder"
            )
    if _is_of(plan, made):
        return
    kept = f"{root}/{WORK}/plan.json"
    try:
        begun = _begun(fs, kept)
        if begun == plan.digest:
            return
        if begun and begun not in made.values():  # of which a kill at the end may have left it
            raise DataError(
                f"{plan.url}: an unfinished preparation of something else lies there; finish it, "
                f"or remove {plan.url.rstrip('/')}/{WORK}"
            )
        if fs.exists(f"{root}/{WORK}"):  # of which nothing says whose it is
            remove(fs, f"{root}/{WORK}")
        else:  # or they may be of that
            _check_free(fs, root, plan, made)
        fs.makedirs(f"{root}/{WORK}", exist_ok=True)
        for split, table in tables.items():
            path = f"{root}/{WORK}/{split}.parquet"
            schema = plain(table.schema)  # each row group would hold a whole dictionary of files
            with writable(fs, path) as file, pq.ParquetWriter(file, schema) as writer:
                for number in range(plan.shards[split]):
                    start, stop = plan.bounds(split, number)
                    some = table.slice(start, stop - start).cast(schema)
                    writer.write_table(some, stop - start)
        write_whole(fs, kept, json.dumps({"digest": plan.digest}).encode())
    except OSError as error:
        raise DataError(f"{plan.url}: cannot be written: {error}; free or mend it") from None


def _check_free(fs: Any, root: str, plan: Preparation, made: Mapping[str, str]) -> None:
    """Raises DataError if a file that is nobody's shard lies where a shard would."""
    there = {path.rpartition("/")[2] for path in matching(fs, root, "*.parquet")}
    new = (split for split in plan.shards if split not in made)
    wanted = (plan.name(split, n) for split in new for n in range(plan.shards[split]))
    if taken := next((name for name in wanted if name in there), ""):
        raise DataError(
            f"{plan.url}: {taken} is there, and no data set of ours has it; move it away or name "
            "another folder"
        )


def complete(plan: Preparation) -> bool:
    """Whether the data set at `plan.url` already is what this plan makes; what a run that was
    killed at its end left beside it goes.
    """
    made = (read_manifest(plan.url) or {}).get("prepared", {})
    if not _is_of(plan, made):
        return False
    fs, root = storage(plan.url)
    if _begun(fs, f"{root}/{WORK}/plan.json") in made.values():
        remove(fs, f"{root}/{WORK}")
    return True


def _is_of(plan: Preparation, prepared: Mapping[str, str]) -> bool:
    return all(prepared.get(split) == plan.digest for split in plan.shards)


def finished(plan: Preparation, split: str, number: int) -> Made | None:
    """What is known of a shard that is complete; None if it has to be made."""
    fs, root = storage(plan.url)
    path = f"{root}/{WORK}/{split}-{number:05d}.npz"
    if not fs.exists(path) or not fs.exists(f"{root}/{plan.name(split, number)}"):
        return None
    try:
        with np.load(io.BytesIO(fs.cat_file(path))) as file:
            sums = None
            if "pixels" in file:
                sums = Sums(plan.options.size, int(file["images"]))
                sums.pixels, sums.moments = file["pixels"], file["moments"]
            faults, reasons = (tuple(json.loads(str(file[n]))) for n in ("faults", "reasons"))
            return Made(tuple(file["groups"].tolist()), faults, reasons, sums)
    except Exception:  # whatever a damaged file makes numpy raise: the shard is made again
        return None


def _begun(fs: Any, path: str) -> str:
    """The digest of the plan that is kept at `path`; "" if none is, or none that is whole."""
    try:
        return str(json.loads(fs.cat_file(path))["digest"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return ""


def kept_entries(plan: Preparation, split: str, number: int) -> list[Entry]:
    """The entries of a shard, in order."""
    url = f"{plan.url.rstrip('/')}/{WORK}/{split}.parquet"

    def read() -> list[Entry]:
        with parquet(url) as file:
            return entries_of(file.read_row_group(number))

    return persistent(url, read)


def save_made(plan: Preparation, split: str, number: int, made: Made) -> None:
    """Keeps what is known of a shard that is complete."""
    arrays: dict[str, Any] = {
        "groups": np.array(made.groups, np.int64),
        "faults": np.array(json.dumps(made.faults)),
        "reasons": np.array(json.dumps(made.reasons)),
    }
    if made.sums:
        arrays |= {name: getattr(made.sums, name) for name in ("images", "pixels", "moments")}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    fs, root = storage(plan.url)
    write_whole(fs, f"{root}/{WORK}/{split}-{number:05d}.npz", buffer.getvalue())
