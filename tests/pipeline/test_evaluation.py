"""Evaluation's mathematics: ten crops, averages, ties, classes; the same as training's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline import NotANumber
from pipeline.evaluation import Classifier, Verdicts, average, best, judge
from pipeline.loss import cross_entropy
from pipeline.network import build
from pipeline.optimizer import SGD
from pipeline.tower import Tower
from pipeline.training import Images, Trainer

NETWORK = build("cifar", 7)


@pytest.fixture(scope="module")
def tower() -> Tower:
    return Tower(NETWORK, seed=1)


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    return torch.randint(0, 256, (6, 10, 32, 32, 3), dtype=torch.uint8, generator=seeded(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MEAN = torch.full((32, 32, 3), 120.0)


def classifier(tower: Tower) -> Classifier:
    weights = {name: p.detach() for name, p in tower.weights().items()}
    return Classifier(NETWORK, weights, MEAN, scale=1 / 64)


def test_one_crop_is_what_training_evaluates(tower: Tower, crops: torch.Tensor) -> None:
    labels = torch.tensor([0, 6, 3, 3, 1, 5])
    optimizer = SGD(tower.weights(), rate=0.1, momentum=0.9)
    trainer = Trainer(tower, optimizer, MEAN, seed=0, scale=1 / 64)
    totals = trainer.evaluate(Images(crops[:, 4], labels, torch.zeros(6, 3)))
    means = judge(classifier(tower).probabilities(crops[:, 4:5]), labels).means()
    expected = totals.means()
    assert means["images"] == 6
    assert means["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert means["top1_error"] == expected["top1_error"] > 0
    assert means["top5_error"] == expected["top5_error"]


def test_ten_crops_are_the_mean_of_their_softmax_outputs(tower: Tower, crops: torch.Tensor) -> None:
    x = (crops.float() - MEAN) / 64
    each = [tower(x[:, k].permute(0, 3, 1, 2), None).softmax(1) for k in range(10)]
    found = classifier(tower).probabilities(crops)
    assert (found - torch.stack(each).mean(0)).abs().max() < 1e-6
    assert found.sum(1).tolist() == pytest.approx([1] * 6, abs=1e-12)
    logits = torch.stack([tower(x[:, k].permute(0, 3, 1, 2), None) for k in range(10)]).mean(0)
    assert (found - logits.softmax(1)).abs().max() > 1e-4  # not the softmax of the mean


def test_features_are_what_the_last_layer_reads(tower: Tower, crops: torch.Tensor) -> None:
    made, weights = classifier(tower), tower.weights()
    last = F.linear(made.features(crops[:, 0]), weights["fc4.weight"], weights["fc4.bias"])
    torch.testing.assert_close(last.detach(), made.logits(crops[:, 0]))


def test_runs_are_averaged_by_their_weights() -> None:
    a, b = (torch.rand(4, 3, dtype=torch.float64, generator=seeded(s)) for s in (1, 2))
    assert torch.allclose(average([a, b]), (a + b) / 2)
    assert torch.allclose(average([a, b], [1, 3]), (a + 3 * b) / 4)
    assert torch.equal(average([a, b], [2, 0]), a)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "weights has 1 numbers: 2"),
        ([0, 0], "more than 0 in all"),
        ([2, -1], "0 or more each"),
        ([1, math.nan], "more than 0 in all"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average([torch.zeros(1, 2)] * 2, weights)


def test_ranks_are_those_of_the_loss_ties_included() -> None:
    logits = torch.randint(0, 4, (200, 9), generator=seeded(3)).float()
    labels = torch.randint(0, 9, (200,), generator=seeded(4))
    loss, ranks = cross_entropy(logits, labels, 0, None)
    verdicts = judge(logits.double().softmax(1), labels)
    assert torch.equal(verdicts.ranks, ranks)
    assert torch.equal(verdicts.predicted == labels, ranks == 0)
    assert verdicts.losses.sum().item() == pytest.approx(loss.item(), rel=1e-6)
    classes, values = best(logits.double().softmax(1))
    assert torch.equal((classes == labels[:, None]).any(1), ranks < 5)
    assert (values[:, :-1] >= values[:, 1:]).all()


def test_what_is_no_number_is_never_right(tower: Tower, crops: torch.Tensor) -> None:
    nan = torch.full((2, 7), torch.nan, dtype=torch.float64)
    assert judge(nan, torch.tensor([0, 6])).means()["top5_error"] == 1
    _, ranks = cross_entropy(nan, torch.tensor([0, 6]), 0, None)
    assert ranks.tolist() == [7, 7]
    diverged = Tower(NETWORK, seed=1)
    with torch.no_grad():
        for weight in diverged.parameters():
            weight.fill_(torch.nan)
    with pytest.raises(NotANumber, match="are no numbers"):
        classifier(diverged).probabilities(crops)
    optimizer = SGD(diverged.weights(), rate=0.1, momentum=0.9)
    trainer = Trainer(diverged, optimizer, MEAN, seed=0, scale=1 / 64)
    with pytest.raises(NotANumber, match="the loss is nan in an evaluation"):
        trainer.evaluate(Images(crops[:, 4], torch.zeros(6, dtype=torch.int64), torch.zeros(6, 3)))


def test_an_impossible_truth_has_a_finite_loss() -> None:
    verdicts = judge(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1]))
    assert 700 < verdicts.means()["loss"] < math.inf


def test_classes_and_confusion_add_up() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 3, 3, 3]), torch.tensor([0, 1, 1, 0, 3, 0])
    ranks = torch.tensor([0, 1, 0, 6, 0, 2])
    verdicts = Verdicts(labels, predicted, ranks, torch.ones(6, dtype=torch.float64))
    assert verdicts.confusion(4).tolist() == [
        [0, 0, 1],
        [0, 1, 1],
        [1, 1, 1],
        [3, 0, 2],
        [3, 3, 1],
    ]
    assert verdicts.by_class(4) == [
        {"images": 2, "top1_error": 0.5, "top5_error": 0.0},
        {"images": 1, "top1_error": 0.0, "top5_error": 0.0},
        {"images": 0, "top1_error": None, "top5_error": None},
        {"images": 3, "top1_error": 2 / 3, "top5_error": 1 / 3},
    ]
    assert verdicts.means() == {
        "images": 6,
        "loss": 1.0,
        "top1_error": 0.5,
        "top5_error": 1 / 6,
    }
