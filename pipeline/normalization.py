"""Local response normalisation (paper, 3.3) with its exact gradient.

The sum over neighbouring maps is a product with a banded matrix of ones, in channels-last layout a
plain matrix product. It is done a few images at a time, so that what lies between stays in cache;
backward keeps nothing but the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.network import Norm

_CHUNK = 1 << 19  # elements at a time on the CPU: about 2 MB of float32


def normalize(x: Tensor, norm: Norm, columns: int = 1) -> Tensor:
    """Normalises x [n, maps, height, width] within each of `columns` equal groups of its maps."""
    if norm.spatial:
        window = F.avg_pool2d(x * x, norm.size, 1, norm.size // 2) * norm.size**2
        return x * (norm.k + norm.alpha * window).pow(-norm.beta)
    return _AcrossMaps.apply(x, norm, columns)


class _AcrossMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, columns: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x)
        ctx.norm, ctx.columns = norm, columns
        out = torch.empty_like(x)
        for a, y in zip(_rows(x, columns), _rows(out, columns), strict=True):
            wide = _wide(a)
            power, _ = _powers(wide, norm)
            y.copy_(power.mul_(wide))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # dL/da_i = g_i s_i^-b - 2 alpha b a_i * sum over j near i of g_j a_j s_j^(-b-1)
        (x,), norm = ctx.saved_tensors, ctx.norm
        grad = grad.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(x)
        chunks = (_rows(t, ctx.columns) for t in (x, grad, out))
        for a, g, o in zip(*chunks, strict=True):
            wide, up = _wide(a), _wide(g)
            power, inverse = _powers(wide, norm)
            power.mul_(up)
            inner = inverse.mul_(power).mul_(wide)
            near = inner @ _band(norm.size, wide)
            o.copy_(power.addcmul_(wide, near, value=-2 * norm.alpha * norm.beta))
        return out, None, None


def _rows(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Views of a channels-last tensor as chunks of [positions, maps of one column]."""
    maps = x.shape[1] // columns
    flat = x.permute(0, 2, 3, 1).reshape(-1, maps)
    return flat.split(max(1, _CHUNK // maps)) if x.device.type == "cpu" else (flat,)


def _wide(x: Tensor) -> Tensor:
    """At least float32: sixteen bits are too few to sum squares in."""
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
