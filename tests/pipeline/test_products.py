"""Products of bfloat16 where its instructions are slow or lacking: exact ones, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor

from pipeline import products
from pipeline.convolution import conv2d
from pipeline.products import _Linear, linear

HALF = torch.bfloat16


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).to(HALF).requires_grad_()


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "slow_bfloat16", lambda: True)


def full(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv2d(x, weight, bias, 2, 1, 2)


def grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, 2, 1, groups=2)


@pytest.mark.parametrize(
    ("product", "reference", "shapes"),
    [
        (full, F.linear, [(6, 70), (9, 70), (9,)]),
        (convolution, grouped, [(3, 8, 9, 9), (6, 4, 3, 3), (6,)]),
    ],
)
def test_they_are_rounded_once(
    product: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    lacking: None,
) -> None:
    torch.manual_seed(0)
    factors = [draw(*shape) for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in factors]
    y, want = product(*factors), reference(*exact)
    grad = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, factors, grad)]
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == HALF
        # Half of the last of bfloat16's eight bits, and what float32 adds up differently.
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-5)


def test_what_is_kept_for_backward_is_not_widened(lacking: None) -> None:
    kept: list[torch.dtype] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.dtype)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        full(draw(2, 3), draw(4, 3), draw(4))
        convolution(draw(1, 8, 5, 5), draw(4, 4, 3, 3), draw(4))
    assert kept == [HALF] * 4


def test_frozen_layers_have_no_gradients(lacking: None) -> None:
    x, weight, bias = draw(2, 3), draw(4, 3).detach(), draw(4).detach()
    linear(x, weight, bias).sum().backward()
    assert x.grad is not None
    x, weight, bias = x.detach(), weight.requires_grad_(), bias.requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    # What nobody asked for is not worked out: autograd would throw it away.
    for asked in ((True, False, False), (False, True, False), (False, False, True)):
        ctx = SimpleNamespace(saved_tensors=(x, weight.detach()), needs_input_grad=asked)
        made = _Linear.backward(ctx, draw(2, 4))
        assert tuple(grad is not None for grad in made) == asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_others_are_left_as_they_are(dtype: torch.dtype, lacking: None) -> None:
    x = torch.randn(3, 4, dtype=dtype)
    assert products.wide(x) is x


@pytest.mark.parametrize(
    ("lacks", "maker", "tiles", "slow"),
    [
        (True, "AuthenticAMD", False, True),
        (True, "GenuineIntel", True, True),
        (False, "GenuineIntel", False, True),
        (False, "GenuineIntel", True, False),
        (False, "AuthenticAMD", False, False),
    ],
)
def test_slow_is_who_lacks_the_instructions_or_has_intels_without_tiles(
    lacks: bool,
    maker: str,
    tiles: bool,
    slow: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    about = tmp_path / "cpuinfo"
    about.write_text(f"vendor_id : {maker}\n")
    monkeypatch.setattr(products, "Path", lambda _: about)
    monkeypatch.setattr(products, "lacks_bfloat16", lambda: lacks)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert products.slow_bfloat16.__wrapped__() is slow


@pytest.mark.parametrize("slow", [True, False])
def test_factors_are_widened_where_bfloat16_is_slow(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "slow_bfloat16", lambda: slow)
    assert products.wide(draw(1)).dtype == (torch.float32 if slow else HALF)


def crossed(slow: bool) -> list[Tensor]:
    """Outputs and gradients of two crossing layers of bfloat16 in this tower, and of float64 of the
    same factors.
    """
    from test_crossing import cross

    own, products.slow_bfloat16 = products.slow_bfloat16, lambda: slow
    try:
        torch.manual_seed(0)
        found: list[Tensor] = []
        for dtype in (HALF, torch.float64):
            torch.manual_seed(0)
            shapes = [(4, 8), (6, 8), (6,), (4, 6)]
            found += cross(*(torch.randn(s).to(HALF).to(dtype) for s in shapes), None, False)
            shapes = [(2, 4, 6, 6), (6, 4, 3, 3), (6,), (2, 6, 6, 6)]
            found += cross(*(torch.randn(s).to(HALF).to(dtype) for s in shapes), (1, 1), True)
    finally:
        products.slow_bfloat16 = own
    return found


def test_crossing_layers_are_rounded_once_too(pair: Ranks) -> None:
    for found in pair.run(crossed, True):
        half, exact = found[:8], found[8:]
        for which, (got, want) in enumerate(zip(half, exact, strict=True)):
            assert got.dtype == HALF
            # The gradient of x has a part that was rounded on its way from the other tower.
            part = 2**-8 * want.abs().max() if which % 4 == 1 else 1e-5
            torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=float(part))
