"""A convolution in the shapes that a GPU is fast in is the same convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from forms import CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.convolution import conv2d, folded


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.integers(0, 3), st.data())
@settings(deadline=None)
def test_strides_fold_into_maps(
    maps: int, stride: int, kernel: int, padding: int, data: st.DataObject
) -> None:
    least = max(1, kernel - 2 * padding)
    height, width = (data.draw(st.integers(least, least + 12)) for _ in range(2))
    x, weight = draw(2, maps, height, width), draw(3, maps, kernel, kernel)
    more, wide = folded(x, weight, stride, padding)
    assert more.shape[1] == wide.shape[1] == maps * stride**2
    assert more.is_contiguous(memory_format=torch.channels_last)
    got, want = F.conv2d(more, wide), F.conv2d(x, weight, None, stride, padding)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


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
