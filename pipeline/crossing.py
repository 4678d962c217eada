"""All communication between the two towers of a pair: each pattern forward and backward together.

A crossing layer reads the maps of both towers. Forward is an all-gather of what each tower has;
backward its transpose, a reduce-scatter: each tower works out its part of the gradient of the
other's maps, and the owner adds it. With two ranks both are one swap of equal pieces, started
before the work that does not need it and awaited after.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.convolution import gradients
from pipeline.products import wide
from pipeline.tracing import Trace, clock
from pipeline.waiting import TIMEOUT, all_reduce, settle, watch


class Pair:
    """The two towers of one replica and stage: this one, `tower` (0 or 1), and the other.

    `bytes_sent` and `waited` (seconds that this rank stood still for the other) add up over its
    life; on a GPU `waited` is the host's time only. Waiting longer than `timeout` seconds raises
    `waiting.Stuck`, which names `where`: the layer at work, as the layers themselves set it.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float = TIMEOUT) -> None:
        if group.size() != 2:
            raise ValueError(f"a pair is 2 towers, this group has {group.size()} ranks")
        watch(group, timeout)
        self.group = group
        self.tower = group.rank()
        self.timeout, self.where = timeout, "the first layer"
        self.trace = Trace()
        self.bytes_sent = 0
        self.waited = 0.0

    def swap(self, x: Tensor) -> Swap:
        """Starts sending x to the other tower and receiving its tensor of the same shape."""
        return Swap(self, x)

    def max_(self, x: Tensor) -> Tensor:
        """All-reduce in place: the larger of both towers' values."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def sum_(self, x: Tensor) -> Tensor:
        """All-reduce in place: the sum of both towers' values."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        start = clock()
        all_reduce(x, self.group, self.where, self.timeout, op)
        self.waited += clock() - start
        self.trace.add("exchange", self.where, start)
        self.trace.add("wait", self.where, start)
        self.bytes_sent += x.nbytes
        return x


class Swap:
    """An exchange under way; `wait` ends it and returns the other tower's tensor."""

    def __init__(self, pair: Pair, x: Tensor) -> None:
        # Channels-last elements lie as a contiguous [n, h, w, maps]: sent without a copy.
        self._channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        self._pair, self._where, self._start = pair, pair.where, clock()
        self._sent = x.permute(0, 2, 3, 1) if self._channels_last else x.contiguous()
        self._received = torch.empty_like(self._sent)
        other = 1 - pair.tower
        ops = [
            dist.P2POp(dist.isend, self._sent, group=pair.group, group_peer=other),
            dist.P2POp(dist.irecv, self._received, group=pair.group, group_peer=other),
        ]
        self._works = dist.batch_isend_irecv(ops)
        pair.bytes_sent += x.nbytes

    def wait(self) -> Tensor:
        start = clock()
        for work in self._works:
            settle(work, self._pair.group, self._where, self._pair.timeout)
        self._pair.waited += clock() - start
        self._pair.trace.add("exchange", self._where, self._start)
        self._pair.trace.add("wait", self._where, start)
        return self._received.permute(0, 3, 1, 2) if self._channels_last else self._received


def cross_linear(x: Tensor, weight: Tensor, bias: Tensor, pair: Pair) -> Tensor:
    """[n, own units] x [out, all units] -> [n, out]; the other half of the input is the other's."""
    return _CrossLinear.apply(x, weight, bias, pair)


def cross_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, pair: Pair
) -> Tensor:
    """[n, own maps, h, w] x [out, all maps, k, k] -> [n, out, h', w']."""
    return _CrossConv2d.apply(x, weight, bias, stride, padding, pair)


def _halves(weight: Tensor, tower: int) -> tuple[Tensor, Tensor]:
    """The weights for this tower's input and for the other's."""
    parts = weight.chunk(2, dim=1)
    return parts[tower], parts[1 - tower]


def _joined(own: Tensor, other: Tensor, tower: int) -> Tensor:
    """Two halves along dimension 1, tower 0's first."""
    return torch.cat((other, own) if tower else (own, other), dim=1)


def _backward(ctx: Any) -> None:
    """Says where the pair is, for the wait that may follow."""
    ctx.pair.where = f"{ctx.where}, backward"


class _CrossLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, pair: Pair) -> Tensor:
        swap = pair.swap(x)
        own, other = _halves(wide(weight), pair.tower)
        y = F.linear(wide(x), own, wide(bias))
        x_other = swap.wait()
        ctx.save_for_backward(x, x_other, weight)
        ctx.pair, ctx.where = pair, pair.where
        return y.addmm_(wide(x_other), other.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _backward(ctx)
        dtype = grad.dtype
        grad, x, x_other, weight = map(wide, (grad, *ctx.saved_tensors))
        own, other = _halves(weight, ctx.pair.tower)
        before, here = ctx.needs_input_grad[:2]  # the same in both towers: what is trained
        grad_x = grad_weight = grad_bias = None
        swap = ctx.pair.swap((grad @ other).to(dtype)) if before else None
        if here:
            grad_t = grad.t()
            grad_weight = _joined(grad_t @ x, grad_t @ x_other, ctx.pair.tower).to(dtype)
            grad_bias = grad.sum(0).to(dtype)
        if swap:
            grad_x = (grad @ own).add_(swap.wait()).to(dtype)
        return grad_x, grad_weight, grad_bias, None


class _CrossConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, pair: Pair
    ) -> Tensor:
        swap = pair.swap(x)
        own, other = _halves(weight, pair.tower)
        y = F.conv2d(wide(x), wide(own), wide(bias), stride, padding)
        x_other = swap.wait()
        ctx.save_for_backward(x, x_other, weight)
        ctx.pair, ctx.where, ctx.stride, ctx.padding = pair, pair.where, stride, padding
        return y.add_(F.conv2d(wide(x_other), wide(other), None, stride, padding)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _backward(ctx)
        x, x_other, weight = ctx.saved_tensors
        own, other = _halves(weight, ctx.pair.tower)

        before, here = ctx.needs_input_grad[:2]
        form = (ctx.stride, ctx.padding, 1)
        swap = None
        if before:
            swap = ctx.pair.swap(gradients(grad, x_other, other, *form, (True, False, False))[0])
        grad_x, grad_own, grad_bias = gradients(grad, x, own, *form, (before, here, here))
        grad_weight = None
        if here:
            grad_other = gradients(grad, x_other, other, *form, (False, True, False))[1]
            grad_weight = _joined(grad_own, grad_other, ctx.pair.tower)
        if swap:
            grad_x.add_(swap.wait())
        return grad_x, grad_weight, grad_bias, None, None, None
