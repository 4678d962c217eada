"""Local response normalisation (paper, 3.3) with its exact gradient.

Compiled (`native.py`) it is one pass over memory each way. Where that cannot be had, the sum over
neighbouring maps is a product with a banded matrix of ones, in channels-last layout a plain matrix
product, on a processor done a few images at a time, so that what lies between stays in cache.
Either way backward keeps nothing but the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import native
from pipeline.network import Norm

_CHUNK = 1 << 19  # elements at a time on the CPU: about 2 MB of float32


def normalize(x: Tensor, norm: Norm, columns: int = 1, rectify: bool = False) -> Tensor:
    """Normalises x [n, maps, height, width] within each of `columns` equal groups of its maps.

    With `rectify` it is max(x, 0) that is normalised: ReLU then costs no pass over memory.
    """
    if norm.spatial:
        return _AcrossPositions.apply(x.relu() if rectify else x, norm)
    return _AcrossMaps.apply(x, norm, columns, rectify)


class _AcrossPositions(torch.autograd.Function):
    # The gradient is as below. torch's own of a window's sum is wrong on a GPU in channels-last
    # layout (2.11); the sum over a symmetric window is its own transpose.
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        wide = _wide(x)
        s = _around(wide * wide, norm).mul_(norm.alpha).add_(norm.k)
        return s.pow_(-norm.beta).mul_(wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        norm = ctx.norm
        wide, up = _wide(ctx.saved_tensors[0]), _wide(grad)
        s = _around(wide * wide, norm).mul_(norm.alpha).add_(norm.k)
        near = _around(up * wide * s.pow(-norm.beta - 1), norm)
        found = s.pow_(-norm.beta).mul_(up)
        return found.addcmul_(wide, near, value=-2 * norm.alpha * norm.beta).to(grad.dtype), None


def _around(x: Tensor, norm: Norm) -> Tensor:
    """The sum over size x size positions around each."""
    return F.avg_pool2d(x, norm.size, 1, norm.size // 2, divisor_override=1)


class _AcrossMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, columns: int, rectify: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x)
        ctx.norm, ctx.columns, ctx.rectify = norm, columns, rectify
        out = torch.empty_like(x)
        if _compiled(x, None, out, norm, columns, rectify):
            return out
        for a, y in zip(_rows(x, columns), _rows(out, columns), strict=True):
            wide = _wide(a, rectify)
            power, _ = _powers(wide, norm)
            y.copy_(power.mul_(wide))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # dL/da_i = g_i s_i^-b - 2 alpha b a_i * sum over j near i of g_j a_j s_j^(-b-1)
        (x,), norm, rectify = ctx.saved_tensors, ctx.norm, ctx.rectify
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(x)
        if _compiled(x, grad, out, norm, ctx.columns, rectify):
            return out, None, None, None
        chunks = (_rows(t, ctx.columns) for t in (x, grad, out))
        for a, g, o in zip(*chunks, strict=True):
            wide, up = _wide(a, rectify), _wide(g)
            power, inverse = _powers(wide, norm)
            power.mul_(up)
            inner = inverse.mul_(power).mul_(wide)
            near = inner @ _band(norm.size, wide)
            power.addcmul_(wide, near, value=-2 * norm.alpha * norm.beta)
            o.copy_(power.masked_fill_(wide == 0, 0) if rectify else power)
        return out, None, None, None


def _compiled(
    x: Tensor, grad: Tensor | None, out: Tensor, norm: Norm, columns: int, rectify: bool
) -> bool:
    """Whether compiled code took it: the forward pass, or with `grad` the backward one."""
    maps = x.shape[1] // columns
    kernels = native.kernels(x, maps, norm.size)
    if kernels is None or norm.beta not in (0.5, 0.75, 1.0):
        return False
    kernels.lrn(x, grad, out, maps, norm, rectify)
    return True


def _rows(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Views of a channels-last tensor as chunks of [positions, maps of one column]."""
    maps = x.shape[1] // columns
    flat = x.permute(0, 2, 3, 1).reshape(-1, maps)
    return flat.split(max(1, _CHUNK // maps)) if x.device.type == "cpu" else (flat,)


def _wide(x: Tensor, rectify: bool = False) -> Tensor:
    """At least float32: sixteen bits are too few to sum squares in."""
    x = x.relu() if rectify else x
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _powers(a: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """s^-beta and 1/s for s = k + alpha * window sum of a^2."""
    s = torch.addmm(a.new_full((), norm.k), a * a, _band(norm.size, a), alpha=norm.alpha)
    if norm.beta == 0.75:
        root = s.rsqrt()
        return root * root.sqrt(), root.square_()
    return s.pow(-norm.beta), s.reciprocal()


def _band(size: int, like: Tensor) -> Tensor:
    """ones[i, j] where maps i and j are at most size // 2 apart."""
    place = torch.arange(like.shape[1], device=like.device)
    return ((place[:, None] - place).abs() <= size // 2).to(like.dtype)
