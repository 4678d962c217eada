"""`towers prepare`: a source's images into shards, by as many workers as the cluster has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from datasets.kept import Options, Preparation, complete, finished
from datasets.listing import read_labels, read_words
from datasets.preparation import finish, lay_out, make_shard
from datasets.scanning import scan
from datasets.shards import read_manifest
from datasets.sources import Source, find_source
from datasets.storage import storage
from workers.cluster import connected
from workers.config import UserError
from workers.output import alone, inside, same
from workers.progress import Progress
from workers.spread import only_here, spread

WORDS = ("synset_words.txt", "LOC_synset_mapping.txt")
"""Files that say what ILSVRC's synsets mean, as they are handed out beside it."""

SCANS = 256  # tasks that the parts of a source are scanned in, at most
SHOWN = 20  # faults and names that are printed
TELL_SECONDS = 1.0  # between a worker's reports


def prepare(
    source: str,
    shards: str,
    options: Options | None = None,
    *,
    split: str | None = None,
    labels: str | None = None,
    synsets: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes shards of the images of `source` in the folder or URL `shards`, or goes on with it.

    `labels`: a file that says what images show where folders don't; `synsets`: one that says what
    synsets mean. Returns the keys of `towers prepare --json`. Raises DataError for bad data and
    UserError for a cluster without room.
    """
    options, progress = options or Options(), progress or Progress()
    if same(source, shards):
        raise UserError(f"{shards} is where the images are; name another folder for the shards")
    if inside(shards, source):
        raise UserError(
            f"{shards} lies inside {source}, of which it would be taken for a part by the next "
            "call; name a folder elsewhere for the shards"
        )
    found = find_source(source)
    words = read_words(synsets or "") if synsets else _words(source)
    told = read_labels(labels, list(words)) if labels else None
    here = only_here(source, shards)
    with alone(shards), connected(unless=here):
        entries = _scan(found, workers, progress, here)
        plan = lay_out(shards, found, entries, options, split=split, labels=told, words=words)
        del entries
        if complete(plan):
            progress.say(f"{shards} is complete already")
            return _result(shards, read_manifest(shards) or {})
        _make(plan, workers, progress, here)
        return _result(shards, finish(plan))


def _scan(source: Source, workers: int | None, progress: Progress, here: bool) -> Any:
    """All images of a source, in its own order."""
    tables: dict[int, Any] = {}
    passed: list[str] = []
    empty: list[str] = []
    numbers = np.array_split(np.arange(len(source.parts)), min(len(source.parts), SCANS))
    for _, (number, table, others) in spread(
        _scan_parts, source, numbers, workers=workers, here=here
    ):
        tables[number] = table
        passed += others
        if not len(table):
            empty.append(source.parts[number].file)
        progress.line(f"scanned {len(tables)} of {len(source.parts)} parts of {source.url}")
    for names, what in (
        (passed, "passed by {} file(s) that are no images by name"),
        (empty, "no image in {} of the folders or archives"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            progress.say(f"{what.format(len(names))}: {some}")
    return pa.concat_tables(tables[n] for n in sorted(tables)).unify_dictionaries()


def _scan_parts(source: Source, numbers: Any) -> Iterator[tuple[int, Any, list[str]]]:
    for number in numbers.tolist():
        yield number, *scan(source, source.parts[number])


def _make(plan: Preparation, workers: int | None, progress: Progress, here: bool) -> None:
    items = [(split, n) for split, count in plan.shards.items() for n in range(count)]
    todo = [(split, n) for split, n in items if not finished(plan, split, n)]
    if len(todo) < len(items):
        progress.say(f"{len(items) - len(todo)} of {len(items)} shards are there already")
    total = sum(stop - start for start, stop in (plan.bounds(*item) for item in todo))
    start, done = time.monotonic(), dict.fromkeys(range(len(todo)), 0)
    shown = 0
    for number, (count, faults) in spread(_make_one, plan, todo, workers=workers, here=here):
        done[number] = count
        for fault in faults[: SHOWN - shown]:
            progress.say(f"skipped: {fault}")
            shown += 1
        progress.done("prepared", sum(done.values()), total, start)


def _make_one(plan: Preparation, item: tuple[str, int]) -> Iterator[tuple[int, tuple[str, ...]]]:
    told = time.monotonic()
    for count in make_shard(plan, *item):
        if time.monotonic() - told >= TELL_SECONDS:
            yield count, ()
            told = time.monotonic()
    made = finished(plan, *item)
    yield count, made.faults if made else ()


def _words(source: str) -> Mapping[str, str]:
    """What synsets mean, from a file beside the source if there is one."""
    fs, root = storage(source)
    for name in WORDS:
        path = f"{root.rpartition('/')[0]}/{name}"
        if "*" not in path and fs.exists(path):
            return read_words(str(fs.unstrip_protocol(path)))
    return {}


def _result(url: str, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "url": url,
        "rows": sum(manifest["rows"].values()),
        "shards": sum(len(files) for files in manifest["splits"].values()),
        "classes": len(manifest["classes"]),
        "skipped": sum(manifest["skipped"].values()),
        "splits": manifest["rows"],
    }
