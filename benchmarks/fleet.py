"""What the augmentation fleet does when nodes join, when nobody takes its batches, and when it is
slow itself.

    python benchmarks/fleet.py

Starts a head and nodes of one core with the resource `augment` on this machine, and takes batches
of 64x64 crops from a feed as a tower does, without training. Prints images a second with one and
with two nodes and how long a node that joins takes to be used; the most memory that object store
and processes hold through an epoch with a taker ten times slower than the fleet, against the same
after a tenth of the epoch; and whether a fleet ten times slower than the taker is left alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private.internal_api import memory_summary
from ray.cluster_utils import Cluster

from datasets.drawn import write_drawn
from datasets.plan import Itinerary
from datasets.shards import open_dataset
from datasets.statistics import Statistics
from workers.config import configure
from workers.feed import Feed
from workers.fleet import Fleet
from workers.parts import Part, unpack
from workers.placement import decide
from workers.room import cluster_nodes

BATCH, SECONDS = 128, 8.0  # images; how long each rate is measured, and waited before
WAIT = 120.0  # seconds that a node has to be used


class Slow(Fleet):
    """A fleet whose augmenters take `pause` seconds longer for each part."""

    pause = 0.0

    def load(self, *item: Any, **how: Any) -> Part:
        time.sleep(self.pause)
        return super().load(*item, **how)


def feed_of(
    shards: str,
    augmenters: str,
    pause: float = 0.0,
    epochs: int = 1,
    network: str = "alexnet-mini",
    cache: float = 0.0,
) -> tuple[Any, int]:
    """A feed that runs, and how many batches it has."""
    given = {
        "network": network,
        "batch": BATCH,
        "towers": 1,
        "run": "none",
        "epochs": epochs,
        "cache": cache,
    }
    config = configure({**given, "shards": shards, "augmenters": augmenters})
    dataset = open_dataset(shards)
    itinerary = Itinerary(dataset.groups("train"), None, batch=BATCH, seed=0, epochs=epochs)
    statistics = Statistics.load(f"{shards}/statistics.npz")
    fleet = Slow(dataset, itinerary, config, decide(cluster_nodes(), config), statistics)
    fleet.pause = pause
    feed = ray.remote(Feed).options(num_cpus=0, max_concurrency=8).remote(fleet)
    ray.get(feed.open.remote(0))
    return feed, len(itinerary)


def parts(feed: Any, start: int, stop: int) -> Iterator[tuple[float, Part]]:
    """Each part, with the time when it was there."""
    for index in range(start, stop):
        pixels, rest = ray.get(feed.take.remote(index, 0, True))
        yield time.perf_counter(), unpack(*ray.get([pixels, rest]))


def rate(times: list[float]) -> float:
    """Images a second between the first and the last of batches."""
    return BATCH * (len(times) - 1) / (times[-1] - times[0])


def memory() -> tuple[float, float, float]:
    """MiB in the object store, spilled, and private ones of Ray's workers on this machine."""
    text = memory_summary(stats_only=True)
    used = re.search(r"Plasma memory usage (\d+) MiB", text)
    spilled = re.search(r"Spilled (\d+) MiB", text)
    own = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("cmdline").read_bytes().startswith(b"ray::"):
                rollup = folder.joinpath("smaps_rollup").read_text()
                own += sum(int(kib) for kib in re.findall(r"Private_\w+:\s+(\d+) kB", rollup))
        except OSError:  # it ended meanwhile
            continue
    return float(used[1]) if used else 0.0, float(spilled[1]) if spilled else 0.0, own / 1024


def growth(cluster: Cluster, shards: str) -> float:
    """Prints what doubling the fleet does; returns the rate of one node."""
    feed, batches = feed_of(shards, "1:2", epochs=1000)
    times, index = [], 0
    for index in range(batches):
        at, _ = next(parts(feed, index, index + 1))
        times.append(at)
        if at > times[0] + 2 * SECONDS:
            break
    before = rate([at for at in times if at > times[0] + SECONDS])
    joined, node = time.perf_counter(), cluster.add_node(num_cpus=1, resources={"augment": 1})
    used, after = 0.0, list[float]()
    for at, part in parts(feed, index + 1, batches):
        if not used and part.node == node.node_id:
            used = at - joined
        if used and at > joined + used + SECONDS:
            after.append(at)
            if at > after[0] + SECONDS:
                break
        if not used and at > joined + WAIT:
            sys.exit(f"no crop came from the node that joined in {WAIT:.0f} seconds")
    doubled = rate(after)
    ray.kill(feed)
    cluster.remove_node(node)
    print(f"images/s with one node of one core      {before:8.0f}")
    print(f"images/s with two                       {doubled:8.0f}  ({doubled / before:.2f}x)")
    print(f"seconds from joining to its first crop  {used:8.1f}")
    return before


def bounds(shards: str, speed: float) -> None:
    """Prints memory with a taker at a tenth of a speed."""
    feed, batches = feed_of(shards, "1:1")
    seen: list[tuple[float, float, float]] = []
    looked = 0.0
    for at, _ in parts(feed, 0, batches):
        time.sleep(10 * BATCH / speed)
        if at - looked > 2:
            seen.append(memory())
            looked = at
    ray.kill(feed)
    early = seen[: max(1, len(seen) // 10)]
    for place, name in enumerate(("object store", "spilled", "processes, private")):
        first, most = max(s[place] for s in early), max(s[place] for s in seen)
        print(f"MiB, {name:<33}  {first:8.0f} after a tenth, at most {most:.0f}")


def patience(shards: str, speed: float) -> None:
    """Prints whether a fleet at a tenth of a speed is taken for one that stalls."""
    feed, _ = feed_of(shards, "1:1", pause=9 * BATCH / speed)
    times = [at for at, _ in parts(feed, 0, 40)]
    state = ray.get(feed.state.remote())
    ray.kill(feed)
    print(f"images/s of the slow fleet              {rate(times[5:]):8.0f}")
    print(f"times that it was started anew          {state['stalls']:8d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    images = parser.parse_args().images
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1, resources={"augment": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        with tempfile.TemporaryDirectory(prefix="towers-") as shards:
            write_drawn(shards, train=images, val=BATCH)
            speed = growth(cluster, shards)
            bounds(shards, speed)
            patience(shards, speed)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
