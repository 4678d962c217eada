"""A rank's end of the feed: its images, fetched while it computes.

Apart from the feed itself, which so has no need of torch.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from typing import Any

import ray
import torch

from datasets import DataError
from datasets.storage import StoreFailed
from pipeline.training import Images
from workers.parts import Part, unpack

FETCH_SECONDS = 5.0
"""That a rank waits for a part's bytes before it asks for the part anew."""

# Blocks lie in shared memory that is read-only; nothing here writes to crops.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Stream:
    """A rank's view of the feed: its replica's images, item after item from `start` to `stop`.

    Without `pixels`, only labels and places come. A thread fetches what comes next, as far as a
    GPU's memory if that is the `device`, while the rank computes. `waited` (seconds that the rank
    stood still for data) adds up; `skipped`, `faults` and `node` (that made it) are those of the
    last item.
    """

    def __init__(
        self,
        feed: Any,
        replica: int,
        start: int,
        stop: int,
        *,
        pixels: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.waited, self.skipped, self.pixels = 0.0, 0, pixels
        self.faults: list[str] = []
        self.node = ""
        gpu = device is not None and device.type == "cuda"
        self._beside = torch.cuda.Stream(device) if gpu else None
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=1)
        threading.Thread(target=self._fetch, args=(feed, replica, start, stop), daemon=True).start()

    def next(self) -> Images | None:
        """The next item's images, None if the run is to end before it.

        Raises DataError for data that the run may not go on without.
        """
        start = time.perf_counter()
        got = self._ready.get()
        self.waited += time.perf_counter() - start
        if isinstance(got, BaseException):
            raise got
        if got is None:
            return None
        part, images = got
        batch = part.batch
        self.skipped, self.faults, self.node = batch.skipped, batch.faults, part.node
        return images

    def _fetch(self, feed: Any, replica: int, start: int, stop: int) -> None:
        try:
            asked = feed.take.remote(start, replica, self.pixels) if start < stop else None
            for index in range(start, stop):
                taken = ray.get(asked)
                if taken is None:
                    self._ready.put(None)
                    return
                # The next answer comes while this block is on its way.
                more = index + 1 < stop
                asked = feed.take.remote(index + 1, replica, self.pixels) if more else None
                part = self._unpacked(taken, feed, index, replica)
                self._ready.put((part, self._images(part)))
        except BaseException as error:
            self._ready.put(error)

    def _unpacked(self, taken: list[Any], feed: Any, index: int, replica: int) -> Part:
        refs = [ref for ref in taken if ref]
        try:
            tables = ray.get(refs, timeout=FETCH_SECONDS)
        except ray.exceptions.RayError:  # lost with its node, or out of reach
            taken = ray.get(feed.again.remote(index, replica, self.pixels))
            tables = ray.get([ref for ref in taken if ref])
        return unpack(tables[0] if self.pixels else None, tables[-1])

    def _images(self, part: Part) -> Images:
        if part.error:
            raise (StoreFailed if part.away else DataError)(part.error)
        batch = part.batch
        arrays = (batch.crops, batch.labels, batch.shifts, part.places)
        images = Images(*map(torch.from_numpy, arrays))
        return images.on_gpu(self._beside) if self._beside else images
