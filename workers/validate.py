"""`towers validate`: reads a whole data set on the cluster and names what is wrong."""

from __future__ import annotations

import time
from typing import Any

from datasets.shards import open_dataset
from datasets.validation import Findings, check_shard
from workers.cluster import connected
from workers.progress import Progress
from workers.spread import only_here, spread

KEPT = 1000  # faults that are named


def validate(
    shards: str, *, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Reads every row of `shards`; returns `rows`, `faults` (their number), `named` (the first
    thousand), `notes`, `splits`. Raises DataError if nothing there can be read at all.
    """
    progress = progress or Progress()
    dataset = open_dataset(shards, check=False)
    items = [(split, n) for split in dataset.splits for n in range(len(dataset.shards(split)))]
    total = sum(dataset.rows(split) for split in dataset.splits)
    findings, named = Findings(dataset), list[str]()
    done, start = 0, time.monotonic()
    here = only_here(shards)
    with connected(unless=here):
        for _, part in spread(check_shard, dataset, items, workers=workers, here=here):
            findings.add(part)
            done += len(part.rows) + len(part.faults)
            named += part.faults[: KEPT - len(named)]
            if len(part.rows) or part.faults:
                progress.done("read", min(done, total), total, start)
    more, notes = findings.judge()
    return {
        "url": shards,
        "rows": total,
        "faults": findings.faults + len(more),
        "named": (more + named)[:KEPT],
        "notes": notes,
        "splits": {split: dataset.rows(split) for split in dataset.splits},
    }
