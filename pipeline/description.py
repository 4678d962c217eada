"""The layer table with what each layer costs: counted from the network, not by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

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
    # Normalisation is a matrix product here; only the layers' own multiply-adds are counted.
    plain = replace(network, layers=tuple(replace(layer, norms=()) for layer in network.layers))
    if network.columns % towers:
        raise ValueError(f"{towers} towers of a network with {network.columns} column")
    tower = Tower(plain, seed=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, network.crop, network.crop), None)
    counts = counter.get_flop_counts()
    sizes = {name: p.numel() for name, p in tower.weights().items()}
    costs = []
    for index, (layer, shape) in enumerate(zip(network.layers, network.shapes, strict=True)):
        parameters = sizes[f"{layer.name}.weight"] + sizes[f"{layer.name}.bias"]
        crosses = layer.crosses and towers == 2
        costs.append(
            Cost(
                layer.name,
                shape,
                parameters,
                sum(counts[f"Tower.blocks.{layer.name}"].values()) // 2,
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
    with torch.device("meta"):
        tower = Tower(network, seed=0, compute=compute)
    tower.to_empty(device="cpu")
    x = torch.zeros(1, 3, network.crop, network.crop)
    x = x.to(compute, memory_format=torch.channels_last)
    dropout = Dropout(0, 0, torch.zeros(1, dtype=torch.int64))
    own = {p.untyped_storage()._cdata for p in tower.parameters()}
    known: dict[int, torch.Tensor] = {}  # alive, so that no two storages have one address
    found = []
    for block in tower.blocks.values():
        before = set(known)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            known.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = block(x, None, dropout)
        new = known.keys() - before - own
        weights = sum(p.numel() for p in block.parameters()) * compute.itemsize
        sizes = (known[place].untyped_storage().nbytes() for place in new)
        # Where products are in another dtype, the weights' copies are kept, once a batch.
        found.append(sum(sizes) - (weights if compute is not torch.float32 else 0))
    return found
