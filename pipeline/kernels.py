"""kernels.cpp for a GPU, in Triton: one pass over memory each way, the same mathematics.

native.py has the contract and imports this where there is Triton, which torch's builds for GPUs
bring with them. A thread has a chunk of maps that lie side by side, as many as one load brings, and
of LRN's neighbours the whole chunks before and after: their windows are then sums in registers.
"""

# mypy: disable-error-code="no-untyped-def,var-annotated,assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pipeline.native import Form
from pipeline.network import Norm

_THREADS = 128  # of a block; each has one chunk
# Whatever its value, or an epoch's last batch would be compiled for anew.
_once = triton.jit(do_not_specialize=["chunks"])


def lrn(x: Tensor, grad: Tensor | None, out: Tensor, maps: int, norm: Norm, rectify: bool) -> None:
    chunk = _chunk(x)
    chunks = x.numel() // maps * -(-maps // chunk)
    _lrn[_grid(chunks)](
        x,
        x if grad is None else grad,
        out,
        chunks,
        norm.k,
        norm.alpha,
        MAPS=maps,
        REACH=norm.size // 2,
        QUARTERS=round(4 * norm.beta),
        RECTIFY=rectify,
        BACKWARD=grad is not None,
        CHUNK=chunk,
        THREADS=_THREADS,
    )


def pool_forward(x: Tensor, y: Tensor, place: Tensor, form: Form) -> None:
    _pool(_pool_forward, (x, y, place), y.numel() // form[0], form)


def pool_backward(grad: Tensor, place: Tensor, out: Tensor, form: Form) -> None:
    _, height, width, _, stride, *_ = form
    cells = len(out) * -(-height // stride) * -(-width // stride)
    _pool(_pool_backward, (grad, place, out), cells, form)


def _pool(kernel: object, tensors: tuple[Tensor, ...], positions: int, form: Form) -> None:
    maps, chunk = form[0], _chunk(tensors[0])
    chunks = positions * -(-maps // chunk)
    names = ("MAPS", "HEIGHT", "WIDTH", "SIZE", "STRIDE", "ROWS", "COLUMNS")
    shape = dict(zip(names, form, strict=True))
    kernel[_grid(chunks)](*tensors, chunks, **shape, CHUNK=chunk, THREADS=_THREADS)  # type: ignore[index]


def _chunk(x: Tensor) -> int:
    """Maps of a chunk: sixteen bytes of them."""
    return 16 // x.element_size()


def _grid(chunks: int) -> tuple[int]:
    return (-(-chunks // _THREADS),)


@triton.jit
def _four(x):
    """[n, 4] as four tensors [n]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _apart(x):
    """[n, 4 or 8] as so many tensors [n]."""
    if x.shape[1] == 4:
        return _four(x)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 4, 2]))
        a, c, e, g = _four(even)
        b, d, f, h = _four(odd)
        return a, b, c, d, e, f, g, h


@triton.jit
def _together(x, CHUNK: tl.constexpr):
    """The reverse of `_apart`."""
    if CHUNK == 4:
        y = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    else:
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
        even = tl.reshape(even, [x[0].shape[0], 4])
        y = tl.join(even, tl.reshape(odd, [x[0].shape[0], 4]))
    return tl.reshape(y, [x[0].shape[0], CHUNK])


@_once
def _lrn(
    x,
    grad,
    out,
    chunks,
    k,
    alpha,
    MAPS: tl.constexpr,
    REACH: tl.constexpr,
    QUARTERS: tl.constexpr,
    RECTIFY: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
):
    EACH: tl.constexpr = (MAPS + CHUNK - 1) // CHUNK  # chunks of a row
    EDGE: tl.constexpr = REACH if BACKWARD else 0  # places beside the own whose powers are needed
    SIDE: tl.constexpr = (EDGE + REACH + CHUNK - 1) // CHUNK  # chunks beside the own to be read
    OWN: tl.constexpr = SIDE * CHUNK  # the first of the own places
    number = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    row, chunk = number // EACH, number % EACH
    column = tl.arange(0, CHUNK)[None, :]
    first = (row.to(tl.int64) * MAPS + chunk * CHUNK)[:, None] + column
    own, up = (), ()
    for side in tl.static_range(-SIDE, SIDE + 1):
        there = ((number < chunks) & (chunk + side >= 0) & (chunk + side < EACH))[:, None]
        if MAPS % CHUNK:
            there = there & ((chunk + side)[:, None] * CHUNK + column < MAPS)
        read = tl.load(x + first + side * CHUNK, mask=there, other=0).to(tl.float32)
        own = own + _apart(tl.where(read < 0, 0.0, read) if RECTIFY else read)  # a NaN stays
        if BACKWARD:
            read = tl.load(grad + first + side * CHUNK, mask=there, other=0).to(tl.float32)
            up = up + _apart(read)
    power, inner = (), ()
    for i in tl.static_range(OWN - EDGE, OWN + CHUNK + EDGE):
        near = own[i] * own[i]
        for d in tl.static_range(1, REACH + 1):
            near += own[i - d] * own[i - d] + own[i + d] * own[i + d]
        root = tl.rsqrt(k + alpha * near)
        if QUARTERS == 3:
            more = root * tl.sqrt(root)
        else:
            more = root * root if QUARTERS == 4 else root
        if BACKWARD:
            more = more * up[i]
            inner = inner + (root * root * more * own[i],)
        power = power + (more,)
    made = ()
    for i in tl.static_range(CHUNK):
        value = power[EDGE + i]
        mine = own[OWN + i]
        if BACKWARD:
            near = inner[EDGE + i]
            for d in tl.static_range(1, REACH + 1):
                near += inner[EDGE + i - d] + inner[EDGE + i + d]
            value = value - 0.5 * QUARTERS * alpha * mine * near
            if RECTIFY:
                value = tl.where(mine == 0, 0.0, value)
        else:
            value = value * mine
        made = made + (value,)
    there = (number < chunks)[:, None]
    if MAPS % CHUNK:
        there = there & (chunk[:, None] * CHUNK + column < MAPS)
    tl.store(out + first, _together(made, CHUNK).to(out.dtype.element_ty), mask=there)


@_once
def _pool_forward(
    x,
    y,
    kept,
    chunks,
    MAPS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
):
    EACH: tl.constexpr = (MAPS + CHUNK - 1) // CHUNK
    number = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    position = number // EACH
    line, c = position // COLUMNS, position % COLUMNS
    top = (line // ROWS).to(tl.int64) * HEIGHT + line % ROWS * STRIDE
    maps = (number % EACH)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    there = (number < chunks)[:, None]
    if MAPS % CHUNK:
        there = there & (maps < MAPS)
    first = x + ((top * WIDTH + c * STRIDE) * MAPS)[:, None] + maps
    best = tl.load(first, mask=there, other=0).to(tl.float32)
    place = tl.full(best.shape, 0, tl.int32)
    for k in tl.static_range(1, SIZE * SIZE):
        near = first + (k // SIZE * WIDTH + k % SIZE) * MAPS
        near = tl.load(near, mask=there, other=0).to(tl.float32)
        more = (near > best) | (near != near)
        best = tl.where(more, near, best)
        place = tl.where(more, k, place)
    at = (position.to(tl.int64) * MAPS)[:, None] + maps
    tl.store(y + at, best.to(y.dtype.element_ty), mask=there)
    tl.store(kept + at, place.to(tl.uint8), mask=there)


# A thread has a cell of STRIDE x STRIDE places and reads each window over them once. A place
# sums the gradients of the windows whose maximum it is: nothing is written twice.
@_once
def _pool_backward(
    grad,
    kept,
    out,
    chunks,
    MAPS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
):
    EACH: tl.constexpr = (MAPS + CHUNK - 1) // CHUNK
    REACH: tl.constexpr = (SIZE + STRIDE - 1) // STRIDE  # windows over a cell, each way
    CELLS: tl.constexpr = (WIDTH + STRIDE - 1) // STRIDE  # of a line
    LINES: tl.constexpr = (HEIGHT + STRIDE - 1) // STRIDE
    number = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    cell = number // EACH
    line, c = cell // CELLS, cell % CELLS
    image, r = (line // LINES).to(tl.int64), line % LINES
    maps = (number % EACH)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = (number < chunks)[:, None]
    if MAPS % CHUNK:
        inside = inside & (maps < MAPS)
    totals = ()
    for _ in tl.static_range(STRIDE * STRIDE):
        totals = totals + (tl.full([THREADS, CHUNK], 0, tl.float32),)
    for up in tl.static_range(REACH - 1, -1, -1):  # of windows that begin so many cells before
        for back in tl.static_range(REACH - 1, -1, -1):
            there = (r >= up) & (r - up < ROWS) & (c >= back) & (c - back < COLUMNS)
            there = inside & there[:, None]
            at = (((image * ROWS + r - up) * COLUMNS + c - back) * MAPS)[:, None] + maps
            place = tl.load(kept + at, mask=there, other=0).to(tl.int32)
            more = tl.load(grad + at, mask=there, other=0).to(tl.float32)
            summed = ()
            for i in tl.static_range(STRIDE * STRIDE):
                if up * STRIDE + i // STRIDE < SIZE and back * STRIDE + i % STRIDE < SIZE:
                    down, right = up * STRIDE + i // STRIDE, back * STRIDE + i % STRIDE
                    own = place == down * SIZE + right
                    summed = summed + (totals[i] + tl.where(own, more, 0.0),)
                else:
                    summed = summed + (totals[i],)
            totals = summed
    for i in tl.static_range(STRIDE * STRIDE):
        top, left = r * STRIDE + i // STRIDE, c * STRIDE + i % STRIDE
        there = inside & ((top < HEIGHT) & (left < WIDTH))[:, None]
        at = (((image * HEIGHT + top) * WIDTH + left) * MAPS)[:, None] + maps
        tl.store(out + at, totals[i].to(out.dtype.element_ty), mask=there)
