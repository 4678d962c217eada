"""Max-pooling (paper, 3.4) that keeps a byte for each maximum, and nothing of what it read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import native
from pipeline.network import Pool


def max_pool(x: Tensor, pool: Pool) -> Tensor:
    """The largest of each size x size positions of x [n, maps, height, width], stride apart:
    [n, maps, height', width'].
    """
    few = pool.size <= 16  # places of a window that a byte can tell apart
    # On a GPU torch's adds gradients up in any order, and keeps x and eight bytes everywhere.
    if not few or not (_kernels(x) or torch.are_deterministic_algorithms_enabled()):
        return F.max_pool2d(x, pool.size, pool.stride)
    return _MaxPool.apply(x, pool)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        n, maps, height, width = x.shape
        rows, columns = ((side - pool.size) // pool.stride + 1 for side in (height, width))
        y = _empty(x, (n, maps, rows, columns))
        place = torch.empty_like(y, dtype=torch.uint8)
        ctx.form = (maps, height, width, pool.size, pool.stride, rows, columns)
        ctx.save_for_backward(place)
        if kernels := _kernels(x):
            kernels.pool_forward(x, y, place, ctx.form)
            return y
        for k, near in _places(x, ctx.form):
            more = (near > y) | near.isnan() if k else torch.ones_like(y, dtype=torch.bool)
            y.copy_(torch.where(more, near, y))
            place.masked_fill_(more, k)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        maps, height, width, *_ = ctx.form
        out = _empty(grad, (len(grad), maps, height, width))
        if kernels := _kernels(grad):
            kernels.pool_backward(grad, place, out, ctx.form)
            return out, None
        total = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
        for k, near in reversed(list(_places(total, ctx.form))):  # a place's first window first
            near += grad.masked_fill(place != k, 0)
        return out.copy_(total), None


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Channels-last and no view: what follows may work in place."""
    last = torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=last)


def _kernels(x: Tensor) -> native.Kernels | None:
    return native.kernels(x, x.shape[1])


def _places(x: Tensor, form: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """Each place of a window, with what lies there of all windows of x."""
    *_, size, stride, rows, columns = form
    for k in range(size**2):
        top, left = divmod(k, size)
        yield k, x[:, :, top:, left:][:, :, : stride * rows : stride, : stride * columns : stride]
