"""What is drawn depends on its key and place, never on who draws or when."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from forms import GPU, WHY_NOT
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.randomness import keep_mask, key, normal


def mask(draw: int = 5, drop: float = 0.5, rows: int = 64, width: int = 256) -> Tensor:
    return keep_mask(torch.arange(rows), 0, width, width, drop, draw)


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_masks_keep_their_rate_in_every_row_and_unit(drop: float) -> None:
    kept = mask(drop=drop, rows=512, width=1024).double()
    deviation = (drop * (1 - drop)) ** 0.5
    assert abs(kept.mean() - (1 - drop)) <= 4 * deviation / (512 * 1024) ** 0.5
    assert (kept.mean(1) - (1 - drop)).abs().max() <= 5 * deviation / 1024**0.5
    assert (kept.mean(0) - (1 - drop)).abs().max() <= 5 * deviation / 512**0.5


def test_neighbours_in_a_mask_are_independent() -> None:
    kept = mask(rows=512, width=1024).double() - 0.5
    for a, b in (kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]):
        assert abs(4 * (a * b).mean()) < 5 / a.numel() ** 0.5


@given(st.data(), st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**63 - 1))
def test_a_slice_of_a_mask_is_the_mask_of_a_slice(
    data: st.DataObject, width: int, n: int, draw: int
) -> None:
    start = data.draw(st.integers(0, width - 1))
    units = data.draw(st.integers(0, width - start))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=9)), dtype=torch.int64)
    whole = keep_mask(torch.arange(n), 0, width, width, 0.4, draw)
    part = keep_mask(rows, start, units, width, 0.4, draw)
    assert part.tolist() == whole[rows, start : start + units].tolist()


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize(("start", "units", "width"), [(0, 4096, 4096), (48, 48, 96), (0, 7, 9)])
@pytest.mark.parametrize("draw", [1, 2**62 - 1, key(0, "dropout", 3, "fc6")])
def test_a_gpu_draws_the_same_mask(start: int, units: int, width: int, draw: int) -> None:
    rows, drop = torch.tensor([0, 5, 2**20, 2**40 + 1]), 0.3
    want = keep_mask(rows, start, units, width, drop, draw)
    kernels: Any = import_module("pipeline.gpu")
    there, held = rows.to(GPU.device), torch.tensor(draw, device=GPU.device)
    got = kernels.keep_mask(there, start, units, width, held, round(drop * 2**24))
    assert got.dtype == torch.bool
    assert torch.equal(got.cpu(), want)
    if GPU.device == "cuda":
        assert torch.equal(keep_mask(there, start, units, width, drop, draw), got)


def test_masks_of_other_keys_are_unrelated() -> None:
    keys = [
        key(seed, "dropout", step, layer)
        for seed in (0, 1)
        for step in (0, 1)
        for layer in ("fc6", "fc7")
    ]
    masks = [mask(k).flatten() for k in keys]
    assert torch.equal(masks[0], mask(key(0, "dropout", 0, "fc6")).flatten())
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean() - 0.5) < 0.02


@given(st.lists(st.integers() | st.text(), max_size=4), st.lists(st.integers() | st.text()))
def test_keys_are_63_bits_and_differ_with_their_parts(
    a: list[int | str], b: list[int | str]
) -> None:
    assert 0 <= key(*a) < 2**63
    assert (key(*a) == key(*b)) == (a == b)


def test_draws_are_the_same_for_ever() -> None:
    """A run that was checkpointed by one version is resumed by the next."""
    assert key(0, "dropout", 1, "fc6") == KEY
    assert mask(KEY, rows=1, width=16)[0].int().tolist() == MASK


KEY = 8916115155243369395
MASK = [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1]


def test_normal_draws_do_not_touch_or_heed_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = normal((500, 40), 0.3, 7, "weight", "conv1")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(normal((500, 40), 0.3, 7, "weight", "conv1"), first)
    assert abs(first.std().item() - 0.3) < 0.01
    assert abs(first.mean().item()) < 0.01
    for other in (8, "weight", "conv1"), (7, "bias", "conv1"), (7, "weight", "conv2"):
        assert not torch.equal(normal((500, 40), 0.3, *other), first)


def test_normal_draws_are_the_same_in_any_dtype() -> None:
    single, double = (normal((9,), 1.0, 0, dtype=t) for t in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)
