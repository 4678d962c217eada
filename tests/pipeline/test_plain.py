"""A network as plain torch modules is the network, for every table and variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import error, mean_image

from pipeline.network import build
from pipeline.plain import MEAN, module
from pipeline.tower import Tower


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alexnet-mini", {}),
        ("alexnet-mini", {"columns": 1, "activation": "tanh", "pooling": "2/2"}),
        ("alexnet-2012", {}),
        ("alexnet-mini", {"crossings": "last"}),
        ("cifar", {"lrn": False}),
    ],
    ids=str,
)
def test_plain_modules_compute_what_the_tower_does(name: str, options: dict[str, Any]) -> None:
    network = build(name, 7, **options)
    tower, mean = Tower(network, seed=1, dtype=torch.float64), mean_image(network).double()
    weights = {key: p.detach() for key, p in tower.weights().items()}
    net = module(network, {**weights, MEAN: mean.permute(2, 0, 1)}, 1 / 64)
    pixels = torch.randint(0, 256, (3, 3, network.crop, network.crop)).double()
    with torch.no_grad():
        want = tower((pixels - mean.permute(2, 0, 1)) / 64, None)
        assert error(net(pixels), want) < 1e-12
