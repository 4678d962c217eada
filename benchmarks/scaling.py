"""Whether what the stream costs grows with the work: augmenters, rows, memory.

    python benchmarks/scaling.py [--json FILE]

Prints images a second against the number of augmenters; the memory that the feed's batches and the
processes take while a taker keeps up and once it stands still; and for as many rows as ILSVRC has
and a thousand times as many, how long the plan of a run takes, its next batch, and the first batch
of a run that is resumed far into it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import ray
from fleet import BATCH, feed_of, memory, parts, rate
from table import cores as cores_here
from table import publish

from datasets.drawn import write_drawn
from datasets.plan import Itinerary

SECONDS = 6.0  # that each fleet is watched, and waited for before
GROUP = 100  # rows in a row group, as `towers prepare` makes them


def fleets(shards: str, most: int) -> list[dict[str, Any]]:
    """A row for each number of augmenters."""
    rows: list[dict[str, Any]] = []
    for augmenters in range(1, most + 1):
        feed, batches = feed_of(shards, f"{augmenters}:{augmenters}", epochs=1000)
        times: list[float] = []
        for at, _ in parts(feed, 0, batches):
            times.append(at)
            if at > times[0] + 2 * SECONDS:
                break
        while_taken = memory()
        time.sleep(3)  # everything fills up
        still = memory()
        ray.kill(feed)
        speed = rate([at for at in times if at > times[0] + SECONDS])
        rows.append(
            {
                "augmenters": augmenters,
                "images/s": speed,
                "x one": speed / rows[0]["images/s"] if rows else 1.0,
                "MiB of batches": while_taken[0],
                "at a standstill": still[0],
                "MiB of processes": still[2],
            }
        )
    return rows


def plans(rows: int) -> dict[str, Any]:
    """A row for a run of 90 epochs over so many rows."""
    groups = [GROUP] * (rows // GROUP)
    seconds = planned(groups)
    tracemalloc.start()  # by itself: it takes as long again
    planned(groups)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "rows": len(groups) * GROUP,
        "plan, ms": 1e3 * seconds[0],
        "next batch, ms": 1e3 * seconds[1],
        "resume, ms": 1e3 * seconds[2],
        "MiB": peak / 2**20,
    }


def planned(groups: list[int]) -> list[float]:
    """Seconds of a plan with its first batch, of the next one, and of a plan with the batch that a
    resumed run begins with.
    """
    seconds = []
    for what in ("plan", "next", "resume"):
        start = time.perf_counter()
        if what != "next":
            itinerary = Itinerary(groups, ("val", [GROUP]), batch=BATCH, seed=0, epochs=90)
        at = 0 if what == "plan" else 1 if what == "next" else len(itinerary) * 2 // 3
        assert len(itinerary.rows(at)) == BATCH
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures here, and those of plans beside"
    )
    args = parser.parse_args()
    beside = str(Path(args.json).with_suffix(".plans.json")) if args.json else None
    publish("Plans of 90 epochs", [plans(rows) for rows in (1_281_167, 1_000_000_000)], beside)
    cores = cores_here()
    # The taker and the feed work too: a fleet of all cores is to share them.
    ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="towers-") as shards:
        write_drawn(shards, train=6000, val=BATCH)
        publish("Augmenters", fleets(shards, cores), args.json)


if __name__ == "__main__":
    main()
