"""What a tower reports of its speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.crossing import Pair
from pipeline.schedule import Line
from workers.stream import Stream

REPORT_SECONDS = 1.0


class Meter:
    """What happened since the last reading."""

    def __init__(self, peers: Sequence[Pair | Line], stream: Stream) -> None:
        self.peers, self.stream, self.images = peers, stream, 0
        self.nodes: Counter[str] = Counter()  # images of this replica that each node made
        self.start, self.stalled, self.exchanged = self._now()

    def _now(self) -> tuple[float, float, float]:
        """The time, and the seconds waited so far for data and for other ranks."""
        waited = sum(peer.waited for peer in self.peers)
        return time.perf_counter(), self.stream.waited, waited

    def due(self, step: int, every: int | None) -> bool:
        """Whether to report after a step: every so many, or once a second."""
        return step % every == 0 if every else time.perf_counter() - self.start >= REPORT_SECONDS

    def read(self) -> dict[str, Any]:
        """images_per_second, the fractions of time waited for data and for other ranks, and the
        nodes that made this replica's images.
        """
        now, stalled, exchanged = self._now()
        seconds = now - self.start
        line = {
            "images_per_second": self.images / seconds,
            "stall_fraction": (stalled - self.stalled) / seconds,
            "exchange_fraction": (exchanged - self.exchanged) / seconds,
            "seconds": seconds,
            "made_by": dict(self.nodes),
        }
        self.nodes.clear()
        self.start, self.stalled, self.exchanged, self.images = now, stalled, exchanged, 0
        return line
