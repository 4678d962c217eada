"""Which rows make which batch: pure functions of row groups, seed, epoch and batch size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from datasets.randomness import stream

RowNumbers = NDArray[np.int64]

WINDOW = 2048
"""Rows within which an epoch is shuffled, or a few more."""


class Plan:
    """The batches of one epoch over row groups of `groups` rows each.

    Row groups are permuted, and then rows within windows: runs of permuted row groups of `window`
    rows or more, so that a reader holds a window and never goes back to a group. Batches are
    counted from 0; the last may be short.
    Nothing is read, and `batch_rows(k)` works out only the windows that batch k touches.
    Raises ValueError, naming the value, for a batch or window below 1 or a negative group.
    """

    def __init__(
        self,
        groups: Sequence[int] | RowNumbers,
        batch: int,
        *,
        seed: int,
        epoch: int,
        window: int = WINDOW,
    ) -> None:
        sizes = np.asarray(groups, np.int64)
        for name, value in (("batch", batch), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}: 1 or more")
        if (sizes < 0).any():
            raise ValueError(f"groups has one of {sizes.min()} rows: 0 or more")
        self.batch, self.seed, self.epoch = batch, seed, epoch
        self.rows = int(sizes.sum())
        self.batches = -(-self.rows // batch)
        order = stream("groups", seed, epoch).permutation(len(sizes))
        self._starts = (np.cumsum(sizes) - sizes)[order]
        self._sizes = sizes[order]
        self._windows = _windows(self._sizes, window)
        self._ends = np.cumsum(self._sizes)[self._windows[1:] - 1]
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)

    def batch_rows(self, k: int) -> RowNumbers:
        """The rows of batch k, int64 [n], counted within the split in file order.

        Raises IndexError if there is no batch k.
        """
        if not 0 <= k < self.batches:
            raise IndexError(f"batch {k} of {self.batches}")
        start, stop = k * self.batch, min((k + 1) * self.batch, self.rows)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        rows = np.concatenate([self._shuffled(w) for w in range(first, last + 1)])
        skipped = int(self._ends[first - 1]) if first else 0
        return rows[start - skipped : stop - skipped]

    def _shuffle(self, w: int) -> RowNumbers:
        groups = range(self._windows[w], self._windows[w + 1])
        rows = [np.arange(self._starts[g], self._starts[g] + self._sizes[g]) for g in groups]
        return stream("rows", self.seed, self.epoch, w).permutation(np.concatenate(rows))


def _windows(sizes: RowNumbers, window: int) -> RowNumbers:
    """Where windows begin among the groups, and the end: a group opens one if the last is full."""
    ends = np.cumsum(sizes)
    # For each group: the one after the first that fills a window which begins with it.
    following = np.searchsorted(ends, ends - sizes + window) + 1
    bounds, group = [], 0
    while group < len(sizes):
        bounds.append(group)
        group = int(following[group])
    return np.array([*bounds, len(sizes)])


@dataclass(frozen=True)
class Item:
    """One batch of a run: of which split, which batch of which epoch (both from 0).

    `step` is the number of training steps done once this item is: for a training item its own
    number, from 1; for an evaluation item that of the step it follows. `last`: it ends its epoch
    or its evaluation.
    """

    split: str
    epoch: int
    batch: int
    step: int
    last: bool

    @property
    def training(self) -> bool:
        """Whether weights are to change."""
        return self.split == "train"


class Itinerary:
    """A whole run as one sequence of batches: an epoch, an evaluation, the next epoch, ...

    `train_groups` and those of `held_out` (the split's name and row groups) are rows per row
    group. Evaluation reads the held-out split in file order after every epoch and
    after the last training batch, which `steps` may cut short. Raises ValueError, naming the
    value, if something is below 1 or the training split is empty. `held_out` is the evaluated
    split's name, None if there is none or it has no rows.
    """

    def __init__(
        self,
        train_groups: Sequence[int],
        held_out: tuple[str, Sequence[int]] | None,
        *,
        batch: int,
        seed: int,
        epochs: int,
        steps: int | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("epochs", epochs)):
            if value < 1:
                raise ValueError(f"{name} is {value}: 1 or more")
        if steps is not None and steps < 1:
            raise ValueError(f"steps is {steps}: 1 or more")
        if held_out and held_out[0] == "train":
            raise ValueError("held_out is 'train': another split")
        self.train_groups, self.batch, self.seed = np.asarray(train_groups, np.int64), batch, seed
        self.steps_per_epoch = -(-int(self.train_groups.sum()) // batch)
        if not self.steps_per_epoch:
            raise ValueError("train_groups holds no row: 1 or more")
        self.total_steps = min(
            epochs * self.steps_per_epoch, steps or epochs * self.steps_per_epoch
        )
        self._held_out_groups = tuple(held_out[1]) if held_out else ()
        self._passes = -(-sum(self._held_out_groups) // batch)
        self.held_out = held_out[0] if held_out and self._passes else None
        self._plans: dict[int, Plan] = {}

    def __len__(self) -> int:
        return self.after(self.total_steps, True)

    @property
    def order(self) -> dict[str, int | str]:
        """All that decides which training rows are in which batch: a step is the same position in
        the data only where these are the same.
        """
        groups = self.train_groups
        digest = blake2b(groups.astype("<i8").tobytes(), digest_size=4).hexdigest()
        return {
            "seed": self.seed,
            "batch": self.batch,
            "training images": int(groups.sum()),
            "row groups": f"{len(groups)} ({digest})",
        }

    def after(self, step: int, evaluated: bool) -> int:
        """Index of the item that comes after `step` training steps and, if `evaluated`, after
        the evaluation that follows them (if one does).

        Raises ValueError if the run has no such step.
        """
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"step is {step}: 0 to {self.total_steps}")
        done = max(step - 1, 0) // self.steps_per_epoch
        due = step > 0 and (step % self.steps_per_epoch == 0 or step == self.total_steps)
        return step + self._passes * (done + (evaluated and due))

    def item(self, i: int) -> Item:
        """Item i. Raises IndexError if there is none."""
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        # The first step whose training item lies at i or later; an item before it is an evaluation.
        step = 1 + bisect_left(
            range(1, self.total_steps + 1), i, key=lambda step: self.after(step, False) - 1
        )
        if step <= self.total_steps and self.after(step, False) - 1 == i:
            epoch, batch = divmod(step - 1, self.steps_per_epoch)
            last = batch == self.steps_per_epoch - 1 or step == self.total_steps
            return Item("train", epoch, batch, step, last)
        assert self.held_out is not None
        step -= 1
        batch = i - self.after(step, False)
        epoch = (step - 1) // self.steps_per_epoch
        return Item(self.held_out, epoch, batch, step, batch == self._passes - 1)

    def rows(self, i: int) -> RowNumbers:
        """Rows of item i, int64 [n], counted within its split in file order."""
        item = self.item(i)
        if item.training:
            return self._plan(item.epoch).batch_rows(item.batch)
        start = item.batch * self.batch
        stop = min(start + self.batch, sum(self._held_out_groups))
        return np.arange(start, stop, dtype=np.int64)

    def _plan(self, epoch: int) -> Plan:
        """The plan of an epoch; those of the last two are kept, as a stream goes from one on to the
        next.
        """
        if epoch not in self._plans:
            plan = Plan(self.train_groups, self.batch, seed=self.seed, epoch=epoch)
            self._plans = {**dict(list(self._plans.items())[-1:]), epoch: plan}
        return self._plans[epoch]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_plans": {}}
