"""Convolution with its gradients in the order and the pieces that are fastest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, groups: int
) -> Tensor:
    """`torch.nn.functional.conv2d` of square strides and paddings."""
    return _Conv2d.apply(x, weight, bias, stride, padding, groups)


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
