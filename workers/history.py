"""How a run went, out of its files."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from workers.claims import GOAL
from workers.run import EVENTS, METRICS, read_lines

WINDOW = 2500  # training images that an error is the mean of, at least


@dataclass(frozen=True)
class History:
    """`done`: the run came to its end, or to its goal; `curve`: errors in training as (step,
    error); `steps` of an epoch; the step that `reached` the goal first, None if none did; seconds a
    step; the error at the end, nan before it.
    """

    run: str
    done: bool
    curve: list[tuple[int, float]]
    steps: int
    reached: int | None
    step_seconds: float
    top1_error: float

    @property
    def seed(self) -> str:
        """What the run's name ends in."""
        return self.run.rpartition("-seed")[2]


def read_history(run: str, *, goal: bool) -> History:
    """The history of a run, which is done at its `goal` already if it has one.

    Raises DataError if a file of it is damaged.
    """
    metrics, events = read_lines(run, METRICS), read_lines(run, EVENTS)
    lines = _once([line for line in metrics if line["split"] == "train"], events)
    evaluations = [line for line in metrics if line["split"] != "train"]
    curve = _curve(lines)
    reached = next((step for step, error, whole in curve if whole and error <= GOAL), None)
    end = next((event for event in reversed(events) if event["event"] == "end"), None)
    seconds = [
        later["seconds"] / (later["step"] - earlier["step"])
        for earlier, later in pairwise(lines)
        if not later["begun"]
    ]
    return History(
        run,
        bool((goal and reached) or end),
        [(step, error) for step, error, _ in curve],
        next((round(e["step"] / (e["epoch"] + 1)) for e in evaluations), 1),
        reached,
        median(seconds) if seconds else math.nan,
        end["top1_error"] if end else math.nan,
    )


def _once(lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of all steps in order, those that a run did again after a loss as it did them last;
    `begun`: whether it is the first line since the run began or went on.
    """
    found: list[dict[str, Any]] = []
    starts = [event for event in events if event["event"] == "start"]
    begun = True
    for line in sorted([*starts, *lines], key=lambda line: line["time"]):
        if "event" in line:
            begun = True
            while found and found[-1]["step"] > line["step"]:
                found.pop()
        else:
            found.append({**line, "begun": begun})
            begun = False
    return found


def _curve(lines: list[dict[str, Any]]) -> list[tuple[int, float, bool]]:
    """Step, mean error over the window up to it, and whether that is a whole one."""
    window, curve = deque[tuple[float, float]](), []
    for line in lines:
        images = line["images_per_second"] * line["seconds"]
        window.append((images, images * line["top1_error"]))
        while sum(n for n, _ in window) - window[0][0] >= WINDOW:
            window.popleft()
        seen = sum(n for n, _ in window)
        if seen:
            wrong = sum(w for _, w in window)
            curve.append((line["step"], wrong / seen, seen >= WINDOW))
    return curve
