"""Two towers, and any number of replicas, are the network of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import (
    ALONE,
    SEED,
    TOWERS,
    Ranks,
    assert_same,
    assert_totals,
    batch,
    cut,
    gradients,
    joined,
    make_trainer,
    this_rank,
)
from torch import Tensor, nn

from pipeline.mesh import Mesh
from pipeline.network import Layer, Network, Norm, Pool, Step, build
from pipeline.tower import Tower
from pipeline.training import Images, Totals

EXACT, SINGLE = 1e-12, 3e-5
# What a tolerance is relative to at least where a network is drawn: it may be all but certain of
# every label, and of the difference between 1 and its certainty few digits are right.
LEAST = 0.01


def check(
    pair: Ranks | None,
    network: Network,
    images: Images,
    tolerance: float = EXACT,
    modules: nn.Sequential | None = None,
    least: float = 0.0,
    **options: Any,
) -> None:
    """Two towers, if there is a pair, one process, and plain modules, if there are some, agree in
    the loss and in every gradient.
    """
    alone, want = gradients(network, images, ALONE, options=options)
    if pair:
        (first, a), (second, b) = pair.run(gradients, network, images, TOWERS, None, options)
        assert first == second
        assert_totals(first, alone, tolerance, least)
        assert_same(joined((a, b)), want, tolerance, least)
    if modules:
        weights = Tower(network, seed=SEED, dtype=options.get("dtype", torch.float64)).weights()
        scale = options.get("scale", 1 / 64)
        loss, plain = reference.gradients(network, modules, weights, images, scale)
        assert abs(alone.means()["loss"] - loss) <= tolerance * max(least, loss)
        assert_same(want, plain, tolerance, least)


steps: tuple[Step, ...] = ("activation", "norm", "pool")
norms = st.builds(
    Norm,
    st.sampled_from([1, 3, 5]),
    st.sampled_from([0.02, 0.1]),
    st.sampled_from([0.75, 0.5]),
    st.sampled_from([1.0, 2.0]),
    st.booleans(),
)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    side = crop = draw(st.integers(7, 12))
    layers: list[Layer] = []
    for index in range(draw(st.integers(1, 3))):
        padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        kernel = draw(st.integers(1, min(4, side + sum(padding))))
        stride = draw(st.integers(1, 2))
        side = (side + sum(padding) - kernel) // stride + 1
        pool = draw(st.sampled_from([None, Pool(2, 2), Pool(3, 2), Pool(2, 1)]))
        if pool and pool.size > side:
            pool = None
        if pool:
            side = (side - pool.size) // pool.stride + 1
        layers.append(
            Layer(
                f"conv{index + 1}",
                "conv",
                2 * draw(st.integers(1, 3)),
                kernel,
                stride,
                padding,
                crosses=index > 0 and draw(st.booleans()),
                activation=draw(st.sampled_from(["relu", "tanh", None])),
                norms=tuple(draw(st.lists(norms, max_size=2))),
                pool=pool,
                order=tuple(draw(st.permutations(steps))),
                std=0.3,
                bias=0.1,
            )
        )
    for index in range(draw(st.integers(0, 2))):
        layers.append(
            Layer(
                f"full{index + 1}",
                "full",
                2 * draw(st.integers(1, 4)),
                crosses=draw(st.booleans()),
                activation=draw(st.sampled_from(["relu", "tanh"])),
                dropout=draw(st.sampled_from([0.0, 0.3, 0.5])),
                std=0.3,
                bias=0.1,
            )
        )
    classes, crosses = draw(st.integers(2, 7)), draw(st.booleans())
    layers.append(
        Layer("last", "full", classes, crosses=crosses, activation=None, std=0.3, bias=0.1)
    )
    return Network("drawn", crop, 2, tuple(layers))


@given(networks(), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=60)
def test_two_towers_of_any_network_equal_one_process_and_plain_modules(
    pair: Ranks, network: Network, n: int, microbatches: int, seed: int
) -> None:
    modules = reference.from_table(network)
    images = batch(network, n, seed)
    check(pair, network, images, modules=modules, least=LEAST, microbatches=microbatches)


@pytest.mark.parametrize("name", ["alexnet-mini", "cifar"])
def test_two_towers_of_a_small_table_equal_one_process_and_plain_modules(
    pair: Ranks, name: str
) -> None:
    network = build(name, 11)
    images, modules = batch(network, 6), reference.TABLES[name](11)
    check(pair, network, images, modules=modules)
    check(pair, network, images, SINGLE, dtype=torch.float32)
    check(pair, network, images, microbatches=4)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "tanh"},
        {"lrn": False},
        {"pooling": "2/2"},
        {"crop": 80},
        {"dropout": 0.2},
        {"dropout": 0.0},
    ],
    ids=str,
)
def test_two_towers_of_a_variant_equal_one_process(pair: Ranks, options: dict[str, Any]) -> None:
    network = build("alexnet-mini", 10, **options)
    check(pair, network, batch(network, 4))


def test_one_process_of_the_full_network_equals_plain_modules() -> None:
    network = build("alexnet", 1000)
    with torch.device("meta"):
        modules = reference.TABLES["alexnet"](1000)
    check(None, network, batch(network, 2), modules=modules, scale=1.0)


@pytest.mark.parametrize("name", ["alexnet", "alexnet-2012"])
def test_two_towers_of_the_full_convolutions_equal_one_process(pair: Ranks, name: str) -> None:
    """With fewer units in the full layers, of whose gradients there would be a gigabyte."""
    network = build(name, 1000)
    less = {"full": 8}
    narrow = [
        replace(layer, maps=layer.maps // less.get(layer.kind, 1)) for layer in network.layers
    ]
    network = replace(network, layers=tuple(narrow))
    check(pair, network, batch(network, 2), scale=1.0)


@given(networks(), st.integers(1, 6), st.data())
@settings(max_examples=20)
def test_replicas_equal_one_process_whoever_has_how_many_images(
    pair: Ranks, four: Ranks, network: Network, n: int, data: st.DataObject
) -> None:
    images, middle = batch(network, n), data.draw(st.integers(0, n))
    totals, want = gradients(network, images, ALONE)
    for ranks, mesh in (pair, Mesh(2, 1, 1)), (four, Mesh(2, 1, 2)):
        cuts = (0, middle, n)
        answers = ranks.run(gradients, network, images, mesh, cuts, {"microbatches": 2})
        for first in range(0, mesh.size, mesh.towers):
            replica = answers[first : first + mesh.towers]
            for got, _ in replica:
                assert_totals(got, totals, EXACT, LEAST)
            assert_same(joined([share for _, share in replica]), want, EXACT, LEAST)


def train(
    network: Network, batches: list[Images], rates: list[float], mesh: Mesh
) -> tuple[list[Totals], dict[str, Tensor]]:
    """Totals of each step and this rank's weights in the end; replicas halve the batches."""
    trainer = make_trainer(network, mesh)
    replica, totals = this_rank(mesh)[0], []
    for step, (images, rate) in enumerate(zip(batches, rates, strict=True)):
        trainer.optimizer.set_rate(rate)
        n = len(images.labels)
        bounds = [n * r // mesh.replicas for r in range(mesh.replicas + 1)]
        totals.append(trainer.step(cut(images, *bounds[replica : replica + 2]), step))
    return totals, {name: p.detach() for name, p in trainer.tower.weights().items()}


def test_some_steps_of_training_end_at_the_weights_of_one_process(pair: Ranks, four: Ranks) -> None:
    network = build("alexnet-mini", 10)
    # The last batch of an epoch is a single image, so that one replica has none; of another one
    # all images were skipped.
    batches = [batch(network, n, seed) for seed, n in enumerate((6, 6, 1, 0, 6, 3))]
    rates = [0.005, 0.01, 0.01, 0.01, 0.001, 0.001]
    totals, want = train(network, batches, rates, ALONE)
    start = Tower(network, seed=SEED, dtype=torch.float64).weights()
    assert all((want[name] != p).any() for name, p in start.items())
    for ranks, mesh in (pair, TOWERS), (pair, Mesh(2, 1, 1)), (four, Mesh(2, 1, 2)):
        answers = ranks.run(train, network, batches, rates, mesh)
        for got, one in zip(answers[-1][0], totals, strict=True):
            assert_totals(got, one, 1e-10)
        assert_same(joined([share for _, share in answers[: mesh.towers]]), want, 1e-10)
        assert_same(joined([share for _, share in answers[-mesh.towers :]]), want, 1e-10)


def test_two_towers_in_bfloat16_are_as_near_to_float32_as_one_process(pair: Ranks) -> None:
    # Smooth, because rounding changes which position is the largest of a window.
    network = build("alexnet-mini", 10, activation="tanh")
    smooth = (
        replace(layer, pool=None, stride=layer.stride * 2) if layer.pool else layer
        for layer in network.layers
    )
    network = replace(network, layers=tuple(smooth))
    images, options = batch(network, 8), {"dtype": torch.float32, "compute": torch.bfloat16}
    _, want = gradients(network, images, ALONE, options={"dtype": torch.float32})
    one_totals, one = gradients(network, images, ALONE, options=options)
    (totals, a), (_, b) = pair.run(gradients, network, images, TOWERS, None, options)
    assert abs(totals.loss - one_totals.loss) < 0.01 * one_totals.loss

    def distance(got: Tensor, want: Tensor) -> float:
        return ((got - want).norm() / want.norm()).item()

    for name, got in joined((a, b)).items():
        assert 0 < distance(one[name], want[name]) < 0.05
        assert distance(got, want[name]) < 2 * distance(one[name], want[name])
        assert got.dtype == torch.float32
