"""What the paper states of its network and its crops, counted from ours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datasets.augmentation import Augmentation, draws, train_crop
from pipeline.description import describe
from pipeline.network import build
from workers.claims import REFUTED, SUPPORTED

NEAR = 0.05  # a count within this share of the paper's round figure is the same


@dataclass(frozen=True)
class Count:
    """A count, and the paper's, `said` as it stands there, None if it states none; and a note."""

    name: str
    says: str
    said: str
    paper: int | None
    ours: int
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether ours is the paper's figure, as far as that is exact."""
        if self.paper is None:
            return "counted"
        return SUPPORTED if abs(self.ours / self.paper - 1) <= NEAR else REFUTED


def parameters() -> Count:
    """The weights and biases of the two-tower network."""
    ours = sum(cost.parameters for cost in describe(build("alexnet", 1000)))
    text = "The network has 60 million parameters"
    return Count("parameters", text, "60 million (1)", 60_000_000, ours)


def multiply_adds() -> Count:
    """Those of one image, forward."""
    network = build("alexnet", 1000)
    ours = sum(network.multiply_adds(n) for n in range(len(network.layers)))
    text = "Multiply-adds of an image, forward"
    return Count("multiply-adds", text, "not stated", None, ours, "convolutions and full layers")


def layers() -> Count:
    """Layers with weights."""
    ours = len(build("alexnet", 1000).layers)
    return Count("layers", "Eight layers have weights", "8 (3.5)", 8, ours)


def neurons() -> Count:
    """Outputs of all layers before pooling."""
    network = build("alexnet", 1000)
    ours = 0
    for n, layer in enumerate(network.layers):
        side = layer.convolved(network.inputs(n).side) if layer.kind == "conv" else 1
        ours += layer.maps * side**2
    return Count("neurons", "The network has 650,000 neurons", "650,000 (1)", 650_000, ours)


def positions() -> Count:
    """Different crops of one image that augmentation makes, seen by drawing until no more come."""
    side, crop = 256, 224
    place = np.arange(side, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(place[:, None], place, np.uint8(0)), axis=-1)
    aug, seen = Augmentation(side, crop), set[tuple[int, int]]()
    last = 0
    for draw in range(1_000_000):
        made = train_crop(pixels, aug, draws(0, 0, [draw])[0][0])
        corner = int(made[0, 0, 0]) * side + int(made[0, 0, 1]), int(made[0, -1, 1])
        if corner not in seen:
            seen.add(corner)
            last = draw
        elif draw > last + 15_000:
            break
    places = side - crop + 1
    note = f"{places} x {places} x 2; the paper leaves out the last row and column of places"
    text = "Crops and mirror images make 2048 of each image"
    return Count("crops-2048", text, "2048 (4.1)", None, len(seen), note)


COUNTS = {
    "parameters": parameters,
    "multiply-adds": multiply_adds,
    "layers": layers,
    "neurons": neurons,
    "crops-2048": positions,
}
