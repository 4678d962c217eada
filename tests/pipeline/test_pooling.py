"""Max-pooling is torch's, gradient and ties included, and keeps little."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from forms import COMPILED, EXAMPLES, FORMS, Form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.network import Pool
from pipeline.pooling import max_pool


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    # Few different values, so that there are ties.
    return torch.randint(-3, 4, shape, generator=draw).to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(
    st.sampled_from([(1, 1), (2, 2), (3, 2), (2, 3), (5, 1)]),
    st.tuples(st.integers(5, 9), st.integers(5, 9)),
    st.sampled_from([1, 3, 48, 512, 600]),
    st.integers(0, 99),
)
@settings(max_examples=EXAMPLES // 2)
def test_it_is_torchs_max_pooling(
    form: Form,
    dtype: torch.dtype,
    windows: tuple[int, int],
    sides: tuple[int, int],
    maps: int,
    seed: int,
) -> None:
    x = noise((2, maps, *sides), seed, dtype).contiguous(memory_format=torch.channels_last)
    mine, theirs = (x.clone().to(d).requires_grad_() for d in (form.device, "cpu"))
    want = F.max_pool2d(theirs, *windows)
    grad = noise(tuple(want.shape), seed + 1, dtype)
    want.backward(grad)
    with form.used():
        got = max_pool(mine, Pool(*windows))
        got.backward(grad.to(form.device))
    assert torch.equal(got.cpu(), want)
    assert torch.equal(mine.grad.cpu(), theirs.grad)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_is_the_maximum(form: Form) -> None:
    x = noise((1, 16, 6, 6), 0, torch.float32)
    x[0, 3, 2, 2] = float("nan")
    with form.used():
        assert torch.equal(
            max_pool(x.to(form.device), Pool()).isnan().cpu(), F.max_pool2d(x, 3, 2).isnan()
        )


@pytest.mark.parametrize("form", FORMS)
def test_what_follows_may_work_in_place(form: Form) -> None:
    leaf = noise((2, 16, 7, 7), 0, torch.float32).to(form.device).requires_grad_()
    with form.used():
        (got,) = torch.autograd.grad(max_pool(leaf * 1, Pool()).relu_().sum(), leaf)
        (want,) = torch.autograd.grad(max_pool(leaf * 1, Pool()).relu().sum(), leaf)
    assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_a_place_are_added_in_one_order(form: Form) -> None:
    # Of numbers whose sum depends on it: row by row of windows, as in float32 by hand.
    x, grads = torch.zeros(1, 8, 5, 5), torch.tensor([[1e8, 1.0], [-1e8, 1.0]])
    x[..., 2, 2] = 1
    leaf = x.to(form.device).requires_grad_()
    with form.used():
        y = max_pool(leaf, Pool())
        y.backward(grads.expand(1, 8, 2, 2).to(form.device))
    assert leaf.grad is not None
    assert leaf.grad[0, :, 2, 2].tolist() == [1.0] * 8


@pytest.mark.parametrize("form", COMPILED)
def test_a_byte_is_kept_for_each_maximum(form: Form) -> None:
    x = noise((2, 32, 9, 9), 0, torch.float32).to(form.device).requires_grad_()
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.nbytes)
        return t

    with form.used(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = max_pool(x * 1, Pool())
    assert sum(kept) == y.numel()
