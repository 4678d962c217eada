"""Pipeline stages: in which order micro-batches go through, what stages send one another, and
gradients summed over replicas.

`torch.distributed.pipelining` would do it for batches that divide into equal micro-batches, always
of one shape. Here the last batch of an epoch is trained on whatever its size, and evaluation has
other sizes again, so stages exchange tensors whose shapes follow from the table and the count.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.tracing import Trace, clock
from pipeline.waiting import TIMEOUT, all_reduce, settle, watch

Kind = Literal["1f1b", "gpipe"]
Action = tuple[Literal["forward", "backward"], int]


def order(kind: Kind, stage: int, stages: int, microbatches: int) -> list[Action]:
    """What a stage does, in turn, in a training step.

    gpipe: all forwards, then all backwards. 1f1b (one forward, one backward; Narayanan et al.
    2019): as many forwards as there are stages after this one, then one of each in turn, so that no
    stage keeps more micro-batches than stages follow it, itself included.
    """
    ahead = microbatches if kind == "gpipe" else min(microbatches, stages - stage - 1)
    actions: list[Action] = [("forward", m) for m in range(ahead)]
    for m in range(ahead, microbatches):
        actions += [("forward", m), ("backward", m - ahead)]
    return actions + [("backward", m) for m in range(microbatches - ahead, microbatches)]


class Line:
    """The stages of one replica and tower, as ranks of `down` (activations) and `up` (gradients).

    Two groups over the same ranks, so that on a GPU neither direction waits for the other's turn.
    `waited` (seconds that this rank stood still for another stage) and `bytes_sent` add up.
    """

    def __init__(
        self, down: dist.ProcessGroup, up: dist.ProcessGroup, timeout: float = TIMEOUT
    ) -> None:
        for group in (down, up):
            watch(group, timeout)
        self.down, self.up, self.timeout = down, up, timeout
        self.stage, self.stages = down.rank(), down.size()
        self.waited, self.bytes_sent = 0.0, 0
        self.trace = Trace()
        self._sent: dict[dist.ProcessGroup, deque[tuple[Any, Tensor]]] = {
            group: deque() for group in (down, up)
        }

    def send(self, x: Tensor) -> None:
        """Starts sending an activation to the next stage."""
        self._send(x, self.down, self.stage + 1)

    def send_gradient(self, x: Tensor) -> None:
        """Starts sending a gradient to the stage before."""
        self._send(x, self.up, self.stage - 1)

    def receive(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An activation of the stage before, of this shape, in the dtype and place of `like`."""
        return self._receive(shape, like, self.down, self.stage - 1)

    def receive_gradient(self, like: Tensor) -> Tensor:
        """The gradient of `like` from the next stage."""
        return self._receive(tuple(like.shape), like, self.up, self.stage + 1)

    def finish(self) -> None:
        """Waits until all that was sent is gone, so that the memory may be used again."""
        for group in self._sent:
            self._settle(group, 0)

    def sum_(self, x: Tensor, what: str) -> Tensor:
        """All-reduce in place over the stages."""
        return all_reduce(x, self.down, what, self.timeout)

    def _send(self, x: Tensor, group: dist.ProcessGroup, to: int) -> None:
        # Or all micro-batches' would stay in memory. In either order nobody waits: by now the other
        # stage has taken what is as old, or takes it next.
        self._settle(group, self.stages)
        flat = _channels_last(x).contiguous()
        self._sent[group].append((dist.isend(flat, group=group, group_dst=to), flat))
        self.bytes_sent += flat.nbytes

    def _settle(self, group: dist.ProcessGroup, most: int) -> None:
        """Waits until at most so many tensors are on their way."""
        while len(self._sent[group]) > most:
            work, _ = self._sent[group].popleft()
            settle(work, group, f"stage {self.stage}, sending", self.timeout)

    def _receive(
        self, shape: tuple[int, ...], like: Tensor, group: dist.ProcessGroup, source: int
    ) -> Tensor:
        start = clock()
        if len(shape) == 4:
            shape = (shape[0], shape[2], shape[3], shape[1])
        x = torch.empty(shape, dtype=like.dtype, device=like.device)
        work = dist.irecv(x, group=group, group_src=source)
        what = "activations" if group is self.down else "gradients"
        settle(work, group, f"stage {self.stage}, {what} of stage {source}", self.timeout)
        self.waited += clock() - start
        self.trace.add("wait", what, start)
        return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


def _channels_last(x: Tensor) -> Tensor:
    """Images as [n, h, w, maps], as they lie in memory."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


class Reducer:
    """Adds up gradients over replicas while backward still runs.

    Each all-reduce starts once its gradient is complete, in the same order on every replica.
    """

    def __init__(
        self, weights: dict[str, torch.nn.Parameter], group: dist.ProcessGroup, timeout: float
    ) -> None:
        self.group, self.timeout = group, timeout
        self._names = [name for name in reversed(weights) if weights[name].requires_grad]
        self._order = [weights[name] for name in self._names]
        self._armed = False
        self._ready: set[torch.nn.Parameter] = set()
        self._works: list[Any] = []
        for p in self._order:
            p.register_post_accumulate_grad_hook(self._complete)

    def arm(self) -> None:
        """The next backward is the step's last: gradients are complete as they come."""
        self._armed = True

    def finish(self) -> None:
        """Waits for all; a replica that had no image takes part with zeros."""
        for p in self._order:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self._ready.add(p)
        self._start()
        for name, work in zip(self._names, self._works, strict=True):
            settle(work, self.group, f"{name} over replicas", self.timeout)
        self._works.clear()
        self._ready.clear()
        self._armed = False

    def _complete(self, p: torch.nn.Parameter) -> None:
        if self._armed:
            self._ready.add(p)
            self._start()

    def _start(self) -> None:
        while len(self._works) < len(self._order):
            p = self._order[len(self._works)]
            if p not in self._ready:
                return
            assert p.grad is not None
            self._works.append(dist.all_reduce(p.grad, group=self.group, async_op=True))
