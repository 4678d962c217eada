"""Network tables: what the layers are, and nothing of how they are computed or placed.

Figures come from Krizhevsky, Sutskever and Hinton, NIPS 2012 ("paper", with its section), and from
the authors' code of 2012, `layers/layers-145.cfg` with its parameter file ("source").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Step = Literal["activation", "norm", "pool"]


@dataclass(frozen=True)
class Norm:
    """Response normalisation: b = a / (k + alpha * sum of a^2 over the window)^beta.

    The window is `size` neighbouring maps (paper, 3.3), or, if `spatial`, size x size positions of
    the same map (source, conv2).
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0
    spatial: bool = False


@dataclass(frozen=True)
class Pool:
    """Max-pooling over size x size positions, `stride` apart; overlaps if size > stride (3.4)."""

    size: int = 3
    stride: int = 2


@dataclass(frozen=True)
class Layer:
    """One layer of the whole network; `maps` counts the maps or units of all columns together."""

    name: str
    kind: Literal["conv", "full"]
    maps: int
    kernel: int = 1
    stride: int = 1
    padding: tuple[int, int] = (0, 0)  # left and top, right and bottom
    crosses: bool = False  # reads the maps of every column, not only of its own
    activation: Literal["relu", "tanh"] | None = "relu"
    norms: tuple[Norm, ...] = ()
    pool: Pool | None = None
    order: tuple[Step, ...] = ("activation", "norm", "pool")
    dropout: float = 0.0  # probability that an output is dropped in training (4.2)
    std: float = 0.01  # of the initial weights, drawn from N(0, std) (5)
    bias: float = 0.0  # initial value

    def convolved(self, side: int) -> int:
        """Side of what this convolution makes of maps of `side`, before any pooling."""
        return (side + sum(self.padding) - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Shape:
    """Maps, height and width of an activation; height and width are 1 after a full layer."""

    maps: int
    side: int

    @property
    def units(self) -> int:
        return self.maps * self.side * self.side


@dataclass(frozen=True)
class Network:
    """A table of layers over `crop` x `crop` RGB images, in `columns` columns (1 or 2).

    Raises ValueError, naming the layer, if the layers don't fit one another.
    """

    name: str
    crop: int
    columns: int
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if self.columns not in (1, 2):
            raise ValueError(f"columns is {self.columns}: a network has 1 or 2")
        if not self.layers or self.layers[-1].kind != "full":
            raise ValueError("the last layer has to be a full one, of a unit for each class")
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError(f"two layers of one name in {names}")
        for before, layer in pairwise(self.layers):
            if before.kind == "full" and layer.kind == "conv":
                raise ValueError(f"{layer.name}: a convolution cannot follow a full layer")
        for layer in self.layers:
            if layer.kind == "full" and (layer.norms or layer.pool):
                raise ValueError(f"{layer.name}: a full layer has no maps to normalise or pool")
            if any(norm.size % 2 == 0 for norm in layer.norms if norm.spatial):
                raise ValueError(f"{layer.name}: a window over positions has an odd side")
        if self.layers[0].crosses:
            raise ValueError(f"{names[0]}: the first layer has nothing to cross but the image")
        for layer in self.layers[:-1]:
            if layer.maps % self.columns:
                raise ValueError(f"{layer.name}: {layer.maps} maps in {self.columns} columns")
        if self.classes < 2:
            raise ValueError(f"{self.classes} classes: at least 2 are needed")
        for layer, shape in zip(self.layers, self.shapes, strict=True):
            if shape.side < 1:
                raise ValueError(f"{layer.name}: nothing is left of a {self.crop}-pixel crop")

    @property
    def classes(self) -> int:
        return self.layers[-1].maps

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What leaves each layer, pooling included, over all columns."""
        side, shapes = self.crop, []
        for layer in self.layers:
            if layer.kind == "full":
                side = 1
            else:
                side = layer.convolved(side)
                if layer.pool:
                    side = (side - layer.pool.size) // layer.pool.stride + 1
            shapes.append(Shape(layer.maps, side))
        return tuple(shapes)

    def inputs(self, index: int) -> Shape:
        """What enters layer `index`, over all columns."""
        return self.shapes[index - 1] if index else Shape(3, self.crop)

    def weight_shape(self, index: int) -> tuple[int, ...]:
        """Of the whole network: (maps, maps that one of them reads, *kernel)."""
        layer, inputs = self.layers[index], self.inputs(index)
        fan_in = inputs.maps if layer.kind == "conv" else inputs.units
        if not self.reads_all(index):
            fan_in //= self.columns
        kernel = (layer.kernel, layer.kernel) if layer.kind == "conv" else ()
        return (layer.maps, fan_in, *kernel)

    def multiply_adds(self, index: int) -> int:
        """Of layer `index` for one image, forward: its products, not activation or pooling."""
        layer, positions = self.layers[index], 1
        if layer.kind == "conv":
            positions = layer.convolved(self.inputs(index).side) ** 2
        return math.prod(self.weight_shape(index)) * positions

    def reads_all(self, index: int) -> bool:
        """Whether a column of layer `index` reads all that enters: the image, or a crossing."""
        return index == 0 or self.columns == 1 or self.layers[index].crosses


def alexnet(classes: int) -> Network:
    """The network of the paper (3.5): five convolutions and three full layers, two columns."""
    lrn, pool = (Norm(),), Pool()
    return Network(
        "alexnet",
        224,
        2,
        (
            Layer("conv1", "conv", 96, 11, 4, (2, 2), norms=lrn, pool=pool),
            Layer("conv2", "conv", 256, 5, 1, (2, 2), norms=lrn, pool=pool, bias=1),
            Layer("conv3", "conv", 384, 3, 1, (1, 1), crosses=True),
            Layer("conv4", "conv", 384, 3, 1, (1, 1), bias=1),
            Layer("conv5", "conv", 256, 3, 1, (1, 1), pool=pool, bias=1),
            Layer("fc6", "full", 4096, crosses=True, dropout=0.5, bias=1),
            Layer("fc7", "full", 4096, crosses=True, dropout=0.5, bias=1),
            Layer("fc8", "full", classes, crosses=True, activation=None),
        ),
    )


def alexnet_2012(classes: int) -> Network:
    """The network that the authors ran (source): where it differs from the paper's text."""
    lrn = Norm(alpha=1e-4 / 5)
    spatial = Norm(alpha=1e-3 / 25, k=1.0, spatial=True)
    changes: dict[str, dict[str, object]] = {
        # Windows overhang three pixels at the right and bottom instead of padding by two.
        "conv1": {"padding": (0, 3), "norms": (lrn,), "order": ("norm", "pool", "activation")},
        "conv2": {"norms": (lrn, spatial)},
        "conv3": {"std": 0.03},
        "conv4": {"std": 0.03},
        "conv5": {"std": 0.03, "order": ("norm", "pool", "activation")},
    }
    paper = alexnet(classes)
    layers = (replace(layer, **changes.get(layer.name, {})) for layer in paper.layers)  # type: ignore[arg-type]
    return replace(paper, name="alexnet-2012", layers=tuple(layers))


def alexnet_mini(classes: int) -> Network:
    """AlexNet's eight layers at a quarter of the width, on 64-pixel crops.

    conv1 strides by 3, so that five convolutions still see something of so small an image, and has
    16 maps a tower, which cost no more than 12 where vectors have 16 lanes. Initial
    weights are about as wide as He et al. 2015 have it for inputs of unit variance, because
    N(0, .01) dies out in layers so narrow.
    """
    lrn, pool = (Norm(),), Pool()
    return Network(
        "alexnet-mini",
        64,
        2,
        (
            Layer("conv1", "conv", 32, 11, 3, (2, 2), norms=lrn, pool=pool, std=0.07),
            Layer("conv2", "conv", 64, 5, 1, (2, 2), norms=lrn, pool=pool, std=0.055),
            Layer("conv3", "conv", 96, 3, 1, (1, 1), crosses=True, std=0.05),
            Layer("conv4", "conv", 96, 3, 1, (1, 1), std=0.06),
            Layer("conv5", "conv", 64, 3, 1, (1, 1), pool=pool, std=0.06),
            Layer("fc6", "full", 1024, crosses=True, dropout=0.5, std=0.14),
            Layer("fc7", "full", 1024, crosses=True, dropout=0.5, std=0.04),
            Layer("fc8", "full", classes, crosses=True, activation=None, std=0.02),
        ),
    )


def cifar(classes: int) -> Network:
    """Nearly the network of the paper's CIFAR-10 experiments (3.1, 3.3), in two columns.

    That is layers-conv-local-11pct.cfg of the authors' cuda-convnet. Of it are the two 5x5
    convolutions with pooling and normalisation; a 3x3 convolution stands for its two locally
    connected layers. It crosses where AlexNet does: after the second pooling and in the full layer.
    """
    lrn, pool = (Norm(k=1.0),), Pool()
    return Network(
        "cifar",
        32,
        2,
        (
            Layer("conv1", "conv", 64, 5, 1, (2, 2), norms=lrn, pool=pool, std=0.12),
            Layer("conv2", "conv", 64, 5, 1, (2, 2), norms=lrn, pool=pool, std=0.035),
            Layer("conv3", "conv", 128, 3, 1, (1, 1), crosses=True, pool=pool, std=0.03),
            Layer("fc4", "full", classes, crosses=True, activation=None, std=0.01),
        ),
    )


NETWORKS: dict[str, Callable[[int], Network]] = {
    "alexnet": alexnet,
    "alexnet-2012": alexnet_2012,
    "alexnet-mini": alexnet_mini,
    "cifar": cifar,
}


def build(
    name: str,
    classes: int,
    *,
    activation: str = "relu",
    lrn: bool = True,
    pooling: str = "3/2",
    dropout: float | None = None,
    columns: int = 2,
    crossings: str = "all",
    norm: Mapping[str, float] | None = None,
    init_std: float | None = None,
    init_scale: float = 1.0,
    crop: int | None = None,
) -> Network:
    """The network `name` for so many classes, with the variants of the paper's comparisons.

    `activation` relu or tanh (3.1), `lrn` False without normalisation (3.3), `pooling` "2/2"
    without overlap (3.4), `dropout` another rate where the table drops, `columns` 1 the half-size
    column of 3.2, `crossings` "last" with none before the last layer (source, run 150), `norm`
    other fields of `Norm` where it runs over maps, `init_std` the deviation of all initial weights
    (paper, 5: 0.01), `init_scale` a factor on deviations, `crop` another side of the crops, in
    pixels. Raises ValueError naming option, value and what is allowed.
    """
    if name not in NETWORKS:
        raise ValueError(f"network is {name!r}: one of {', '.join(NETWORKS)}")
    if activation not in ("relu", "tanh"):
        raise ValueError(f"activation is {activation!r}: relu or tanh")
    if pooling not in ("3/2", "2/2"):
        raise ValueError(f"pooling is {pooling!r}: 3/2 or 2/2")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: at least 0 and less than 1")
    network = NETWORKS[name](classes)
    if dropout is not None and not any(layer.dropout for layer in network.layers):
        raise ValueError(f"dropout is {dropout}: {name} has no layer with dropout")
    if crossings not in ("all", "last"):
        raise ValueError(f"crossings is {crossings!r}: all or last")
    if crossings == "last" and columns == 1:
        raise ValueError("crossings is 'last': one column has nothing to cross")
    for name, value in (("init_std", init_std), ("init_scale", init_scale)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}: more than 0")
    norm = dict(norm or {})
    _check_norm(norm, lrn)
    size, stride = map(int, pooling.split("/"))
    layers = []
    for layer in network.layers:
        if layer.activation:
            layer = replace(layer, activation=activation)  # type: ignore[arg-type]
        norms = (n if n.spatial else replace(n, **norm) for n in layer.norms if lrn)  # type: ignore[arg-type]
        layer = replace(layer, norms=tuple(norms), std=(init_std or layer.std) * init_scale)
        if crossings == "last" and layer.name != network.layers[-1].name:
            layer = replace(layer, crosses=False)
        if layer.pool:
            layer = replace(layer, pool=Pool(size, stride))
        if layer.dropout and dropout is not None:
            layer = replace(layer, dropout=dropout)
        layers.append(layer)
    network = replace(network, layers=tuple(layers), crop=network.crop if crop is None else crop)
    if columns == 1:
        return half_column(network)
    if columns != network.columns:
        raise ValueError(f"columns is {columns}: 1 or 2")
    return network


def _check_norm(norm: Mapping[str, float], lrn: bool) -> None:
    """Raises ValueError, naming it, for a field of `Norm` that cannot be."""
    for name, value in norm.items():
        if not lrn:
            raise ValueError(f"lrn_{name} is {value}: it has no effect without lrn")
        if name == "size" and (value < 1 or value % 2 == 0):
            raise ValueError(f"lrn_size is {value}: an odd number, at least 1")
        if name == "k" and not value > 0:  # or 0 / 0 where nothing is active
            raise ValueError(f"lrn_k is {value}: more than 0")
        if not value >= 0:
            raise ValueError(f"lrn_{name} is {value}: at least 0")


def half_column(network: Network) -> Network:
    """One column with half the kernels of each convolution but the last (3.2, footnote 1)."""
    last = [layer.name for layer in network.layers if layer.kind == "conv"][-1]
    layers = tuple(
        replace(layer, maps=layer.maps // 2)
        if layer.kind == "conv" and layer.name != last
        else layer
        for layer in network.layers
    )
    return replace(network, columns=1, layers=layers)
