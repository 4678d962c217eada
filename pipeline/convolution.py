"""Convolution with its gradients in the order, the pieces and the shapes that are fastest."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import native
from pipeline.products import wide


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    groups: int,
    rectified: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv2d` of square strides and paddings: x [n, maps, h, w] and weight
    [out, maps / groups, k, k] to [n, out, h', w'].

    If what it makes is `rectified` next, zeros may stand for what is below: cuDNN adds the bias and
    rectifies while it writes, which saves two passes over memory.
    """
    if x.is_cuda:
        weight, groups = dense(weight, groups), 1
        if x.shape[1] < 8 and stride > 1 and not x.requires_grad:
            x, weight = folded(x, weight, stride, padding)
            stride, padding = 1, 0
    return _Conv2d.apply(x, weight, bias, (stride, padding, groups), rectified)


def dense(weight: Tensor, groups: int) -> Tensor:
    """The weights of a convolution without groups that is the same: [out, maps / groups, k, k] to
    [out, maps, k, k] with zeros between the groups.

    On a GPU it does twice the work in less time: cuDNN has fast code for whole tensors alone.
    """
    if groups == 1:
        return weight
    maps = weight.shape[1]
    rows = [
        F.pad(part, (0, 0, 0, 0, i * maps, (groups - 1 - i) * maps))
        for i, part in enumerate(weight.chunk(groups))
    ]
    return torch.cat(rows).contiguous(memory_format=torch.channels_last)


def folded(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """The same convolution with stride 1 and no padding, over stride x stride pixels as maps of
    one: `x` [n, maps, h, w] and `weight` [out, maps, k, k], both by `fold`.

    Tensor cores take many maps at a time and leave three pixels' colours to slow code. The kernel
    grows by zeros to a multiple of the stride, maps to one of 32.
    """
    kernel = weight.shape[2]
    side = -(-kernel // stride)  # of the kernel, in blocks
    height, width = ((n + 2 * padding - kernel) // stride + side for n in x.shape[2:])
    return fold(x, stride, padding, height, width), fold(weight, stride, 0, side, side)


def fold(x: Tensor, side: int, before: int, height: int, width: int) -> Tensor:
    """Blocks of side x side places as one with the maps of all and zeros up to a multiple of 32:
    [n, maps, h, w] to [n, wide, height, width] in channels-last layout, from `before` zeros on.
    """
    n, maps = x.shape[:2]
    wide = -(-maps * side * side // 32) * 32
    kernels = native.gpu_kernels() if x.is_cuda and not x.requires_grad else None
    if kernels and x.is_contiguous(memory_format=torch.channels_last):
        out = x.new_empty((n, height, width, wide)).permute(0, 3, 1, 2)
        kernels.fold(x, out, side, before)
        return out
    ends = (width * side - x.shape[3] - before, height * side - x.shape[2] - before)
    x = F.pad(x, (before, ends[0], before, ends[1]))
    x = x.reshape(n, maps, height, side, width, side).permute(0, 2, 4, 3, 5, 1)
    x = F.pad(x.reshape(n, height, width, -1), (0, wide - maps * side * side))
    return x.contiguous().permute(0, 3, 1, 2)


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    groups: int = 1,
    mask: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of x, weight and bias, in the dtype of `grad`; None for what `mask` leaves out."""
    dtype = grad.dtype
    grad, x, weight = map(wide, (grad, x, weight))
    # oneDNN sums the bias's inside a float32 product of few channels, and takes twice as long.
    apart = mask[2] and (grad.is_cuda or grad.dtype != torch.bfloat16)
    both = [mask[0], mask[1], mask[2] and not apart]
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [weight.shape[0]],
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        False,
        [0, 0],
        groups,
        both,
    )
    if apart:
        of_bias = _summed(grad)
    if grad.dtype != dtype:
        of_x, of_weight, of_bias = (
            g if g is None else g.to(dtype) for g in (of_x, of_weight, of_bias)
        )
    return of_x, of_weight, of_bias


def _summed(grad: Tensor) -> Tensor:
    """Over all but the maps."""
    kernels = native.gpu_kernels() if grad.is_cuda and grad.dtype != torch.float64 else None
    if kernels and grad.is_contiguous(memory_format=torch.channels_last):
        return kernels.sum_rows(grad, grad.shape[1])
    return grad.sum((0, 2, 3))


@cache
def _rectifies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN convolves and rectifies in one there, bfloat16 since Ampere."""
    if not torch.version.cuda or dtype == torch.float64:
        return False
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) >= (8, 0)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        form: tuple[int, int, int],
        rectified: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.form = stride, padding, groups = form
        if rectified and x.is_cuda and _rectifies(x.device, x.dtype):
            both = [stride] * 2, [padding] * 2, [1, 1], groups
            return torch.cudnn_convolution_relu(x, weight, bias, *both)
        y = F.conv2d(wide(x), wide(weight), wide(bias), stride, padding, groups=groups)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (stride, padding, groups) = ctx.saved_tensors, ctx.form
        mask = ctx.needs_input_grad[:3]
        return *gradients(grad, x, weight, stride, padding, groups, mask), None, None
