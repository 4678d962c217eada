"""A step moves weights by what it saw, or not at all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ranks import (
    ALONE,
    TOWERS,
    Ranks,
    assert_same,
    assert_totals,
    batch,
    cut,
    gradients,
    make_trainer,
    mean_image,
)
from torch import Tensor

from pipeline import NotANumber
from pipeline.mesh import Mesh
from pipeline.network import build
from pipeline.training import Images, Totals, Trainer

NETWORK = build("alexnet-mini", 10)


def copies(trainer: Trainer) -> list[Tensor]:
    weights = trainer.tower.weights()
    momenta = trainer.optimizer.momenta()
    return [t.detach().clone() for p in weights.values() for t in (p, momenta[p])]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def step_into_nowhere(mesh: Mesh, spoilt: int, value: float) -> tuple[str, bool]:
    """What a step says if a weight of tower `spoilt` is no number; whether the state stayed."""
    trainer = make_trainer(NETWORK, mesh)
    images = batch(NETWORK, 4)
    trainer.step(images, 0)
    if trainer.pair is None or trainer.pair.tower == spoilt:
        with torch.no_grad():
            trainer.tower.weights()["conv2.bias"][0] = value
    before = [t.nan_to_num(7) for t in copies(trainer)]
    try:
        trainer.step(images, 1)
    except NotANumber as problem:
        said = str(problem)
    else:
        said = ""
    same = equal([t.nan_to_num(7) for t in copies(trainer)], before)
    return said, same


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_loss_that_is_no_number_stops_every_tower_before_it_moves_a_weight(
    pair: Ranks, spoilt: int, value: float
) -> None:
    message = "the loss is nan at step 1"
    assert step_into_nowhere(ALONE, spoilt, value) == (message, True)
    assert pair.run(step_into_nowhere, TOWERS, spoilt, value) == [(message, True)] * 2


def spoilt_replica(mesh: Mesh) -> tuple[str, bool]:
    """Only the last image of the batch, the second replica's, is no number."""
    trainer = make_trainer(NETWORK, mesh)
    images = batch(NETWORK, 4)
    images.shifts[3] = math.nan
    replica = trainer.replicas.rank() if trainer.replicas else 0
    before = copies(trainer)
    try:
        trainer.step(cut(images, 2 * replica, 2 * replica + 2), 5)
    except NotANumber as problem:
        return str(problem), equal(copies(trainer), before)
    return "", False


def test_one_replicas_bad_image_stops_all(pair: Ranks) -> None:
    assert pair.run(spoilt_replica, Mesh(2, 1, 1)) == [("the loss is nan at step 5", True)] * 2


def test_evaluation_drops_nothing_and_leaves_weights_and_gradients() -> None:
    trainer, images = make_trainer(NETWORK), batch(NETWORK, 6)
    trainer.gradients(images, 0)
    kept = [p.grad.clone() for p in trainer.tower.parameters() if p.grad is not None]
    before = copies(trainer)
    totals = trainer.evaluate(images)
    assert equal([p.grad for p in trainer.tower.parameters() if p.grad is not None], kept)
    assert len(kept) == 16
    assert equal(copies(trainer), before)

    pixels = (images.crops.double() - mean_image(NETWORK) + images.shifts[:, None, None]) / 64
    with torch.no_grad():
        logits = trainer.tower(pixels.permute(0, 3, 1, 2), None)
    loss = F.cross_entropy(logits, images.labels, reduction="sum").item()
    best = logits.topk(5).indices == images.labels[:, None]
    wrong1, wrong5 = (int((~best[:, :k].any(1)).sum()) for k in (1, 5))
    assert_totals(totals, Totals(6, loss, wrong1, wrong5), 1e-12)
    assert trainer.evaluate(images) == totals

    undropped = make_trainer(build("alexnet-mini", 10, dropout=0.0))
    assert_totals(undropped.gradients(images, 0), totals, 1e-12)
    assert abs(trainer.gradients(images, 0).loss - totals.loss) > 1e-3


def evaluate(images: Images, mesh: Mesh, cuts: tuple[int, ...]) -> Totals:
    trainer = make_trainer(NETWORK, mesh)
    replica = trainer.replicas.rank() if trainer.replicas else 0
    return trainer.evaluate(cut(images, *cuts[replica : replica + 2]))


@pytest.mark.parametrize("middle", [0, 2, 5])
def test_evaluation_is_the_same_on_any_mesh(pair: Ranks, four: Ranks, middle: int) -> None:
    images = batch(NETWORK, 5)
    want = evaluate(images, ALONE, (0, 5))
    assert want.images == 5
    for totals in pair.run(evaluate, images, TOWERS, (0, 5)):
        assert_totals(totals, want, 1e-12)
    for totals in four.run(evaluate, images, Mesh(2, 1, 2), (0, middle, 5)):
        assert_totals(totals, want, 1e-12)


@pytest.mark.parametrize("microbatches", [2, 3, 7, 50])
def test_micro_batches_equal_the_undivided_batch(microbatches: int) -> None:
    images = batch(NETWORK, 7)
    totals, want = gradients(NETWORK, images, ALONE)
    parts, got = gradients(NETWORK, images, ALONE, options={"microbatches": microbatches})
    assert_totals(parts, totals, 1e-12)
    assert_same(got, want, 1e-12)


def test_masks_change_with_the_step_and_with_the_place_in_the_batch() -> None:
    trainer, images = make_trainer(NETWORK), batch(NETWORK, 4)
    losses = {
        trainer.gradients(images, 0).loss,
        trainer.gradients(images, 1).loss,
        trainer.gradients(replace(images, places=torch.arange(4, 8)), 0).loss,
    }
    assert len(losses) == 3
    assert trainer.gradients(images, 0).loss in losses


def test_images_in_another_order_keep_the_masks_of_their_places() -> None:
    images, order = batch(NETWORK, 7), torch.tensor([3, 6, 0, 2, 5, 1, 4])
    crops, labels, shifts = (t[order] for t in (images.crops, images.labels, images.shifts))
    totals, want = gradients(NETWORK, images, ALONE)
    shuffled = Images(crops, labels, shifts, order)
    again, got = gradients(NETWORK, shuffled, ALONE, options={"microbatches": 3})
    assert_totals(again, totals, 1e-12)
    assert_same(got, want, 1e-12)


def test_training_lowers_the_loss() -> None:
    network = build("cifar", 10)
    trainer, images = make_trainer(network, dtype=torch.float32), batch(network, 16)
    losses = [trainer.step(images, step).means()["loss"] for step in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_no_image_has_no_totals() -> None:
    trainer = make_trainer(NETWORK)
    assert trainer.evaluate(batch(NETWORK, 0)) == Totals()
    assert math.isnan(Totals().means()["loss"])


def test_totals_add_up_to_means() -> None:
    both = Totals(3, 6.0, 2, 1) + Totals(1, 2.0, 1, 0)
    assert both == Totals(4, 8.0, 3, 1)
    assert both.means() == {"loss": 2.0, "top1_error": 0.75, "top5_error": 0.25}
