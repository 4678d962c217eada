"""One tower's share of a network: the same code for one process that holds both towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import randomness
from pipeline.convolution import conv2d
from pipeline.crossing import Pair, cross_conv2d, cross_linear
from pipeline.network import Network
from pipeline.normalization import normalize
from pipeline.pooling import max_pool
from pipeline.products import linear


@dataclass(frozen=True)
class Dropout:
    """What a training step's dropout masks depend on.

    `rows` int64 [n]: each image's place in the global batch, on the tower's device. `held` are the
    draws of layers by name, int64 [], where a recorded step finds them instead of in seed and step.
    """

    seed: int
    step: int
    rows: Tensor
    held: Mapping[str, Tensor] | None = None

    def draw(self, layer: str) -> int | Tensor:
        """The key of a layer's mask."""
        return self.held[layer] if self.held else self.key(self.seed, self.step, layer)

    @staticmethod
    def key(seed: int, step: int, layer: str) -> int:
        """The key of a layer's mask in a step."""
        return randomness.key(seed, "dropout", step, layer)


def share(units: int, towers: int, tower: int) -> tuple[int, int]:
    """Start and end of tower's units; of an odd number the first tower has one more."""
    each = -(-units // towers)
    return min(units, each * tower), min(units, each * (tower + 1))


class Tower(nn.Module):
    """Tower `tower` of `towers` (1 or 2) of a network; with 1, the whole of it.

    Every parameter is this tower's share, along dimension 0, of the whole network's, drawn from
    `seed` by its name alone, so that shares of one seed always fit together. `compute` is the
    dtype of convolutions and products (parameters stay `dtype`). `layers` are those of a pipeline
    stage, all if it is None; `frozen` are those of the whole network that are not trained. Raises
    ValueError if the network has fewer columns than towers.
    """

    def __init__(
        self,
        network: Network,
        *,
        seed: int,
        towers: int = 1,
        tower: int = 0,
        dtype: torch.dtype = torch.float32,
        compute: torch.dtype | None = None,
        layers: range | None = None,
        frozen: range = range(0),
    ) -> None:
        super().__init__()
        if network.columns % towers:
            raise ValueError(f"{towers} towers of a network with {network.columns} column")
        self.network = network
        self.compute = compute or dtype
        self.layers = layers if layers is not None else range(len(network.layers))
        self.towers = towers
        # Whether gradients go through what this stage reads, and through what it makes.
        trained = [index for index in range(self.layers.stop) if index not in frozen]
        self.learns_before = any(index < self.layers.start for index in trained)
        self.learns = bool(trained)
        self.blocks = nn.ModuleDict(
            {
                network.layers[index].name: Block(network, index, seed, towers, tower, dtype)
                for index in self.layers
            }
        )
        for index in self.layers:
            self.blocks[network.layers[index].name].requires_grad_(index not in frozen)
        self.first_class = share(network.classes, towers, tower)[0]

    def forward(self, x: Tensor, pair: Pair | None, dropout: Dropout | None = None) -> Tensor:
        """Pixels [n, 3, crop, crop], or what the stage before made, to logits [n, own classes] or
        to what the next stage reads; without `dropout`, nothing is dropped.
        """
        x = x.to(self.compute)
        for block in self.blocks.values():
            x = block(x, pair, dropout)
        return x

    def input_shape(self, n: int) -> tuple[int, ...]:
        """Of what this tower reads from its stage before, for n images."""
        first = self.layers.start
        shape = self.network.inputs(first)
        maps = shape.maps // self.towers
        full = first > 0 and self.network.layers[first - 1].kind == "full"
        return (n, maps) if full else (n, maps, shape.side, shape.side)

    def weights(self) -> dict[str, nn.Parameter]:
        """Parameters by their names in the whole network: conv1.weight, conv1.bias, ..."""
        return {name.removeprefix("blocks."): p for name, p in self.named_parameters()}

    def shares(self) -> dict[str, tuple[int, int]]:
        """Of each parameter, where its rows begin in the whole network's and how many those are."""
        return {
            f"{name}.{kind}": (block.start, block.layer.maps)  # type: ignore[union-attr, misc]
            for name, block in self.blocks.items()
            for kind in ("weight", "bias")
        }


class Block(nn.Module):
    """One layer: product, then activation, normalisation and pooling in the table's order."""

    def __init__(
        self,
        network: Network,
        index: int,
        seed: int,
        towers: int,
        tower: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        layer = self.layer = network.layers[index]
        # Groups of the product in this process, and columns that lie side by side in it.
        self.groups = 1 if network.reads_all(index) else network.columns // towers
        self.columns = network.columns // towers
        self.crosses = layer.crosses and towers > 1
        self.start, end = share(layer.maps, towers, tower)
        shape = network.weight_shape(index)
        whole = randomness.normal(shape, layer.std, seed, "weight", layer.name, dtype=dtype)
        weight = whole[self.start : end].clone()
        if layer.kind == "conv":
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.full((end - self.start,), layer.bias, dtype=dtype))

    def forward(self, x: Tensor, pair: Pair | None, dropout: Dropout | None) -> Tensor:
        layer = self.layer
        if pair:
            pair.where = layer.name
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        x = (
            self._conv(x, weight, bias, pair)
            if layer.kind == "conv"
            else self._full(x.flatten(1), weight, bias, pair)
        )
        rectify = False
        for step, after in zip_longest(layer.order, layer.order[1:]):
            if step == "activation" and layer.activation == "tanh":
                x = x.tanh_()
            elif step == "activation" and layer.activation:
                rectify = after == "norm" and bool(layer.norms)
                x = x if rectify else x.relu_()
            elif step == "norm":
                for norm in layer.norms:
                    x, rectify = normalize(x, norm, self.columns, rectify), False
            elif step == "pool" and layer.pool:
                x = max_pool(x, layer.pool)
        if dropout and layer.dropout:
            x = self._drop(x, dropout)
        return x

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor, pair: Pair | None) -> Tensor:
        layer = self.layer
        before, after = layer.padding
        if before != after:
            x = F.pad(x, (before, after, before, after))
            before = 0
        if self.crosses:
            assert pair
            return cross_conv2d(x, weight, bias, layer.stride, before, pair)
        rectified = layer.activation == "relu" and layer.order[0] == "activation"
        return conv2d(x, weight, bias, layer.stride, before, self.groups, rectified)

    def _full(self, x: Tensor, weight: Tensor, bias: Tensor, pair: Pair | None) -> Tensor:
        if self.crosses:
            assert pair
            return cross_linear(x, weight, bias, pair)
        if self.groups == 1:
            return linear(x, weight, bias)
        parts = zip(x.chunk(self.groups, 1), weight.chunk(self.groups), strict=True)
        return torch.cat([linear(part, w) for part, w in parts], dim=1) + bias

    def _drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        # Kept outputs are doubled in training instead of halved in test: the same in expectation.
        layer = self.layer
        units = x.shape[1]
        draw = dropout.draw(layer.name)
        keep = randomness.keep_mask(
            dropout.rows, self.start, units, layer.maps, layer.dropout, draw
        )
        return x * (keep.to(x.dtype) / (1 - layer.dropout))
