"""What a stream from a store far away costs: its answers, and how often it is asked.

    python benchmarks/remote.py [--delay MS] [--json FILE]

Serves shards of photographs by HTTP on this machine, each answer `--delay` milliseconds late, and
loads an epoch of them as the augmenters of one machine do: one process, or eight. Row groups
are fetched by each of them, or kept for all on the machine's disk, or there from an epoch before.
Prints images a second of all, against the same from the disk; answers, and bytes for each byte of
the shards.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from stream import BATCH, CROP, SIZE, prepare
from table import publish

from datasets.augmentation import Augmentation, Loader
from datasets.layout import Dataset
from datasets.plan import Itinerary
from datasets.shards import open_dataset
from workers.execution import FORESIGHT

ROOM = 1e9
"""Bytes for row groups, which is more than these shards have."""


class Late(SimpleHTTPRequestHandler):
    """Files by parts, a while after they are asked for; counts what it sends."""

    protocol_version = "HTTP/1.1"

    def __init__(self, delay: float, count: Any, *args: Any, **more: Any) -> None:
        self.delay, self.count = delay, count
        super().__init__(*args, **more)

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, wanted: bool) -> None:
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            super().do_GET()
            return
        size = os.path.getsize(path)
        start, end = 0, size - 1
        if given := self.headers["Range"]:
            first, _, last = given.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or end), end)
        time.sleep(self.delay)
        self.send_response(206 if given else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start + 1))
        if given:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.end_headers()
        with self.count:
            self.count[0] += 1
            self.count[1] += (end - start + 1) * wanted
        if wanted:
            with open(path, "rb") as file:
                file.seek(start)
                self.wfile.write(file.read(end - start + 1))

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def serve(folder: str, delay: float, count: Any, port: Any) -> None:
    """Serves `folder`, each answer `delay` seconds late; counts answers and bytes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Late, delay, count, directory=folder))
    port.send(server.server_port)
    server.serve_forever()


def augment(dataset: Dataset, number: int, of: int, place: str | None, both: Any) -> None:
    """What one of so many augmenters of a machine does in an epoch, between two barriers; row
    groups are kept at `place`.
    """
    tempfile.tempdir = place
    plan = Itinerary(dataset.groups("train"), None, batch=BATCH, seed=0, epochs=1)
    room = ROOM if place else 0
    loader = Loader(
        dataset, "train", Augmentation(SIZE, CROP), None, seed=0, cache=room, again=False
    )
    both.wait()
    try:
        for index in range(number, len(plan), of):
            next_ones = range(index + of, min(index + of * FORESIGHT + 1, len(plan)), of)
            then = np.concatenate([plan.rows(i) for i in next_ones]) if next_ones else None
            loader.load(plan.rows(index), 0, True, then)
    except BaseException:
        both.abort()  # nobody is to wait for it
        raise
    both.wait()


def rate(dataset: Dataset, augmenters: int, place: str | None) -> float:
    """Images a second of so many augmenters together."""
    spawn = multiprocessing.get_context("spawn")
    both = spawn.Barrier(augmenters + 1, timeout=600)
    all_of_them = [
        spawn.Process(target=augment, args=(dataset, number, augmenters, place, both), daemon=True)
        for number in range(augmenters)
    ]
    for process in all_of_them:
        process.start()
    both.wait()
    start = time.perf_counter()
    both.wait()
    return dataset.rows("train") / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--delay", type=float, default=50.0, help="milliseconds an answer")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, and FILE.md")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    count, (here, there) = multiprocessing.Array("q", 2), multiprocessing.Pipe()
    with tempfile.TemporaryDirectory(prefix="towers-") as folder:
        prepare(folder)
        server = multiprocessing.Process(
            target=serve, args=(folder, args.delay / 1000, count, there), daemon=True
        )
        server.start()
        near = open_dataset(f"{folder}/shards")
        far = open_dataset(f"http://127.0.0.1:{here.recv()}/shards/")
        size = sum(os.path.getsize(shard.path) for shard in near.shards("train"))
        for augmenters in (1, 8):
            disk = rate(near, augmenters, None)
            place = f"{folder}/{augmenters}"
            os.mkdir(place)
            for kept, where in (("no", None), ("yes", place), ("from before", place)):
                count[:] = 0, 0
                found = rate(far, augmenters, where)
                rows.append(
                    {
                        "augmenters": augmenters,
                        "kept": kept,
                        "images/s": found,
                        "x from disk": found / disk,
                        "answers": count[0],
                        "bytes x": count[1] / size,
                    }
                )
        server.terminate()
    publish(f"A stream from far away, answers {args.delay:g} ms late", rows, args.json)


if __name__ == "__main__":
    main()
