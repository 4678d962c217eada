"""What a rank did when: spans of forward, backward, exchange and waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

KINDS = ("forward", "backward", "optimizer", "exchange", "wait", "data")
"""`exchange` is a tensor under way, hidden where something else runs; `wait` is standing still for
another rank, `data` for the feed."""


class Span(NamedTuple):
    """From `start` (seconds of the epoch) on, for so many `seconds`, in training step `step`."""

    kind: str
    name: str
    start: float
    seconds: float
    step: int


@dataclass
class Trace:
    """The spans of one rank; nothing is recorded unless `on`."""

    on: bool = False
    step: int = 0
    spans: list[Span] = field(default_factory=list)

    def add(self, kind: str, name: str, start: float) -> None:
        """A span from `start`, a time of `clock`, to now."""
        if self.on:
            self.spans.append(Span(kind, name, start, clock() - start, self.step))

    @contextmanager
    def span(self, kind: str, name: str) -> Iterator[None]:
        """A span of what is within."""
        start = clock()
        yield
        self.add(kind, name, start)


_BEGIN = time.time() - time.perf_counter()


def clock() -> float:
    """Seconds of the epoch: nearly the same in all processes, and none of them ever sees it put
    right, which waits are measured by.
    """
    return _BEGIN + time.perf_counter()


def chrome(ranks: Sequence[Sequence[Span]], names: Sequence[str]) -> dict[str, Any]:
    """The spans of all ranks as Chrome and Perfetto read them: a process a rank, a line a kind."""
    events: list[dict[str, Any]] = []
    for rank, (spans, name) in enumerate(zip(ranks, names, strict=True)):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        for line, kinds in enumerate((KINDS[:3], KINDS[3:4], KINDS[4:])):
            label = ("compute", "exchange", "waiting")[line]
            thread = {"ph": "M", "name": "thread_name", "pid": rank, "tid": line}
            events.append({**thread, "args": {"name": label}})
            events += [
                {
                    "ph": "X",
                    "name": f"{s.kind} {s.name}",
                    "cat": s.kind,
                    "pid": rank,
                    "tid": line,
                    "ts": s.start * 1e6,
                    "dur": s.seconds * 1e6,
                    "args": {"step": s.step},
                }
                for s in spans
                if s.kind in kinds
            ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def idle_fraction(ranks: Sequence[Sequence[Span]], step: int) -> float:
    """The share of a step that ranks, on average, neither compute nor wait within a computation.

    The step lasts from its first forward to its last backward of any rank; for pipeline stages this
    is the bubble.
    """
    busy, start, end = 0.0, float("inf"), 0.0
    for spans in ranks:
        for s in spans:
            if s.step == step and s.kind in ("forward", "backward"):
                busy += s.seconds
                start, end = min(start, s.start), max(end, s.start + s.seconds)
    return 1 - busy / ((end - start) * len(ranks))
