"""A convolution in the shapes that a GPU is fast in is the same convolution."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import CUDA, GPU, WHY_NOT
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.convolution import conv2d, dense, fold, folded


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.integers(0, 3), st.data())
def test_strides_fold_into_maps(
    maps: int, stride: int, kernel: int, padding: int, data: st.DataObject
) -> None:
    least = max(1, kernel - 2 * padding)
    height, width = (data.draw(st.integers(least, least + 12)) for _ in range(2))
    x, weight = draw(2, maps, height, width), draw(3, maps, kernel, kernel)
    more, wide = folded(x, weight, stride, padding)
    assert more.shape[1] == wide.shape[1]
    assert more.shape[1] % 32 == 0
    assert more.is_contiguous(memory_format=torch.channels_last)
    got, want = F.conv2d(more, wide), F.conv2d(x, weight, None, stride, padding)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_groups_are_zeros_between_them(maps: int, groups: int, data: st.DataObject) -> None:
    kernel = data.draw(st.integers(1, 3))
    x, weight = draw(2, maps * groups, 5, 5), draw(6 * groups, maps, kernel, kernel)
    got, want = F.conv2d(x, dense(weight, groups)), F.conv2d(x, weight, groups=groups)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "before", "size"), [(4, 2, (5, 6)), (3, 0, (4, 4)), (1, 1, (9, 9))]
)
def test_the_kernel_folds_as_torch_does(
    dtype: torch.dtype, side: int, before: int, size: tuple[int, int]
) -> None:
    kernels: Any = import_module("pipeline.gpu")
    x = draw(3, 3, 17, 13).to(dtype)
    want = fold(x, side, before, *size)
    out = torch.full(want.shape, torch.nan, dtype=dtype, device=GPU.device)
    out = out.contiguous(memory_format=torch.channels_last)
    kernels.fold(x.to(GPU.device), out, side, before)
    assert torch.equal(out.cpu(), want)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "maps"), [(1, 1), (7, 96), (2000, 96), (5000, 5), (600, 384)])
def test_the_kernel_sums_rows(dtype: torch.dtype, rows: int, maps: int) -> None:
    kernels: Any = import_module("pipeline.gpu")
    x = torch.randint(-8, 9, (rows, maps)).to(dtype)  # whose sums are exact in float32
    got = kernels.sum_rows(x.to(GPU.device), maps).cpu()
    assert got.dtype == dtype
    assert torch.equal(got, x.double().sum(0).to(dtype))


@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize(
    ("maps", "kernel", "stride", "padding", "groups"),
    [(3, 11, 4, 2, 1), (3, 11, 3, 2, 1), (48, 5, 1, 2, 2), (24, 3, 1, 1, 1), (3, 5, 1, 2, 1)],
)
def test_a_gpu_makes_the_same(
    maps: int, kernel: int, stride: int, padding: int, groups: int
) -> None:
    x, weight, bias = (
        draw(4, maps, 32, 32),
        draw(16, maps // groups, kernel, kernel),
        torch.ones(16),
    )
    found: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        wanted = [t.double().to(device).requires_grad_() for t in (x, weight, bias)]
        y = conv2d(*wanted, stride, padding, groups)
        grads = torch.autograd.grad(y, wanted, torch.cos(torch.arange(y.numel()).to(y)).view_as(y))
        found.append([y.detach().cpu(), *(g.cpu() for g in grads)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    halves = [t.float().cuda() for t in (x, weight, bias)]  # products in TF32
    got, want = (conv2d(*halves, stride, padding, groups, r).relu() for r in (True, False))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
