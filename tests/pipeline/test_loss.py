"""The loss of classes split between towers is that of all classes together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import TOWERS, Ranks, error, pair_of
from torch import Tensor

from pipeline.loss import LabelsDiffer, cross_entropy
from pipeline.tower import share


def of_share(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ranks and the gradient of this tower's logits, three times over."""
    pair = pair_of(TOWERS)
    assert pair
    first, end = share(logits.shape[1], 2, pair.tower)
    own = logits[:, first:end].clone().requires_grad_()
    loss, ranks = cross_entropy(own, labels, first, pair)
    (3 * loss).backward()
    assert own.grad is not None
    return loss.detach(), ranks, own.grad


def of_all(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    own = logits.clone().requires_grad_()
    loss, ranks = cross_entropy(own, labels, 0, None)
    (3 * loss).backward()
    assert own.grad is not None
    return loss.detach(), ranks, own.grad


def before(logits: Tensor, labels: Tensor) -> list[int]:
    """How many classes come before the true one, by sorting."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    return [row.tolist().index(label) for row, label in zip(order, labels.tolist(), strict=True)]


@given(st.integers(1, 6), st.integers(2, 9), st.sampled_from([0, 1, 30]), st.integers(0, 99))
@settings(max_examples=60)
def test_the_loss_and_its_gradient_are_torchs(
    pair: Ranks, n: int, classes: int, spread: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=draw, dtype=torch.float64) * spread
    labels = torch.randint(0, classes, (n,), generator=draw)
    leaf = logits.clone().requires_grad_()
    want = F.cross_entropy(leaf, labels, reduction="sum")
    (grad,) = torch.autograd.grad(3 * want, leaf)
    results = pair.run(of_share, logits, labels)
    parts = torch.cat([part for _, _, part in results], dim=1)
    alone = of_all(logits, labels)
    for loss, ranks, got in (*[(*r[:2], parts) for r in results], alone):
        torch.testing.assert_close(loss, want.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(got, grad, rtol=1e-13, atol=1e-13)
        assert ranks.tolist() == before(logits, labels)


@given(st.data(), st.integers(2, 8))
@settings(max_examples=40)
def test_among_equal_logits_the_lower_class_comes_first(
    pair: Ranks, data: st.DataObject, classes: int
) -> None:
    row = st.lists(st.integers(0, 2), min_size=classes, max_size=classes)
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    labels = torch.tensor([data.draw(st.integers(0, classes - 1)) for _ in rows])
    logits = torch.tensor(rows, dtype=torch.float32)
    want = before(logits, labels)
    assert of_all(logits, labels)[1].tolist() == want
    assert [r[1].tolist() for r in pair.run(of_share, logits, labels)] == [want, want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_overflow_nothing(pair: Ranks, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0, 2e4, 3e4], [-3e4, -2e4, -1e4, -5e4, -1e4]], dtype=dtype)
    labels = torch.tensor([3, 0])
    want = F.cross_entropy(logits.double(), labels, reduction="sum")
    results = [*pair.run(of_share, logits, labels), of_all(logits, labels)]
    for loss, _, grad in results:
        assert loss.dtype == dtype
        assert error(loss, want) < 1e-6
        assert grad.isfinite().all()


def test_sixteen_bit_logits_are_summed_in_float32() -> None:
    logits = torch.linspace(-2, 2, 1000).to(torch.bfloat16)[None]
    want = F.cross_entropy(logits.double(), torch.tensor([7]), reduction="sum")
    loss, _ = cross_entropy(logits, torch.tensor([7]), 0, None)
    assert loss.dtype == torch.float32
    assert error(loss, want) < 1e-6


def problem_with(labels: list[Tensor], dtype: torch.dtype) -> str:
    pair = pair_of(TOWERS)
    assert pair
    own = labels[pair.tower]
    try:
        cross_entropy(torch.zeros(len(own), 500, dtype=dtype), own, 500 * pair.tower, pair)
    except LabelsDiffer as problem:
        return str(problem)
    return ""


@st.composite
def two_labellings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    labels = st.lists(st.integers(0, draw(st.sampled_from([1, 9, 999]))), min_size=1, max_size=8)
    a = draw(labels)
    return a, draw(st.permutations(a) | st.tuples(*[st.integers(0, 9)] * len(a)).map(list))


@given(two_labellings())
@example(([2, 0], [0, 1]))
@settings(max_examples=100)
def test_labels_that_differ_between_the_towers_are_noticed_by_both(
    pair: Ranks, labels: tuple[list[int], list[int]]
) -> None:
    a, b = labels
    message = "the two towers were given different labels for one batch"
    for dtype in (torch.float32, torch.float64):
        found = pair.run(problem_with, [torch.tensor(a), torch.tensor(b)], dtype)
        assert found == ([message] * 2 if a != b else ["", ""])
