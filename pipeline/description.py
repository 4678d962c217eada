"""The layer table with what each layer costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.network import Network, Shape
from pipeline.tower import Dropout, Tower


@dataclass(frozen=True)
class Cost:
    """One layer of the whole network; `sent` is what one tower sends in one direction.

    `parameters` and `macs` (multiply-adds of one image forward) are of all columns; `sent`,
    `activations` and `weights` are bytes, for a batch, of one tower, in float32.
    """

    name: str
    output: Shape
    parameters: int
    macs: int
    sent: int
    activations: int
    weights: int


def describe(network: Network, *, towers: int = 2, batch: int = 128) -> list[Cost]:
    """The cost of each layer on each of `towers` devices.

    Raises ValueError if the network does not divide over so many towers.
    """
    if network.columns % towers:
        raise ValueError(f"{towers} towers of a network with {network.columns} column")
    costs = []
    for index, (layer, shape) in enumerate(zip(network.layers, network.shapes, strict=True)):
        parameters = math.prod(network.weight_shape(index)) + layer.maps
        crosses = layer.crosses and towers == 2
        costs.append(
            Cost(
                layer.name,
                shape,
                parameters,
                network.multiply_adds(index),
                network.inputs(index).units // 2 * 4 * batch if crosses else 0,
                shape.units // towers * 4 * batch,
                parameters // towers * 4,
            )
        )
    return costs


def kept(network: Network, compute: torch.dtype = torch.float32) -> list[int]:
    """Bytes that the forward pass of each layer keeps of one image for the backward pass, in one
    process that holds the whole network: counted, in one that computes with any weights.
    """
    with torch.device("meta"):  # drawing alexnet's weights takes longer than all that is counted
        tower = Tower(network, seed=0, compute=compute)
    tower.to_empty(device="cpu")
    # Of two images less of one: weights in another dtype are kept once a batch.
    one, two = (_kept(tower, n) for n in (1, 2))
    return [b - a for a, b in zip(one, two, strict=True)]


def _kept(tower: Tower, n: int) -> list[int]:
    """Bytes that each layer of a tower keeps of n images."""
    side = tower.network.crop
    x = torch.zeros(n, 3, side, side).to(tower.compute, memory_format=torch.channels_last)
    dropout = Dropout(0, 0, torch.arange(n))
    known: dict[int, Tensor] = {}  # alive, so that no two storages have one address

    def keep(tensor: Tensor) -> Tensor:
        return known.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    found = []
    for block in tower.blocks.values():
        before = len(known)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = block(x, None, dropout)
        new = list(known.values())[before:]
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in new))
    return found
