"""What a GPU alone has kernels for, in Triton: torch would launch several for each, or slow ones.

native.py has the contract, as for kernels.py, and imports this where that one works.
"""

# mypy: disable-error-code="no-untyped-def,var-annotated,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MANY = 1024  # elements of a block
_PARTS = 512  # that a long sum is cut into: a few for each multiprocessor
# Whatever their values, or an epoch's last batch and some steps would be compiled for anew.
_once = triton.jit(do_not_specialize=["places", "start", "bar", "rows", "blocks", "scale"])


def keep_mask(rows: Tensor, start: int, units: int, width: int, draw: Tensor, bar: int) -> Tensor:
    keep = rows.new_empty((len(rows), units), dtype=torch.bool)
    grid = (-(-keep.numel() // _MANY),)
    numbers = (keep.numel(), start, bar)
    _keep_mask[grid](rows, keep, draw, *numbers, UNITS=units, WIDTH=width, MANY=_MANY)
    return keep


def pixels(crops: Tensor, shifts: Tensor, mean: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    crops, shifts = crops.contiguous(), shifts.contiguous()
    out = torch.empty(crops.shape, dtype=dtype, device=crops.device)
    each = mean.numel()
    turns = -(-each // _MANY)  # of an image
    grid = (len(crops) * turns,)
    _pixels[grid](crops, shifts, mean, out, scale, EACH=each, TURNS=turns, MANY=_MANY)
    return out


def fold(x: Tensor, out: Tensor, side: int, before: int) -> None:
    shape = dict(zip(("MAPS", "HEIGHT", "WIDTH"), x.shape[1:], strict=True))
    shape |= dict(zip(("WIDE", "LINES", "COLUMNS"), out.shape[1:], strict=True))
    blocks, full = out.numel() // out.shape[1], triton.next_power_of_2(out.shape[1])
    at_once = max(1, _MANY // full)
    grid = (-(-blocks // at_once),)
    _fold[grid](x, out, blocks, **shape, SIDE=side, BEFORE=before, FULL=full, AT_ONCE=at_once)


def sum_rows(x: Tensor, maps: int) -> Tensor:
    rows, full = x.numel() // maps, triton.next_power_of_2(maps)
    at_once = max(1, 4 * _MANY // full)
    each = max(at_once, triton.next_power_of_2(-(-rows // _PARTS)))
    parts = x.new_empty((-(-rows // each), maps), dtype=torch.float32)
    sizes = {"MAPS": maps, "FULL": full, "EACH": each, "AT_ONCE": at_once}
    _sum_rows[(len(parts),)](x, parts, rows, **sizes)
    return parts.sum(0).to(x.dtype)


@_once
def _pixels(
    crops,
    shifts,
    mean,
    out,
    scale,
    EACH: tl.constexpr,
    TURNS: tl.constexpr,
    MANY: tl.constexpr,
):
    image = tl.program_id(0) // TURNS
    place = tl.program_id(0) % TURNS * MANY + tl.arange(0, MANY)
    there = place < EACH
    offset = tl.load(shifts + image * 3 + place % 3) - tl.load(mean + place, mask=there, other=0)
    at = image.to(tl.int64) * EACH + place
    value = (offset + tl.load(crops + at, mask=there, other=0).to(tl.float32)) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=there)


@_once
def _fold(
    x,
    out,
    blocks,
    MAPS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    BEFORE: tl.constexpr,
    FULL: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    block = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    folded = tl.arange(0, FULL)[None, :]
    line, column = block // COLUMNS, block % COLUMNS
    image, line = (line // LINES).to(tl.int64), line % LINES
    pixel, own = folded // MAPS, folded % MAPS
    top = line * SIDE + pixel // SIDE - BEFORE
    left = column * SIDE + pixel % SIDE - BEFORE
    inside = (top >= 0) & (top < HEIGHT) & (left >= 0) & (left < WIDTH)
    inside = inside & (block < blocks) & (pixel < SIDE * SIDE)
    found = tl.load(x + ((image * HEIGHT + top) * WIDTH + left) * MAPS + own, mask=inside, other=0)
    there = (block < blocks) & (folded < WIDE)
    tl.store(out + block.to(tl.int64) * WIDE + folded, found, mask=there)


@_once
def _sum_rows(
    x,
    parts,
    rows,
    MAPS: tl.constexpr,
    FULL: tl.constexpr,
    EACH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * EACH
    maps = tl.arange(0, FULL)[None, :]
    total = tl.full([AT_ONCE, FULL], 0, tl.float32)
    for start in range(0, EACH, AT_ONCE):
        row = first + start + tl.arange(0, AT_ONCE)[:, None]
        there = (row < rows) & (maps < MAPS)
        total += tl.load(x + row * MAPS + maps, mask=there, other=0).to(tl.float32)
    maps = tl.arange(0, FULL)
    tl.store(parts + tl.program_id(0) * MAPS + maps, tl.sum(total, 0), mask=maps < MAPS)


@triton.jit
def _mix(x):
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


@_once
def _keep_mask(
    rows,
    keep,
    draw,
    places,
    start,
    bar,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    MANY: tl.constexpr,
):
    place = tl.program_id(0) * MANY + tl.arange(0, MANY)
    there = place < places
    row = tl.load(rows + place // UNITS, mask=there, other=0)
    counter = (row * WIDTH + start + place % UNITS).to(tl.int32)
    key = tl.load(draw)
    low, high = (key & 0x7FFFFFFF).to(tl.int32), ((key >> 31) & 0x7FFFFFFF).to(tl.int32)
    bits = _mix(_mix(counter ^ low) + high)
    tl.store(keep + place, ((bits >> 8) & 0xFFFFFF) >= bar, mask=there)
