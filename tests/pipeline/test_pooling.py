"""Max-pooling is torch's, gradient and ties included, and keeps little."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import native
from pipeline.network import Pool
from pipeline.pooling import max_pool


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    # Few different values, so that there are ties.
    return torch.randint(-3, 4, shape, generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(
    st.sampled_from([(1, 1), (2, 2), (3, 2), (2, 3), (5, 1)]),
    st.tuples(st.integers(5, 9), st.integers(5, 9)),
    st.sampled_from([1, 3, 48, 512, 600]),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_it_is_torchs_max_pooling(
    dtype: torch.dtype, form: tuple[int, int], sides: tuple[int, int], maps: int, seed: int
) -> None:
    x = noise((2, maps, *sides), seed, dtype).contiguous(memory_format=torch.channels_last)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    got, want = max_pool(mine, Pool(*form)), F.max_pool2d(theirs, *form)
    assert torch.equal(got, want)
    grad = noise(tuple(got.shape), seed + 1, dtype)
    got.backward(grad)
    want.backward(grad)
    assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_a_nan_is_the_maximum() -> None:
    x = noise((1, 16, 6, 6), 0, torch.float32)
    x[0, 3, 2, 2] = float("nan")
    assert torch.equal(max_pool(x, Pool()).isnan(), F.max_pool2d(x, 3, 2).isnan())


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
def test_a_byte_is_kept_for_each_maximum() -> None:
    x = noise((2, 32, 9, 9), 0, torch.float32).requires_grad_()
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = max_pool(x * 1, Pool())
    assert sum(kept) == y.numel()
