"""Products of bfloat16 on a processor that is no faster at them than at float32's.

Without instructions for them torch takes 8 to 240 times as long as for float32, with those of
AVX-512 alone up to twice as long. A product of two bfloat16 numbers is exact in float32, so what
the instructions do can be had from float32: add up, and round the sum.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def lacks_bfloat16() -> bool:
    """Whether this processor has no instructions for them (that oneDNN, which uses them, finds)."""
    if not torch.backends.mkldnn.is_available():
        return True
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def slow_bfloat16() -> bool:
    """Whether this processor is such a one: AVX-512's instructions do no more products than Intel's
    two units for float32, AMX's eight times as many. By what it is, not by a clock, as a run that
    goes on has to go on with the same bits.
    """
    if lacks_bfloat16():
        return True
    about = Path("/proc/cpuinfo")
    intel = about.exists() and "GenuineIntel" in about.read_text()
    return intel and not torch.cpu._is_amx_tile_supported()


def wide(x: Tensor) -> Tensor:
    """A factor of a product as it is to be multiplied: in float32 if it is of bfloat16 and this
    processor is slow at those, else unchanged. What is made of it is to be rounded.
    """
    return x.float() if _slow(x) else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: [n, units] x [out, units] -> [n, out]."""
    return _Linear.apply(x, weight, bias) if _slow(x) else F.linear(x, weight, bias)


def _slow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and slow_bfloat16()


class _Linear(torch.autograd.Function):
    """Keeps the factors as they are, not the wide ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.float()
        return (
            (grad @ weight.float()).to(x.dtype) if of_x else None,
            (grad.t() @ x.float()).to(x.dtype) if of_weight else None,
            grad.sum(0).to(x.dtype) if of_bias else None,
        )
