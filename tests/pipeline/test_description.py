"""What is counted of a network is what a step of it does."""

from __future__ import annotations

import torch

from pipeline.description import kept
from pipeline.network import build
from pipeline.tower import Dropout, Tower

NETWORK = build("alexnet-mini", 10)


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
