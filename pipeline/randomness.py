"""Counter-based draws: what is drawn depends on its key and place, never on who draws or when."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from pipeline import native


def key(*parts: int | str) -> int:
    """A 63-bit key for these parts, e.g. (seed, "dropout", step, "fc6")."""
    # NumPy's integers have another repr than Python's.
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    digest = blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal(
    shape: tuple[int, ...], std: float, *parts: int | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """N(0, std) of this shape on the CPU, drawn in float32 whatever `dtype` it ends in."""
    generator = torch.Generator().manual_seed(key(*parts))
    return torch.empty(shape).normal_(0, std, generator=generator).to(dtype)


def keep_mask(
    rows: Tensor, start: int, units: int, width: int, drop: float, draw: int | Tensor
) -> Tensor:
    """Which of `units` outputs from `start` on, of `width` in the whole layer, are kept.

    `rows` int64 [n]: places in the global batch. `draw`: a `key`, or int64 [] that holds one on the
    device of `rows`. Returns bool [n, units] there, true with probability 1 - drop. One process
    that asks for the whole layer and two that ask for a half each get the same bits.
    """
    bar = round(drop * 2**24)  # 24 bits of the hash are plenty for a rate, and compare exactly
    if rows.is_cuda and (kernels := native.gpu_kernels()):
        if isinstance(draw, int):  # filled, as a copy from the host would wait
            draw = torch.full((), draw, dtype=torch.int64, device=rows.device)
        return kernels.keep_mask(rows, start, units, width, draw, bar)
    low, high = draw & 0x7FFFFFFF, (draw >> 31) & 0x7FFFFFFF
    unit = torch.arange(start, start + units, device=rows.device)
    counter = (rows[:, None] * width + unit).to(torch.int32)
    bits = mix(mix(counter ^ low) + high)
    return ((bits >> 8) & 0xFFFFFF) >= bar


def mix(x: Tensor) -> Tensor:
    """The finaliser `lowbias32` of Chris Wellons' hash prospector, in wrapping int32."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
