"""A source's images into shards: which go into which, and the making of one.

`lay_out` decides everything and keeps it in `SHARDS/.prepare`; `make_shard` depends on that alone,
so any number of workers in any order make the same bytes, and what a killed run has made stays.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datasets import DataError
from datasets.assignment import classes_of, codes_of, labels_of, order_of, splits_of
from datasets.fetch import Entry, entries_of, fetch
from datasets.foreign import in_order
from datasets.images import decode, standard
from datasets.layout import (
    Dataset,
    Shard,
    parquet,
    persistent,
    storage,
    whole,
    write_whole,
)
from datasets.shards import WORK, Encoded, read_manifest, row_groups, write_manifest, write_shard
from datasets.sources import Source, plain
from datasets.statistics import Sums

SHARD_BYTES = 256 << 20
GROUP_BYTES = 2 << 20  # of images in a row group: what the stream reads at once
GROUP_ROWS = (64, 256)
LEAST_SHARDS = 8  # if there are rows for so many, so that several workers share a small source
SAMPLE = 64  # images that tell how large they become


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
    """One finished shard: the rows of its row groups, what was skipped, sums if for training."""

    groups: tuple[int, ...]
    faults: tuple[str, ...]
    sums: Sums | None


def lay_out(
    url: str,
    source: Source,
    entries: Any,
    options: Options,
    *,
    split: str | None = None,
    labels: Mapping[str, str] | Sequence[str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Preparation:
    """Decides for each entry (a table of `sources.ENTRIES`) its label, split and shard.

    `split` takes all of the source as one split, beside those that `url` already has. Raises
    DataError if images have no label, or what lies at `url` is something else.
    """
    if not len(entries):
        raise DataError(f"{source.url}: no images there")
    names, given = labels_of(source, entries, labels)
    before = read_manifest(url)
    classes = classes_of(source, names, before, split)
    codes = codes_of(source, names, classes)
    splits = splits_of(given, codes, split, options.holdout, options.seed)
    if before and split is None:
        taken = [s for s in before["splits"] if s not in splits]
        if taken:
            raise DataError(f"{url}: holds {', '.join(taken)} already; name another folder")
    orders = {s: order_of(rows, s, source, options.seed, entries) for s, rows in splits.items()}
    origin = {s: entries["split"][int(rows[0])].as_py() for s, rows in orders.items()}
    known = {c: w for c, w in (words or (before or {}).get("words") or {}).items() if c in classes}
    counts = {s: len(rows) for s, rows in orders.items()}
    plan = Preparation(url, options, classes, known, {}, counts, 0, source.dataset, origin)
    table = entries.drop_columns(["label", "split"]).append_column("label", pa.array(codes))
    size = _mean_bytes(plan, table, orders)
    least, most = GROUP_ROWS
    group_rows = int(min(most, max(least, GROUP_BYTES // size)))
    shards = {
        s: max(-(-n * size // SHARD_BYTES), min(LEAST_SHARDS, n // group_rows), 1)
        for s, n in counts.items()
    }
    plan = replace(plan, shards=shards, group_rows=group_rows)
    tables = {s: table.take(pa.array(rows)).combine_chunks() for s, rows in orders.items()}
    plan = replace(plan, digest=_digest(plan, tables))
    _keep(plan, tables, before)
    return plan


def make_shard(plan: Preparation, split: str, number: int) -> Iterator[int]:
    """Makes one shard; yields how many of its images are done, now and then.

    Raises DataError, naming the image, for a bad one (unless those are skipped), and for storage
    that cannot be written: then nothing is left of it.
    """
    fs, root = storage(plan.url)
    entries = _entries(plan, split, number)
    options = plan.options
    sums = Sums(options.size) if split == "train" else None
    faults: list[str] = []
    done = 0

    def records() -> Iterator[Encoded]:
        nonlocal done
        for entry, data in zip(
            entries, fetch(entries, plan.dataset, plan.origin[split]), strict=True
        ):
            done += 1
            try:
                if isinstance(data, str):
                    raise DataError(data)
                if entry.label < 0:
                    raise DataError(f"{entry.name}: has no label of the classes; label it")
                stored, pixels = _image(data, entry.name, options)
            except DataError as error:
                if options.on_error == "fail":
                    raise
                faults.append(str(error))
                continue
            if sums:
                sums.add(pixels)
            yield stored, entry.name.rpartition("/")[2], entry.label

    groups: list[int] = []
    try:
        with whole(fs, f"{root}/{plan.name(split, number)}", f"{root}/{WORK}") as file:
            rows = row_groups(records(), split, plan.classes, plan.group_rows)
            for count in write_shard(file, plan.classes, rows):
                groups.append(count)
                yield done
        _save_made(plan, split, number, Made(tuple(groups), tuple(faults), sums))
    except OSError as error:
        raise DataError(f"{plan.url}: cannot be written: {error}; free or mend it") from None
    yield len(entries)


def complete(plan: Preparation) -> bool:
    """Whether the data set at `plan.url` already is what this plan makes."""
    return _is_of(plan, (read_manifest(plan.url) or {}).get("prepared", {}))


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
            faults = tuple(json.loads(str(file["faults"])))
            return Made(tuple(file["groups"].tolist()), faults, sums)
    except Exception:  # whatever a damaged file makes numpy raise: the shard is made again
        return None


def finish(plan: Preparation) -> dict[str, Any]:
    """Writes statistics and manifest once all shards are complete; returns the manifest."""
    fs, root = storage(plan.url)
    before = read_manifest(plan.url) or {}
    splits: dict[str, list[Shard]] = {
        split: [Shard(f"{root}/{f['file']}", tuple(f["groups"])) for f in files]
        for split, files in before.get("splits", {}).items()
    }
    skipped: dict[str, int] = dict(before.get("skipped", {}))
    total = Sums(plan.options.size)
    for split, count in plan.shards.items():
        splits[split] = []
        for number in range(count):
            made = finished(plan, split, number)
            if made is None:
                raise DataError(f"{plan.url}: {plan.name(split, number)} is gone; prepare again")
            splits[split].append(Shard(f"{root}/{plan.name(split, number)}", made.groups))
            for fault in made.faults:
                reason = fault.partition(": ")[2].partition("(")[0].partition(";")[0].strip()
                skipped[reason] = skipped.get(reason, 0) + 1
            if made.sums:
                total.merge(made.sums)
    if "train" in plan.shards:
        total.finish().save(f"{plan.url.rstrip('/')}/statistics.npz")
    write_manifest(
        plan.url,
        in_order(splits),
        plan.classes,
        size=None if plan.options.keep else plan.options.size,
        skipped=skipped,
        words=plan.words,
        prepared={**before.get("prepared", {}), **dict.fromkeys(plan.shards, plan.digest)},
    )
    fs.rm(f"{root}/{WORK}", recursive=True)
    return read_manifest(plan.url) or {}


def _mean_bytes(plan: Preparation, table: Any, orders: dict[str, NDArray[np.int64]]) -> int:
    """Bytes of an image as it will be stored, by the first few."""
    split = next(iter(orders))
    some = entries_of(table.take(pa.array(orders[split][:SAMPLE])))
    sizes = [1]
    for entry, data in zip(some, fetch(some, plan.dataset, plan.origin[split]), strict=True):
        try:
            if isinstance(data, bytes):
                sizes.append(len(_image(data, entry.name, plan.options)[0]))
        except DataError:
            continue  # its shard will say so
    return -(-sum(sizes) // max(1, len(sizes) - 1))


def _image(data: bytes, name: str, options: Options) -> tuple[bytes, Any]:
    if options.keep:
        return data, decode(data, name, options.size)
    return standard(data, name, options.size, options.quality)


def _digest(plan: Preparation, tables: dict[str, Any]) -> str:
    options = {k: v for k, v in asdict(plan.options).items() if k != "on_error"}
    said = [options, plan.classes, dict(plan.words), dict(plan.shards), plan.group_rows]
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=16)
    for split, table in tables.items():
        digest.update(split.encode())
        schema = plain(table.schema)
        for start in range(0, len(table), 1 << 16):
            some = table.slice(start, 1 << 16).cast(schema).combine_chunks()
            digest.update(some.to_batches()[0].serialize())
    return digest.hexdigest()


def _keep(plan: Preparation, tables: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Keeps the plan for workers and for a later start, unless one that is the same lies there."""
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
        if fs.exists(kept):
            if json.loads(fs.cat_file(kept))["digest"] == plan.digest:
                return
            raise DataError(
                f"{plan.url}: an unfinished preparation of something else lies there; finish it, "
                f"or remove {plan.url.rstrip('/')}/{WORK}"
            )
        fs.makedirs(f"{root}/{WORK}", exist_ok=True)
        for split, table in tables.items():
            path = f"{root}/{WORK}/{split}.parquet"
            with fs.open(path, "wb") as file, pq.ParquetWriter(file, table.schema) as writer:
                for number in range(plan.shards[split]):
                    start, stop = plan.bounds(split, number)
                    writer.write_table(table.slice(start, stop - start), stop - start)
        fs.pipe_file(kept, json.dumps({"digest": plan.digest}).encode())
    except OSError as error:
        raise DataError(f"{plan.url}: cannot be written: {error}; free or mend it") from None


def _entries(plan: Preparation, split: str, number: int) -> list[Entry]:
    url = f"{plan.url.rstrip('/')}/{WORK}/{split}.parquet"

    def read() -> list[Entry]:
        with parquet(url) as file:
            return entries_of(file.read_row_group(number))

    return persistent(url, read)


def _save_made(plan: Preparation, split: str, number: int, made: Made) -> None:
    arrays: dict[str, Any] = {
        "groups": np.array(made.groups, np.int64),
        "faults": np.array(json.dumps(made.faults)),
    }
    if made.sums:
        arrays |= {name: getattr(made.sums, name) for name in ("images", "pixels", "moments")}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    fs, root = storage(plan.url)
    write_whole(fs, f"{root}/{WORK}/{split}-{number:05d}.npz", buffer.getvalue())
