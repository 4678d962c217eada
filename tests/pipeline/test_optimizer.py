"""SGD is the paper's rule, and the rate what its schedule says."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.learning_rate import Schedule, plateaus
from pipeline.optimizer import SGD


def noise(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, generator=draw, dtype=torch.float64)


def parameters() -> dict[str, nn.Parameter]:
    names = ("a.weight", "a.bias", "b.weight", "b.bias")
    return {name: nn.Parameter(noise(i)) for i, name in enumerate(names)}


rates = st.floats(1e-4, 1.0)


@given(
    st.lists(rates, min_size=1, max_size=8),
    st.sampled_from([0.9, 0.5, 0.0]),
    st.sampled_from([5e-4, 0.1, 0.0]),
    st.sampled_from([1.0, 2.0]),
    st.booleans(),
)
def test_steps_follow_the_papers_rule_while_the_rate_changes(
    rates: list[float], momentum: float, decay: float, bias_rate: float, decay_bias: bool
) -> None:
    weights = parameters()
    optimizer = SGD(
        weights,
        rate=rates[0],
        momentum=momentum,
        decay=decay,
        bias_rate=bias_rate,
        decay_bias=decay_bias,
    )
    want = {name: p.detach().clone() for name, p in weights.items()}
    velocity = {name: torch.zeros(4, dtype=torch.float64) for name in weights}
    for step, rate in enumerate(rates):
        optimizer.set_rate(rate)
        for i, (name, p) in enumerate(weights.items()):
            p.grad = noise(100 + 10 * step + i)
            bias = name.endswith("bias")
            lr = rate * bias_rate if bias else rate
            shrink = 0.0 if bias and not decay_bias else decay
            v, w = velocity[name], want[name]
            velocity[name] = momentum * v - shrink * lr * w - lr * p.grad
            want[name] = w + velocity[name]
        optimizer.step()
        for name, p in weights.items():
            torch.testing.assert_close(p.detach(), want[name], rtol=1e-11, atol=1e-12)


def test_the_paper_decays_by_5e_4_with_momentum_09() -> None:
    weights = {"a.weight": nn.Parameter(torch.ones(1, dtype=torch.float64))}
    optimizer = SGD(weights, rate=0.01)
    weights["a.weight"].grad = torch.zeros(1, dtype=torch.float64)
    optimizer.step()
    first = -5e-4 * 0.01
    assert weights["a.weight"].item() == pytest.approx(1 + first, rel=1e-15)
    optimizer.step()
    second = 0.9 * first - 5e-4 * 0.01 * (1 + first)
    assert weights["a.weight"].item() == pytest.approx(1 + first + second, rel=1e-15)


def test_momenta_are_zeros_before_the_first_step_and_change_nothing() -> None:
    looked, plain = parameters(), parameters()
    optimizers = [SGD(weights, rate=0.1) for weights in (looked, plain)]
    momenta = optimizers[0].momenta()
    assert all((momenta[p] == 0).all() for p in looked.values())
    for weights, optimizer in zip((looked, plain), optimizers, strict=True):
        for p in weights.values():
            p.grad = noise(7)
        optimizer.step()
    assert all(torch.equal(looked[name], p) for name, p in plain.items())
    assert all((m != 0).all() for m in optimizers[0].momenta().values())


def test_whoever_copies_is_asked_before_weights_or_velocities_change() -> None:
    weights = parameters()
    optimizer = SGD(weights, rate=0.1)

    def state() -> list[list[float]]:
        momenta = optimizer.momenta()
        return [t.tolist() for p in weights.values() for t in (p, momenta[p])]

    for p in weights.values():
        p.grad = noise(7)
    optimizer.step()
    seen: list[list[list[float]]] = []
    optimizer.before_change = lambda: seen.append(state())
    for change in (partial(optimizer.set_rate, 0.2), optimizer.step):
        before = state()
        change()
        assert seen == [before]
        assert state() != before
        seen.clear()
    optimizer.set_rate(0.2)  # which changes nothing
    assert not seen


def test_steps_divides_by_ten_at_each_drop() -> None:
    schedule = Schedule(0.01, "steps", drops=(2.0, 3.5))
    found = [schedule.at(0, epoch, [9.0] * 50) for epoch in (0, 1.99, 2.0, 3.49, 3.5, 90)]
    assert found == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_plateau_divides_when_the_error_no_longer_falls() -> None:
    schedule = Schedule(0.01, "plateau", patience=2)

    def rate(*errors: float) -> float:
        return schedule.at(1000, 5.0, errors)

    assert rate() == 0.01
    assert rate(0.9, 0.8, 0.8) == 0.01
    assert rate(0.9, 0.8, 0.8, 0.7, 0.75, 0.6) == 0.01
    assert rate(0.9, 0.8, 0.8, 0.85) == pytest.approx(1e-3)
    # A better error never takes a division back.
    assert rate(0.9, 0.8, 0.8, 0.85, 0.1) == pytest.approx(1e-3)
    assert rate(0.9, 0.8, 0.8, 0.85, 0.8) == pytest.approx(1e-3)
    assert rate(0.9, 0.8, 0.8, 0.85, 0.8, 0.8) == pytest.approx(1e-4)


def test_plateau_divides_three_times_at_most() -> None:
    assert Schedule(1.0, patience=1).at(0, 0, [0.5] * 50) == pytest.approx(1e-3)


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(1, 5))
def test_more_evaluations_never_raise_the_rate(errors: list[float], patience: int) -> None:
    counts = [plateaus(errors[:i], patience) for i in range(len(errors) + 1)]
    assert all(0 <= b - a <= 1 for a, b in pairwise(counts))
    assert counts[-1] <= len(errors) // patience


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30, unique=True))
def test_errors_that_always_fall_keep_the_rate(errors: list[float]) -> None:
    assert plateaus(sorted(errors, reverse=True), 1) == 0
    assert plateaus([*errors, *[math.nan] * 9], 1) == plateaus(errors, 1)


def test_warm_up_rises_in_a_line_to_the_rate() -> None:
    schedule = Schedule(0.5, warmup=4)
    found = [schedule.at(step, 0, []) for step in range(7)]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert Schedule(0.5).at(0, 0, []) == 0.5
