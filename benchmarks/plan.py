"""Whether `towers plan --measure` foretells what a run then does on this machine.

    python benchmarks/plan.py

Draws images, has the rates measured, and trains on them. First two towers on the built-in data
set, where one augmenter is enough: images a second of the run against the plan's. Then both towers
in one process on pictures so large that one augmenter is too few: images a second, and the
augmenters that it would take, which the run tells by its share of waiting: 1 / (1 - share).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.drawn import draw, write_drawn
from datasets.images import encode
from datasets.layout import Dataset
from datasets.shards import open_dataset, write_manifest, write_split
from workers.config import configure
from workers.rates import measure
from workers.supervisor import train

WARM = 3  # reports of a run that are left out: it starts


def write_large(url: str, images: int, times: int) -> Dataset:
    """Drawn images, each pixel `times` wide and high."""

    def records() -> Iterator[tuple[bytes, str, int]]:
        for number in range(images):
            pixels, label = draw(0, "train", number)
            yield encode(pixels.repeat(times, 0).repeat(times, 1)), f"{number}", label

    names = [str(label) for label in range(10)]
    shards = write_split(url, "train", records(), names, rows_per_group=32)
    write_manifest(url, {"train": shards}, names)
    return open_dataset(url)


def compare(what: str, dataset: Dataset, folder: str, **given: Any) -> None:
    """Prints what the plan says and what a run does."""
    # Rates are of images that are decoded each time, as in a run's first epoch.
    given |= {"network": "alexnet-mini", "augmenters": "1:1", "cache": 0.0}
    given["shards"] = dataset.root
    config = configure({**given, "run": f"{folder}/run"})
    rates, _ = measure(dataset, config)
    train(config)
    text = Path(f"{folder}/run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    reports = [line for line in lines if line["split"] == "train"][WARM:]
    rate = statistics.median(line["images_per_second"] for line in reports)
    waited = statistics.median(line["stall_fraction"] for line in reports)
    rows = [("images a second", rates.reached(1), rate)]
    rows.append(("augmenters needed", max(1.0, rates.need), 1 / (1 - waited)))
    print(f"{what}: towers alone {rates.towers:.0f}, an augmenter alone {rates.augmenter:.0f}")
    for name, planned, measured in rows:
        print(f"  {name:<20} planned {planned:8.2f}  measured {measured:8.2f}", end="  ")
        print(f"{planned / measured - 1:+.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--times", type=int, default=8, help="Width of the large pictures' pixels.")
    args = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory(prefix="towers-") as folder:
        drawn = write_drawn(f"{folder}/drawn/shards")
        compare("two towers, drawn images", drawn, f"{folder}/drawn", epochs=args.epochs)
        large = write_large(f"{folder}/large/shards", 2000, args.times)
        compare("one process, large images", large, f"{folder}/large", towers=1, epochs=4)


if __name__ == "__main__":
    main()
