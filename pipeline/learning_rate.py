"""Schedules of the learning rate, as pure functions of where a run is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """The rate as a pure function of where the run is.

    `steps`: divided by 10 at each of `drops` (epochs). `plateau`: divided by 10 each time that the
    validation error has not fallen for `patience` evaluations, three times at most (paper, 5).
    `warmup`: a linear rise over that many steps at the start.
    """

    rate: float
    kind: Literal["steps", "plateau"] = "plateau"
    drops: tuple[float, ...] = ()
    patience: int = 3
    warmup: int = 0

    def at(self, step: int, epoch: float, errors: Sequence[float]) -> float:
        """The rate of a step (from 0) at `epoch`, given the validation errors so far, in order."""
        if self.kind == "steps":
            drops = sum(epoch >= drop for drop in self.drops)
        else:
            drops = min(3, plateaus(errors, self.patience))
        return self.rate * 0.1**drops * min(1.0, (step + 1) / (self.warmup + 1))


def plateaus(errors: Sequence[float], patience: int) -> int:
    """How often the error stopped falling: `patience` evaluations in a row that were no better.

    One of which all images were skipped, nan, says nothing.
    """
    best, waited, count = math.inf, 0, 0
    for error in errors:
        if math.isnan(error):
            continue
        waited = 0 if error < best else waited + 1
        best = min(best, error)
        if waited == patience:
            count, waited = count + 1, 0
    return count
