"""Convolution with its gradients in the order, the pieces and the shapes that are fastest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, groups: int
) -> Tensor:
    """`torch.nn.functional.conv2d` of square strides and paddings."""
    if not x.is_cuda:
        return _Conv2d.apply(x, weight, bias, stride, padding, groups)
    if groups > 1:  # cuDNN takes three times as long for two groups at once as for each in turn
        parts = (t.chunk(groups) for t in (weight, bias))
        whole = (_channels_last(part) for part in x.chunk(groups, 1))
        made = [conv2d(a, w, b, stride, padding, 1) for a, w, b in zip(whole, *parts, strict=True)]
        return torch.cat(made, 1)
    if x.shape[1] < 8 and stride > 1:
        x, weight = folded(x, weight, stride, padding)
        stride, padding = 1, 0
    return _Conv2d.apply(x, weight, bias, stride, padding, 1)


def folded(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """The same convolution with stride 1, over stride x stride pixels as maps of one.

    Tensor cores take eight maps at a time and leave three pixels' colours to slow code. The kernel
    grows by zeros to a multiple of the stride.
    """
    side = -(-weight.shape[2] // stride)  # of the kernel, in blocks
    ends = []
    for length in x.shape[3:1:-1]:
        made = (length + 2 * padding - weight.shape[2]) // stride + 1
        ends += [padding, (made - 1 + side) * stride - length - padding]
    x = F.pad(x, ends)
    more = side * stride - weight.shape[2]
    weight = F.pad(weight, (0, more, 0, more))
    return _blocks(x, stride), _blocks(weight, stride)


def _blocks(x: Tensor, side: int) -> Tensor:
    """[n, maps, h, w] to [n, side * side * maps, h / side, w / side], channels-last."""
    n, maps, height, width = x.shape
    x = x.reshape(n, maps, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(n, height // side, width // side, -1).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    groups: int = 1,
    mask: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of x, weight and bias; what `mask` leaves out is undefined."""
    # oneDNN sums the bias's inside a float32 product of few channels, and takes twice as long.
    apart = mask[2] and grad.dtype != torch.bfloat16
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
    return of_x, of_weight, grad.sum((0, 2, 3)) if apart else of_bias


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, groups: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.form = (stride, padding, groups)
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, groups = ctx.form
        mask = ctx.needs_input_grad[:3]
        return *gradients(grad, x, weight, stride, padding, groups, mask), None, None, None
