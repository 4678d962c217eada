"""The feed: each batch of the fleet goes to the towers once, in order, both of a pair alike."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from datasets import DataError
from pipeline.training import Images
from workers.fleet import READ_AHEAD, Fleet, Watch, unpack

# Blocks lie in shared memory that is read-only; nothing here writes to crops.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Feed:
    """A Ray actor that runs the fleet ahead of the towers by a bounded number of batches.

    `open` starts at an item; then each rank `take`s each item once. Only references pass through
    here, the batches themselves go from an augmenter's node to the towers'.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.watch = fleet, Watch()
        mesh = fleet.where.mesh
        # Of a part's pixels, and of the rest of it.
        self.takers = mesh.towers, mesh.towers * mesh.stages
        self.there = threading.Condition()
        self.window: dict[tuple[int, int], _Held] = {}
        self.failure: BaseException | None = None

    def open(self, start: int) -> None:
        """Starts a stream at item `start`."""
        stream = self.fleet.stream(start, self.watch)
        threading.Thread(target=self._pull, args=(stream,), daemon=True).start()

    def _pull(self, stream: Iterator[tuple[int, int, Any]]) -> None:
        try:
            for index, replica, (pixels, rest) in stream:
                with self.there:
                    self.there.wait_for(lambda: len(self.window) < READ_AHEAD * self.fleet.replicas)
                    self.window[index, replica] = _Held(pixels, rest, *self.takers)
                    self.there.notify_all()
        except BaseException as error:
            with self.there:
                self.failure = error
                self.there.notify_all()

    def take(self, index: int, replica: int, pixels: bool) -> list[Any]:
        """A list (so that Ray does not resolve them) of the references to a replica's part: its
        pixels, None for a stage that needs none, and the rest.

        Raises what ended the stream, if it ended before this item.
        """
        key = index, replica
        with self.there:
            self.there.wait_for(lambda: key in self.window or self.failure)
            if key not in self.window:
                assert self.failure
                raise self.failure
            held = self.window[key]
            taken = [held.pixels if pixels else None, held.rest]
            held.pixels_left -= pixels
            held.left -= 1
            if not held.pixels_left:
                held.pixels = None  # their memory is free once the first stage is done with them
            if not held.left:
                del self.window[key]
            self.there.notify_all()
        return taken

    def state(self) -> dict[str, int]:
        """`augmenters` that run now, `ready` batches."""
        return {"augmenters": self.watch.augmenters, "ready": len(self.window)}


@dataclass
class _Held:
    """A part in the window, and how many ranks have not taken it yet."""

    pixels: Any
    rest: Any
    pixels_left: int
    left: int


class Stream:
    """A rank's view of the feed: its replica's images, item after item from `start` to `stop`.

    Without `pixels`, only labels and places come. A thread fetches what comes next while the rank
    computes. `waited` (seconds that the rank stood
    still for data) adds up; `skipped` and `faults` are those of the last item.
    """

    def __init__(
        self, feed: Any, replica: int, start: int, stop: int, *, pixels: bool = True
    ) -> None:
        self.waited, self.skipped, self.pixels = 0.0, 0, pixels
        self.faults: list[str] = []
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=1)
        threading.Thread(target=self._fetch, args=(feed, replica, start, stop), daemon=True).start()

    def next(self) -> Images:
        """The next item's images. Raises DataError for data that the run may not go on without."""
        start = time.perf_counter()
        part = self._ready.get()
        self.waited += time.perf_counter() - start
        if isinstance(part, BaseException):
            raise part
        if part.error:
            raise DataError(part.error)
        batch = part.batch
        self.skipped, self.faults = batch.skipped, batch.faults
        arrays = (batch.crops, batch.labels, batch.shifts, part.places)
        return Images(*map(torch.from_numpy, arrays))

    def _fetch(self, feed: Any, replica: int, start: int, stop: int) -> None:
        try:
            asked = feed.take.remote(start, replica, self.pixels) if start < stop else None
            for index in range(start, stop):
                pixels, rest = ray.get(asked)
                # The next answer comes while this block is on its way.
                more = index + 1 < stop
                asked = feed.take.remote(index + 1, replica, self.pixels) if more else None
                crops = ray.get(pixels) if self.pixels else None
                self._ready.put(unpack(crops, ray.get(rest)))
        except BaseException as error:
            self._ready.put(error)
