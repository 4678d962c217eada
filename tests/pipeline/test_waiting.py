"""A rank that hangs is named by those that wait for it, with the layer that they wait at."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from ranks import Ranks, batch, make_trainer, seen

import pipeline.waiting
from pipeline.mesh import Mesh
from pipeline.network import build
from pipeline.waiting import Stuck, watch

NETWORK = build("alexnet-mini", 10)
TIMEOUT = 2.0


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """Two that no other test needs again."""
    made = Ranks(2)
    yield made
    made.stop()


def hang(mesh: Mesh, layer: str, gpus: bool = False) -> str:
    """Rank 1 never comes to `layer`; what rank 0 says of it."""
    trainer = make_trainer(NETWORK, mesh)
    images = seen(batch(NETWORK, 4), trainer)
    trainer.step(images, 0)  # in which modules are loaded
    dist.barrier()
    if gpus:  # as in a group of both kinds of device, whose hosts meet by gloo
        pipeline.waiting._of_gpus = lambda _: True
        watch(trainer.replicas, TIMEOUT)
    for peer in (trainer.pair, trainer.line, trainer, trainer.reducer):
        if peer:
            peer.timeout = TIMEOUT
    if dist.get_rank() == 1:
        if layer:
            trainer.tower.blocks[layer].register_forward_pre_hook(lambda *_: time.sleep(60))
        else:
            time.sleep(60)
    try:
        trainer.step(images, 1)
    except Stuck as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("mesh", "layer", "where"),
    [
        (Mesh(1, 1, 2), "conv3", "conv3"),
        (Mesh(1, 1, 2), "fc7", "fc7"),
        (Mesh(1, 2, 1), "conv3", "stage 0, gradients of stage 1"),
        (Mesh(2, 1, 1), "", "the totals over replicas"),
    ],
    ids=str,
)
def test_a_hung_rank_is_named(ranks: Ranks, mesh: Mesh, layer: str, where: str) -> None:
    answer = ranks.first(hang, mesh, layer)
    assert answer == f"rank 0 waited 2 s for rank 1 at {where}"


def test_a_host_that_hangs_is_named_beside_gpus(ranks: Ranks) -> None:
    answer = ranks.first(hang, Mesh(2, 1, 1), "", True)
    assert answer == "rank 0 waited 2 s for rank 1 at the totals over replicas"
