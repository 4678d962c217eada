"""A source's images into shards: which go into which, and the making of one.

`lay_out` decides everything and keeps it in `SHARDS/.prepare`; `make_shard` depends on that alone,
so any number of workers in any order make the same bytes, and what a killed run has made stays.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets import DataError
from datasets.assignment import classes_of, codes_of, labels_of, order_of, splits_of
from datasets.fetch import entries_of, fetch
from datasets.foreign import in_order
from datasets.images import decode, standard
from datasets.kept import Made, Options, Preparation, finished, keep, kept_entries, save_made
from datasets.layout import Shard
from datasets.scanning import plain
from datasets.shards import WORK, Encoded, read_manifest, row_groups, write_manifest, write_shard
from datasets.sources import Source
from datasets.statistics import STATISTICS, Sums
from datasets.storage import remove, storage, whole

SHARD_BYTES = 256 << 20
GROUP_BYTES = 2 << 20  # of images in a row group: what the stream reads at once
GROUP_ROWS = (64, 256)
LEAST_SHARDS = 8  # if there are rows for so many, so that several workers share a small source
SAMPLE = 64  # images that tell how large they become


def lay_out(
    url: str,
    source: Source,
    entries: Any,
    options: Options,
    *,
    split: str | None = None,
    labels: Mapping[str, tuple[str, str]] | Sequence[str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Preparation:
    """Decides for each entry (a table of `scanning.ENTRIES`) its label, split and shard.

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
    if not source.dataset:  # which names its classes itself
        _check_taught(source, splits, codes, classes)
    for name in splits:
        if not re.fullmatch(r"\w[\w-]{0,99}", name):  # it begins its files' names
            raise DataError(f"{source.url}: a split {name!r}: letters, digits, - and _ are wanted")
    if before and split is None:
        taken = [s for s in before["splits"] if s not in splits]
        if taken:
            raise DataError(f"{url}: holds {', '.join(taken)} already; name another folder")
    _check_size(url, before or {}, splits, options)
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
    keep(plan, tables, before)
    return plan


def _check_taught(
    source: Source,
    splits: Mapping[str, NDArray[np.int64]],
    codes: NDArray[np.int64],
    classes: Sequence[str],
) -> None:
    """Raises DataError if images are of a class that training never shows: what was taken for a
    class may be another folder.
    """
    if "train" not in splits:
        return
    taught = {-1, *codes[splits["train"]].tolist()}
    for split, rows in splits.items():
        if unknown := sorted(set(codes[rows].tolist()) - taught):
            raise DataError(
                f"{source.url}: {split} has images of {classes[unknown[0]]!r}, and train has none; "
                "say what images show by --labels FILE, or leave them out by --split train"
            )


def _check_size(
    url: str, before: Mapping[str, Any], splits: Mapping[str, Any], options: Options
) -> None:
    """Raises DataError if other splits there have images of another size: one holds for all."""
    others = sorted(set(before.get("splits", ())) - set(splits))
    had = before.get("size")
    if others and had != (None if options.keep else options.size):
        said = f"--size {had}" if had else "--keep"
        raise DataError(f"{url}: {', '.join(others)} was prepared by {said}; say so here too")


def make_shard(plan: Preparation, split: str, number: int) -> Iterator[int]:
    """Makes one shard; yields how many of its images are done, now and then.

    Raises DataError, naming the image, for a bad one (unless those are skipped), and for storage
    that cannot be written: then nothing is left of it.
    """
    fs, root = storage(plan.url)
    entries = kept_entries(plan, split, number)
    options = plan.options
    sums = Sums(options.size) if split == "train" else None
    faults: list[str] = []
    reasons: list[str] = []
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
                told = faults[-1].rpartition(f"{entry.name}: ")[2]  # a name may hold anything
                reasons.append(re.sub(r" \([^)]*\)", "", told).partition(";")[0].strip())
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
        save_made(plan, split, number, Made(tuple(groups), tuple(faults), tuple(reasons), sums))
    except OSError as error:
        raise DataError(f"{plan.url}: cannot be written: {error}; free or mend it") from None
    yield len(entries)


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
            for reason in made.reasons:
                skipped[reason] = skipped.get(reason, 0) + 1
            if made.sums:
                total.merge(made.sums)
    if "train" in plan.shards:
        total.finish().save(f"{plan.url.rstrip('/')}/{STATISTICS}")
    write_manifest(
        plan.url,
        in_order(splits),
        plan.classes,
        size=None if plan.options.keep else plan.options.size,
        skipped=skipped,
        words=plan.words,
        prepared={**before.get("prepared", {}), **dict.fromkeys(plan.shards, plan.digest)},
    )
    remove(fs, f"{root}/{WORK}")
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
