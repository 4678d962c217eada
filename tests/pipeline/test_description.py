"""What is counted of a network is what a step of it does."""

from __future__ import annotations

import torch
from ranks import TOWERS, Ranks, batch, make_trainer

from pipeline.description import describe, kept
from pipeline.network import build
from pipeline.tower import Dropout, Tower

NETWORK = build("alexnet-mini", 10)


def sent(n: int) -> int:
    """Bytes that this tower sends in a step."""
    trainer = make_trainer(NETWORK, TOWERS, dtype=torch.float32)
    trainer.step(batch(NETWORK, n), 0)
    assert trainer.pair
    return trainer.pair.bytes_sent


def test_towers_send_what_crosses_forward_and_as_much_backward(pair: Ranks) -> None:
    costs = describe(NETWORK, towers=2, batch=16)
    loss = 16 * (4 + 8 + 8) + 8  # maxima, sums and targets, ranks, and the labels' checksum
    assert pair.run(sent, 16) == [2 * sum(cost.sent for cost in costs) + loss] * 2


def test_a_forward_pass_keeps_what_is_counted_for_each_image() -> None:
    for compute in (torch.float32, torch.bfloat16):
        tower = Tower(NETWORK, seed=0, compute=compute)
        own = {p.untyped_storage().data_ptr() for p in tower.parameters()}
        sizes = []
        for n in (1, 4):
            alive: dict[int, torch.Tensor] = {}

            def keep(x: torch.Tensor, alive: dict[int, torch.Tensor] = alive) -> torch.Tensor:
                return alive.setdefault(x.untyped_storage().data_ptr(), x)

            pixels = torch.zeros(n, 3, 64, 64).contiguous(memory_format=torch.channels_last)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                tower(pixels, None, Dropout(0, 0, torch.arange(n)))
            kept_now = [x.untyped_storage().nbytes() for p, x in alive.items() if p not in own]
            sizes.append(sum(kept_now))
        # The difference leaves out what is kept once a batch, such as weights in bfloat16.
        assert (sizes[1] - sizes[0]) / 3 == sum(kept(NETWORK, compute))
