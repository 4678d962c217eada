"""Recipes: complete settings of what is computed, each a function with its expected outcome."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline import network
from pipeline.learning_rate import Schedule
from pipeline.network import Network


def setting(default: Any, text: str, allowed: tuple[Any, ...] | None = None) -> Any:
    """A dataclass field with its sentence, and the values it may have."""
    return field(default=default, metadata={"help": text, "allowed": allowed})


@dataclass(frozen=True)
class Recipe:
    """All that decides the mathematics of a run but its data, its seed and its mesh.

    Raises ValueError, naming field, value and what is allowed, for a value that cannot be.
    """

    network: str = setting("alexnet", "Table of layers, and recipe.", tuple(network.NETWORKS))
    activation: str = setting("relu", "After each layer but the last.", ("relu", "tanh"))
    lrn: bool = setting(True, "Local response normalisation where the table has it.")
    pooling: str = setting("3/2", "Window and stride of max-pooling.", ("3/2", "2/2"))
    dropout: float | None = setting(None, "Rate where the table drops; as in the table if unset.")
    columns: int = setting(2, "Columns of the network; 1 is the half-size column.", (1, 2))
    crossings: str = setting(
        "all", "Layers that read both columns: as in the table, or the last alone.", ("all", "last")
    )
    lrn_size: int | None = setting(None, "Maps that LRN sums over; as in the table if unset.")
    lrn_k: float | None = setting(None, "LRN's k; as in the table if unset.")
    lrn_alpha: float | None = setting(None, "LRN's alpha; as in the table if unset.")
    lrn_beta: float | None = setting(None, "LRN's beta; as in the table if unset.")
    init_std: float | None = setting(
        None, "Deviation of all initial weights, the paper's is 0.01; as in the table if unset."
    )
    init_scale: float = setting(1.0, "Factor on the deviations of initial weights.")

    image: int = setting(256, "Side in pixels that images are brought to before cropping.")
    crop: int | None = setting(None, "Side in pixels of the crops; as in the table if unset.")
    scale: float = setting(1.0, "Factor on pixels (0 to 255) once the mean is taken off.")
    pad: int = setting(0, "Pixels of reflected border before a random crop.")
    crops: bool = setting(True, "Random crops in training; else the centre.")
    mirror: bool = setting(True, "Mirror half of the training crops.")
    colour: float = setting(0.1, "Standard deviation of the PCA colour draws; 0 turns them off.")
    colour_scale: str = setting(
        "eigenvalues", "What those draws are scaled by.", ("eigenvalues", "deviations")
    )

    batch: int = setting(128, "Images of a global batch.")
    epochs: int = setting(90, "Times that the training images are gone through.")
    rate: float = setting(0.01, "Learning rate at the start.")
    schedule: str = setting("plateau", "When the rate is divided by 10.", ("plateau", "steps"))
    drops: tuple[float, ...] = setting((), "Epochs at which schedule 'steps' divides the rate.")
    patience: int = setting(3, "Evaluations without a better error before 'plateau' divides.")
    warmup: int = setting(0, "Steps over which the rate rises at the start.")
    momentum: float = setting(0.9, "Of the velocity.")
    decay: float = setting(5e-4, "Weight decay.")
    bias_rate: float = setting(1.0, "Rate of biases over that of weights.")
    decay_bias: bool = setting(True, "Whether biases decay too.")
    freeze: str = setting("", "Layers that keep their weights, FIRST:LAST, such as conv1:conv5.")
    precision: str = setting(
        "float32", "Of convolutions and products; weights are float32.", ("float32", "bfloat16")
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata.get("allowed")
            if allowed and value not in allowed:
                names = ", ".join(str(a) for a in allowed)
                raise ValueError(f"{f.name} is {value!r}: one of {names}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{f.name} is {number}: a finite number")
        if self.drops and min(self.drops) < 0:
            raise ValueError(f"drops has {min(self.drops)}: at least 0")
        self._at_least("batch", 1)
        self._at_least("epochs", 1)
        self._at_least("patience", 1)
        for name in ("pad", "colour", "warmup", "decay", "bias_rate"):
            self._at_least(name, 0)
        for name in ("rate", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: more than 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}: at least 0 and less than 1")
        _ = self.frozen
        if self.drops and self.schedule != "steps":
            raise ValueError(f"drops is {list(self.drops)}: only schedule 'steps' has drops")
        if self.pad and not self.crops:
            raise ValueError(f"pad is {self.pad}: it has no effect without crops")
        if self.pad >= self.image:
            raise ValueError(f"pad is {self.pad}: less than the image's {self.image} pixels")
        crop = self.build(1000).crop
        if self.image < crop:
            raise ValueError(f"image is {self.image}: at least the crop of {crop} pixels")

    def _at_least(self, name: str, least: int) -> None:
        if not getattr(self, name) >= least:
            raise ValueError(f"{name} is {getattr(self, name)}: at least {least}")

    def build(self, classes: int) -> Network:
        """The network of this recipe for so many classes."""
        return network.build(
            self.network,
            classes,
            activation=self.activation,
            lrn=self.lrn,
            pooling=self.pooling,
            dropout=self.dropout,
            columns=self.columns,
            crossings=self.crossings,
            norm={
                name: value
                for name in ("size", "k", "alpha", "beta")
                if (value := getattr(self, f"lrn_{name}")) is not None
            },
            init_std=self.init_std,
            init_scale=self.init_scale,
            crop=self.crop,
        )

    @property
    def frozen(self) -> range:
        """The layers, by number, that keep their weights."""
        names = [layer.name for layer in self.build(1000).layers]
        if not self.freeze:
            return range(0)
        first, _, last = self.freeze.partition(":")
        for name in (first, last or first):
            if name not in names:
                raise ValueError(f"freeze has {name!r}: FIRST:LAST of {', '.join(names)}")
        found = range(names.index(first), names.index(last or first) + 1)
        if not found:
            raise ValueError(f"freeze is {self.freeze}: {last} comes before {first}")
        if len(found) == len(names):
            raise ValueError(f"freeze is {self.freeze}: that leaves no layer to train")
        return found

    def advice(self, classes: int) -> str:
        """A line of warning if the rate is too high for so few classes, else "".

        alexnet's biases of 1 make the features f of fc7 much alike for all images, so that the
        loss curves by |f|^2 p (1 - p) along their mean, p being 1 / classes: about 25,000 / classes
        at the start, and with momentum .9 a rate beyond 3.8 over that diverges.
        """
        fits = 1e-4 * classes
        if not self.network.startswith("alexnet") or self.network == "alexnet-mini":
            return ""
        if self.rate <= fits:
            return ""
        return (
            f"a rate of {self.rate:g} suits {self.network} with 1000 classes; with {classes} the "
            f"loss may leap up and stay at chance: try --rate {0.3 * fits:.1g}"
        )

    def rates(self) -> Schedule:
        """The schedule of the learning rate."""
        return Schedule(self.rate, self.schedule, self.drops, self.patience, self.warmup)  # type: ignore[arg-type]


def alexnet() -> dict[str, Any]:
    """The paper's: `towers train SHARDS --network alexnet`. 90 epochs of ImageNet; the paper has
    40.7% top-1 and 18.2% top-5 error (validation, centre and corner crops), in five to six days on
    two GTX 580.
    """
    return {"network": "alexnet"}


def alexnet_2012() -> dict[str, Any]:
    """What the authors ran (source): biases learn twice as fast and don't decay, colour draws are
    scaled by standard deviations.
    """
    return {
        "network": "alexnet-2012",
        "bias_rate": 2.0,
        "decay_bias": False,
        "colour_scale": "deviations",
    }


def alexnet_mini() -> dict[str, Any]:
    """`towers train`: the drawn data set on two cores, about 1% top-1 error in one to three
    minutes.

    Batches of 64, as the first two hundred steps pass at chance, whatever they hold.
    """
    return {
        "network": "alexnet-mini",
        "image": 72,
        "scale": 1 / 64,
        "lrn_alpha": 0.02,  # of pixels so scaled; with 0.0001 normalisation would only halve them
        "batch": 64,
        "epochs": 8,
        "rate": 0.014,
        "schedule": "steps",
        "drops": (6.5,),
        "warmup": 80,
    }


def cifar() -> dict[str, Any]:
    """`towers train CIFAR10 --network cifar`: CIFAR-10 on two cores, about 25% top-1 error in
    6 to 20 minutes.
    """
    return {
        "network": "cifar",
        "image": 32,
        "scale": 1 / 64,
        "lrn_alpha": 0.1,  # of pixels so scaled; with 0.0001 normalisation would do nothing
        "pad": 4,
        "epochs": 5,
        "rate": 0.03,
        "schedule": "steps",
        "drops": (4.0, 4.75),
        "decay": 1e-3,
        "warmup": 100,
    }


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "alexnet": alexnet,
    "alexnet-2012": alexnet_2012,
    "alexnet-mini": alexnet_mini,
    "cifar": cifar,
}
