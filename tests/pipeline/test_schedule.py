"""Stages: cuts and schedules are right by themselves, any mesh of them is one process."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ALONE, Ranks, assert_same, assert_totals, batch, gradients, joined
from test_towers import EXACT, LEAST, SINGLE, networks, train
from torch.utils.flop_counter import FlopCounterMode

from pipeline.description import describe
from pipeline.mesh import Mesh
from pipeline.network import NETWORKS, Network, build
from pipeline.schedule import Kind, order
from pipeline.stages import cut
from pipeline.tower import Tower


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_adds_and_parameters_are_what_torch_counts(name: str) -> None:
    network = build(name, 10)
    # Normalisation is a matrix product here; only the layers' own multiply-adds are counted.
    plain = replace(network, layers=tuple(replace(layer, norms=()) for layer in network.layers))
    tower = Tower(plain, seed=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, network.crop, network.crop), None)
    counts = counter.get_flop_counts()
    for cost in describe(network):
        assert cost.macs == sum(counts[f"Tower.blocks.{cost.name}"].values()) // 2
        assert cost.parameters == sum(p.numel() for p in tower.blocks[cost.name].parameters())


def test_two_stages_of_alexnet_are_cut_after_the_second_pooling() -> None:
    network = build("alexnet", 1000)
    assert cut(network, 1) == (range(8),)
    assert cut(network, 2) == (range(2), range(2, 8))
    assert cut(network, 3, ("conv3", "fc6")) == (range(2), range(2, 5), range(5, 8))


@given(st.sampled_from(list(NETWORKS)), st.integers(1, 8))
def test_a_cut_has_every_layer_once_and_no_better_one(name: str, stages: int) -> None:
    network = build(name, 10)
    costs = [network.multiply_adds(i) for i in range(len(network.layers))]
    if stages > len(costs):
        with pytest.raises(ValueError, match=f"stages is {stages}: {name} has {len(costs)} layers"):
            cut(network, stages)
        return
    parts = cut(network, stages)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert all(parts)
    dearest = max(sum(costs[i] for i in part) for part in parts)
    # No more stages than these do with less: filling each up to just below needs more.
    needed, left = 1, 0
    for cost in costs:
        needed, left = (needed, left + cost) if left + cost < dearest else (needed + 1, cost)
    assert needed > stages or dearest == max(costs)


@pytest.mark.parametrize(
    ("stages", "names", "message"),
    [
        (2, ("conv9",), "cuts has 'conv9': one of conv2, conv3"),
        (2, ("conv1",), "cuts has 'conv1': one of conv2"),
        (2, ("conv3", "fc6"), "stages is 2: 3 by cuts conv3,fc6"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(stages: int, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(build("alexnet", 10), stages, names)


@given(st.sampled_from(["1f1b", "gpipe"]), st.integers(1, 6), st.integers(0, 9))
def test_a_schedule_does_everything_once_in_an_order_that_ends(
    kind: Kind, stages: int, microbatches: int
) -> None:
    todo = [order(kind, stage, stages, microbatches) for stage in range(stages)]
    for stage, actions in enumerate(todo):
        assert sorted(actions) == sorted(
            (what, m) for what in ("forward", "backward") for m in range(microbatches)
        )
        held = accumulate(1 if what == "forward" else -1 for what, _ in actions)
        most = microbatches if kind == "gpipe" else min(microbatches, stages - stage)
        assert max(held, default=0) == most
    # Run them all: each waits for what it needs of its neighbours, and none waits for ever.
    done: set[tuple[int, str, int]] = set()
    places = [0] * stages
    moved = True
    while moved:
        moved = False
        for stage in range(stages):
            while places[stage] < len(todo[stage]):
                what, m = todo[stage][places[stage]]
                need = (stage - 1, what, m) if what == "forward" else (stage + 1, what, m)
                if 0 <= need[0] < stages and need not in done:
                    break
                done.add((stage, what, m))
                places[stage] += 1
                moved = True
    assert len(done) == 2 * microbatches * stages


def check(
    ranks: Ranks, mesh: Mesh, network: Network, n: int, tolerance: float, **options: Any
) -> None:
    """A mesh, whose ranks see only what they need, equals one process."""
    images = batch(network, n, n)
    alone = {k: v for k, v in options.items() if k in ("dtype", "scale")}
    totals, want = gradients(network, images, ALONE, options=alone)
    bounds = [n * r // mesh.replicas for r in range(mesh.replicas + 1)]
    answers = ranks.run(gradients, network, images, mesh, bounds, options)[: mesh.size]
    for got, _ in answers:
        assert_totals(got, totals, tolerance, LEAST)
    size = mesh.stages * mesh.towers
    for first in range(0, mesh.size, size):
        replica = [share for _, share in answers[first : first + size]]
        assert_same(joined(replica), want, tolerance, LEAST)


@given(
    networks(),
    st.integers(1, 7),
    st.integers(1, 4),
    st.sampled_from(["1f1b", "gpipe"]),
    st.data(),
)
@settings(max_examples=25)
def test_stages_of_any_network_equal_one_process(
    pair: Ranks, four: Ranks, network: Network, n: int, microbatches: int, kind: Kind, data: Any
) -> None:
    names = [layer.name for layer in network.layers[1:]]
    cuts = (data.draw(st.sampled_from(names)),)
    options = {"microbatches": microbatches, "schedule": kind, "cuts": cuts}
    check(pair, Mesh(1, 2, 1), network, n, EXACT, **options)
    check(four, Mesh(1, 2, 2), network, n, EXACT, **options)


@pytest.mark.parametrize(
    "mesh", [Mesh(2, 2, 2), Mesh(1, 4, 2), Mesh(2, 4, 1), Mesh(4, 2, 1)], ids=str
)
@pytest.mark.parametrize("n", [8, 5, 1])
def test_whole_meshes_equal_one_process(eight: Ranks, mesh: Mesh, n: int) -> None:
    network = build("alexnet-mini", 10)
    check(eight, mesh, network, n, EXACT, microbatches=2)


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
def test_three_stages_equal_one_process(six: Ranks, kind: Kind) -> None:
    network = build("alexnet-mini", 11)
    for n in (9, 4):
        check(six, Mesh(1, 3, 2), network, n, EXACT, microbatches=4, schedule=kind)
    check(six, Mesh(1, 3, 2), network, 6, SINGLE, microbatches=3, dtype=torch.float32)


def test_some_steps_over_stages_end_at_the_weights_of_one_process(
    pair: Ranks, eight: Ranks
) -> None:
    network = build("alexnet-mini", 10)
    batches = [batch(network, n, seed) for seed, n in enumerate((6, 6, 1, 3))]
    rates = [0.005, 0.01, 0.01, 0.001]
    totals, want = train(network, batches, rates, ALONE)
    for ranks, mesh in (pair, Mesh(1, 2, 1)), (eight, Mesh(2, 2, 2)):
        answers = ranks.run(train, network, batches, rates, mesh)
        for got, one in zip(answers[0][0], totals, strict=True):
            assert_totals(got, one, 1e-10)
        size = mesh.stages * mesh.towers
        assert_same(joined([share for _, share in answers[:size]]), want, 1e-10)
