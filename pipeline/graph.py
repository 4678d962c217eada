"""Forward and backward as one launch: a CUDA graph, recorded once and replayed.

A step of `alexnet` is some two hundred kernels, and a GPU is through with a hundred images before
its host has asked for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Work = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Sets the gradients of weights, given a batch's tensors and numbers (int64 []); returns sums."""


class Graph:
    """Does `work`, which must not wait for the GPU, for batch after batch.

    The first batch of a size is worked through as it comes, which compiles what has to be; the
    second of one size is recorded, and all of that size are replayed from then on, their gradients
    in the same memory each time.
    """

    def __init__(self, work: Work, weights: Iterable[nn.Parameter]) -> None:
        self._work = work
        self._weights = [p for p in weights if p.requires_grad]
        self._sizes: set[int] = set()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        """The sums of `work` for a batch that has images along dimension 0 of each tensor, on any
        device; they lie where the next call may overwrite them.
        """
        size = len(batch[-1])
        if not self._graph and size in self._sizes:
            self._record(batch, numbers)
        if self._graph and size == len(self._batch[-1]):
            for held, new in zip(self._batch, batch, strict=True):
                held.copy_(new, non_blocking=True)
            for number, value in zip(self._numbers, numbers, strict=True):
                number.fill_(value)
            self._graph.replay()
            for p, grad in zip(self._weights, self._gradients, strict=True):
                p.grad = grad
            return self._sums
        self._sizes.add(size)
        return self._work(*self._copied(batch, numbers))

    def _record(self, batch: Sequence[Tensor], numbers: Sequence[int]) -> None:
        self._batch, self._numbers = self._copied(batch, numbers)
        self._graph = torch.cuda.CUDAGraph()
        # The thread that brings the next batch may go on allocating.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._sums = self._work(self._batch, self._numbers)
        self._gradients = [p.grad for p in self._weights]

    def _copied(
        self, batch: Sequence[Tensor], numbers: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A batch on the GPU, not yet worked through."""
        for p in self._weights:
            p.grad = None
        device = self._weights[0].device
        # Filled, as a copy from the host would wait.
        made = [torch.full((), n, dtype=torch.int64, device=device) for n in numbers]
        return [t.to(device, non_blocking=True, copy=True) for t in batch], made
