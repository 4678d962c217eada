"""Frozen layers keep their weights bit for bit on any mesh, and the others learn as they would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import (
    ALONE,
    SEED,
    TOWERS,
    Ranks,
    assert_same,
    assert_totals,
    batch,
    cut,
    devices,
    gradients,
    joined,
    make_trainer,
    seen,
    this_rank,
)
from test_checkpoint import state
from test_towers import EXACT
from torch import Tensor

from pipeline import checkpoint
from pipeline.mesh import Mesh
from pipeline.network import build
from pipeline.tower import Tower

NETWORK = build("alexnet-mini", 10)
STAGED, WHOLE = Mesh(1, 2, 2), Mesh(2, 2, 2)


def names(layers: range) -> set[str]:
    return {f"{NETWORK.layers[i].name}.{kind}" for i in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("frozen", "before"),
    [
        (range(5), "conv3"),  # the first stage has nothing to train
        (range(2, 7), "conv3"),
        (range(7, 8), "fc8"),  # the last stage has nothing to train
    ],
    ids=str,
)
def test_the_others_gradients_are_those_of_an_unfrozen_run(
    frozen: range, before: str, pair: Ranks, four: Ranks
) -> None:
    images = batch(NETWORK, 5)
    totals, every = gradients(NETWORK, images, ALONE)
    want = {name: g for name, g in every.items() if name not in names(frozen)}
    alone = gradients(NETWORK, images, ALONE, options={"frozen": frozen})
    assert_same(alone[1], want, EXACT)
    staged = {"frozen": frozen, "cuts": (before,), "microbatches": 2}
    for ranks, mesh, options in (pair, TOWERS, {"frozen": frozen}), (four, STAGED, staged):
        answers = ranks.run(gradients, NETWORK, images, mesh, None, options)
        for got, _ in answers:
            assert_totals(got, totals, EXACT)
        assert_same(joined([found for _, found in answers]), want, EXACT)


def train(mesh: Mesh, frozen: range, steps: range, path: str, resume: bool) -> dict[str, Tensor]:
    """This rank's weights and momenta after some steps, and a checkpoint of them."""
    trainer = make_trainer(NETWORK, mesh, dtype=torch.float32, frozen=frozen)
    if resume:
        checkpoint.load(path, trainer.tower, trainer.optimizer, devices(mesh))
    for step in steps:
        start, end = (4 * (this_rank(mesh)[0] + n) // mesh.replicas for n in (0, 1))
        trainer.step(seen(cut(batch(NETWORK, 4, step), start, end), trainer), step)
    checkpoint.save(path, trainer.tower, trainer.optimizer, {}, devices(mesh))
    return state(trainer)


@pytest.mark.parametrize("mesh", [TOWERS, STAGED, WHOLE], ids=str)
def test_frozen_weights_stay_bit_for_bit_and_a_checkpoint_goes_on_with_others(
    mesh: Mesh, pair: Ranks, four: Ranks, eight: Ranks, tmp_path: Path
) -> None:
    ranks, frozen = {2: pair, 4: four, 8: eight}[mesh.size], range(5)

    def run(path: str, steps: range, resume: bool = False) -> dict[str, Tensor]:
        answers = ranks.run(train, mesh, frozen, steps, f"{tmp_path}/{path}", resume)
        return joined(answers[: mesh.stages * mesh.towers])

    straight = run("straight", range(4))
    start = Tower(NETWORK, seed=SEED).weights()
    kept = names(frozen)
    assert {name for name, p in start.items() if torch.equal(p, straight[name])} == kept
    assert {name[2:] for name in straight if name.startswith("v ")} == start.keys() - kept
    run("half", range(2))
    again = run("half", range(2, 4), resume=True)
    assert [name for name in straight if not torch.equal(again[name], straight[name])] == []

    # What was frozen is trained from here on, and its momentum begins at nothing.
    thawed = make_trainer(NETWORK, dtype=torch.float32)
    thawed.step(batch(NETWORK, 2), 0)
    checkpoint.load(f"{tmp_path}/half", thawed.tower, thawed.optimizer, None)
    found = state(thawed)
    assert all(torch.equal(found[name], tensor) for name, tensor in straight.items())
    assert all((found[f"v {name}"] == 0).all() for name in kept)
