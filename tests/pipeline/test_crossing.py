"""What crosses is what the other tower has, and its gradient comes back whole."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import TOWERS, Ranks, batch, error, make_trainer, pair_of
from torch import Tensor

from pipeline.crossing import Pair, cross_conv2d, cross_linear
from pipeline.description import describe
from pipeline.mesh import Mesh
from pipeline.network import build
from pipeline.tower import Dropout

LAST = torch.channels_last


def towers_pair() -> Pair:
    pair = pair_of(TOWERS)
    assert pair
    return pair


def swap(xs: list[list[Tensor]]) -> list[Tensor]:
    """Tower t sends each of xs[t]; all are under way at once."""
    pair = towers_pair()
    swaps = [pair.swap(x) for x in xs[pair.tower]]
    return [s.wait() for s in swaps]


def test_a_swap_exchanges_tensors_of_any_layout(pair: Ranks) -> None:
    def tensors(tower: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(tower)
        x = torch.randn(4, 6, 5, 3, generator=draw)
        last = x.to(memory_format=LAST)
        layouts = [x, last, x[:, ::2], x.transpose(0, 3), last[:, 1:3], last[:, :, 1:], x[:1]]
        flat = x.flatten(1)
        thin = x[:, :1, :, :].contiguous()
        dtypes = [x.to(torch.bfloat16), x.double(), last.to(torch.bfloat16)]
        return [*layouts, flat, flat.t(), flat[:, ::2], thin, flat[0], *dtypes]

    sent = tensors(0), tensors(1)
    got = pair.run(swap, list(sent))
    for received, want in zip(got, reversed(sent), strict=True):
        for x, y in zip(received, want, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def cross(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, conv: tuple[int, int] | None, last: bool
) -> tuple[Tensor, ...]:
    """Output of this tower and the gradients of its shares, from whole tensors."""
    pair = towers_pair()

    def own(t: Tensor, dim: int) -> Tensor:
        t = t.chunk(2, dim)[pair.tower]
        t = t.contiguous(memory_format=LAST if last and t.dim() == 4 else torch.contiguous_format)
        return t.detach().requires_grad_()

    a, w, b = own(x, 1), own(weight, 0), own(bias, 0)
    y = cross_conv2d(a, w, b, *conv, pair) if conv else cross_linear(a, w, b, pair)
    y.backward(own(grad, 1))
    assert a.grad is not None
    assert w.grad is not None
    assert b.grad is not None
    return y.detach(), a.grad, w.grad, b.grad


def undivided(
    x: Tensor, weight: Tensor, bias: Tensor, conv: tuple[int, int] | None, grad: Tensor | None
) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*leaves, *conv) if conv else F.linear(*leaves)
    if grad is None:
        return (y.detach(),)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def check_cross(
    pair: Ranks,
    x: Tensor,
    weight: Tensor,
    conv: tuple[int, int] | None,
    last: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    draw = torch.Generator().manual_seed(1)
    bias = torch.randn(len(weight), generator=draw)
    shape = undivided(x, weight, bias, conv, None)[0].shape
    whole = [t.to(dtype) for t in (x, weight, bias, torch.randn(shape, generator=draw))]
    results = pair.run(cross, *whole, conv, last)
    x, weight, bias, grad = (t.double() for t in whole)
    want = undivided(x, weight, bias, conv, grad)
    for got, one, dim in zip(zip(*results, strict=True), want, (1, 1, 0, 0), strict=True):
        assert got[0].dtype == dtype
        assert error(torch.cat(got, dim), one) <= tolerance


floats = st.sampled_from([(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
few = st.integers(1, 4)


@given(few, few, few, floats, st.integers(0, 9))
@settings(max_examples=30)
def test_a_crossing_product_is_the_undivided_product(
    pair: Ranks, n: int, half_in: int, half_out: int, dtype: tuple[torch.dtype, float], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2 * half_in, generator=draw)
    weight = torch.randn(2 * half_out, 2 * half_in, generator=draw)
    check_cross(pair, x, weight, None, False, *dtype)


@given(
    st.tuples(few, few, few, st.integers(1, 3), st.integers(1, 2), st.integers(0, 2)),
    st.booleans(),
    floats,
    st.integers(0, 9),
)
@settings(max_examples=60)
def test_a_crossing_convolution_is_the_undivided_convolution(
    pair: Ranks,
    sizes: tuple[int, int, int, int, int, int],
    last: bool,
    dtype: tuple[torch.dtype, float],
    seed: int,
) -> None:
    n, half_in, half_out, kernel, stride, padding = sizes
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2 * half_in, 6, 5, generator=draw)
    weight = torch.randn(2 * half_out, 2 * half_in, kernel, kernel, generator=draw)
    check_cross(pair, x, weight, (stride, padding), last, *dtype)


def sums_and_maxima(values: list[list[float]]) -> tuple[list[float], list[float]]:
    pair = towers_pair()
    own = torch.tensor(values[pair.tower])
    return pair.sum_(own.clone()).tolist(), pair.max_(own.clone()).tolist()


def test_sums_and_maxima_are_over_both_towers(pair: Ranks) -> None:
    want = [4.0, -5.0, 9.0], [3.0, -2.0, 7.0]
    assert pair.run(sums_and_maxima, [[1.0, -2.0, 7.0], [3.0, -3.0, 2.0]]) == [want, want]


def bytes_of_a_step(name: str, n: int) -> tuple[int, int]:
    """Bytes sent forward, and in all of one step."""
    network = build(name, 10)
    trainer = make_trainer(network, TOWERS, dtype=torch.float32)
    pair, images = trainer.pair, batch(network, n)
    assert pair
    with torch.no_grad():
        x = trainer._pixels(images, 0, n)
        trainer.tower(x, pair, Dropout(0, 0, torch.arange(n)))
    forward = pair.bytes_sent
    trainer.step(images, 0)
    return forward, pair.bytes_sent - forward


@pytest.mark.parametrize("name", ["alexnet-mini", "cifar"])
def test_a_step_sends_what_is_described_forward_and_as_much_backward(
    pair: Ranks, name: str
) -> None:
    n = 5
    described = sum(cost.sent for cost in describe(build(name, 10), batch=n))
    # The loss: maxima, targets, a checksum and its negative; then sums and ranks.
    loss = (2 * n + 2) * 4 + 2 * n * 4
    assert pair.run(bytes_of_a_step, name, n) == [(described, 2 * described + loss)] * 2


def wait_for_the_other() -> tuple[float, float]:
    pair = towers_pair()
    before = pair.waited
    dist.barrier()
    if pair.tower == 1:
        time.sleep(0.6)
    pair.swap(torch.ones(3)).wait()
    return before, pair.waited


def test_waiting_for_the_other_tower_is_counted(pair: Ranks) -> None:
    (before, waited), _ = pair.run(wait_for_the_other)
    assert before == 0
    assert 0.3 < waited < 30


def refused(mesh: Mesh | None) -> str:
    from ranks import devices

    groups = devices(mesh) if mesh else None
    group: Any = groups.get_group("tower") if groups else dist.group.WORLD
    try:
        Pair(group)
    except ValueError as problem:
        return str(problem)
    return ""


def test_a_pair_is_two_towers(pair: Ranks, four: Ranks) -> None:
    assert set(pair.run(refused, Mesh(2, 1, 1))) == {"a pair is 2 towers, this group has 1 ranks"}
    assert set(four.run(refused, None)) == {"a pair is 2 towers, this group has 4 ranks"}
    assert set(four.run(refused, Mesh(2, 1, 2))) == {""}
