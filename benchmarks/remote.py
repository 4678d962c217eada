"""What a stream from a store far away costs: its answers, and how often it is asked.

    python benchmarks/remote.py [--delay MS] [--json FILE]

Serves shards of photographs by HTTP on this machine, each answer `--delay` milliseconds late, and
loads batches of them as one augmenter of a fleet does, which makes every second batch, or every
eighth. Prints its images a second, against the same from the disk; answers that it needs for each
of its batches, and bytes for each byte of the images in them.
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
from workers.fleet import FORESIGHT


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


def loaded(dataset: Dataset, every: int, batches: int, count: Any) -> dict[str, float]:
    """Images a second of an augmenter that makes one batch of so many; answers and bytes that it
    got for each of its batches, counted by `count`.
    """
    plan = Itinerary(dataset.groups("train"), None, batch=BATCH, seed=0, epochs=1000)
    loader = Loader(dataset, "train", Augmentation(SIZE, CROP), None, seed=0)
    loader.load(plan.rows(0), 0, True)
    count[:] = 0, 0
    images, start = 0, time.perf_counter()
    for index in range(every, every * (batches + 1), every):
        later = [plan.rows(index + every * (k + 1)) for k in range(FORESIGHT)]
        batch = loader.load(plan.rows(index), plan.item(index).epoch, True, np.concatenate(later))
        images += len(batch.rows)
    rate = images / (time.perf_counter() - start)
    return {"rate": rate, "answers": count[0] / batches, "bytes": count[1] / images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--delay", type=float, default=50.0, help="milliseconds an answer")
    parser.add_argument("--batches", type=int, default=32, help="of each augmenter")
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
        image = sum(os.path.getsize(s.path) for s in near.shards("train")) / near.rows("train")
        for every in (1, 2, 8):
            disk = loaded(near, every, args.batches, count)
            store = loaded(far, every, args.batches, count)
            rows.append(
                {
                    "augmenters": every,
                    "images/s of one": store["rate"],
                    "x from disk": store["rate"] / disk["rate"],
                    "answers a batch": store["answers"],
                    "bytes x": store["bytes"] / image,
                }
            )
        server.terminate()
    publish(f"One augmenter of a fleet, answers {args.delay:g} ms late", rows, args.json)


if __name__ == "__main__":
    main()
