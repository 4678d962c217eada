"""Max-pooling (paper, 3.4) that keeps a byte for each maximum, and nothing of what it read."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import native
from pipeline.network import Pool


def max_pool(x: Tensor, pool: Pool) -> Tensor:
    """The largest of each size x size positions of x [n, maps, height, width], stride apart."""
    if native.kernels(x) is None or x.shape[1] > native.MOST or pool.size > 16:
        return F.max_pool2d(x, pool.size, pool.stride)  # keeps x and eight bytes
    return _MaxPool.apply(x, pool)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        n, maps, height, width = x.shape
        rows, columns = ((side - pool.size) // pool.stride + 1 for side in (height, width))
        y = x.new_empty((n, rows, columns, maps)).permute(0, 3, 1, 2)
        place = torch.empty((n, rows, columns, maps), dtype=torch.uint8)
        ctx.form = (maps, height, width, pool.size, pool.stride, rows, columns)
        ctx.save_for_backward(place)
        _call("pool_forward", (x, y, place), x, ctx.form)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        maps, height, width, *_ = ctx.form
        out = grad.new_empty((len(grad), height, width, maps)).permute(0, 3, 1, 2)
        _call("pool_backward", (grad, place, out), grad, ctx.form)
        return out, None


def _call(name: str, tensors: tuple[Tensor, ...], like: Tensor, form: tuple[int, ...]) -> None:
    kernels = native.kernels(like)
    assert kernels
    getattr(kernels, name)(
        *(x.data_ptr() for x in tensors),
        len(like),
        (ctypes.c_int * len(form))(*form),
        like.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
