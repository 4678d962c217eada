"""What a trained network says of images, and how often it is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import NotANumber
from pipeline.network import Network
from pipeline.tower import Tower

TOP = 5  # classes that the truth may be among


class Classifier:
    """A whole network in one process, for answers and not for training.

    `weights`: by their whole-network names; full layers use their memory as it is, so that
    processes can share it. `mean` float32 [crop, crop, 3] is subtracted from pixels (0 to 255),
    then `scale` multiplies them. `compute`: dtype of convolutions and products.
    """

    def __init__(
        self,
        network: Network,
        weights: Mapping[str, Tensor],
        mean: Tensor,
        *,
        scale: float = 1.0,
        compute: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        with torch.device("meta"):  # shapes alone: the initial weights would be thrown away
            self.tower = Tower(network, seed=0, compute=compute)
        state = {f"blocks.{name}": _laid_out(w.to(device)) for name, w in weights.items()}
        self.tower.load_state_dict(state, assign=True)
        self.mean, self.scale = mean.to(device), scale

    @torch.no_grad()
    def probabilities(self, crops: Tensor) -> Tensor:
        """Crops uint8 [n, k, crop, crop, 3] to float64 [n, classes] on the CPU: the mean over an
        image's k crops of the softmax outputs. Raises NotANumber if those are none.
        """
        # In float64, so that classes that differ in their logits still differ here.
        total = torch.zeros((), dtype=torch.float64, device=self.mean.device)
        for some in crops.unbind(1):
            total = total + self.logits(some).double().softmax(1)
        return (total / crops.shape[1]).cpu()

    @torch.no_grad()
    def logits(self, crops: Tensor) -> Tensor:
        """Crops uint8 [n, crop, crop, 3] to logits [n, classes] on the network's device, in the
        dtype that it computes in. Raises NotANumber if they are none.
        """
        return self._blocks(crops, len(self.tower.blocks))

    @torch.no_grad()
    def features(self, crops: Tensor) -> Tensor:
        """What the last layer reads, such as the outputs of fc7: float32 [n, units] on the CPU.

        Raises NotANumber if they are none.
        """
        return self._blocks(crops, len(self.tower.blocks) - 1).flatten(1).float().cpu()

    def _blocks(self, crops: Tensor, count: int) -> Tensor:
        """What the first `count` layers make of crops. Raises NotANumber if that is not finite."""
        x = (crops.to(self.mean.device) - self.mean).mul_(self.scale).permute(0, 3, 1, 2)
        x = x.to(self.tower.compute)
        for block in list(self.tower.blocks.values())[:count]:
            x = block(x, None, None)
        if not x.isfinite().all():
            raise NotANumber("what the network makes of images are no numbers")
        return x


def average(predictions: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The weighted mean of several networks' probabilities, each [n, classes]; equal weights if
    none are given. Raises ValueError for weights that are too few or many, or have no sum.
    """
    shares = [1.0] * len(predictions) if weights is None else list(weights)
    if len(shares) != len(predictions):
        raise ValueError(f"weights has {len(shares)} numbers: {len(predictions)}, one a network")
    if min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise ValueError(f"weights is {shares}: 0 or more each, and more than 0 in all")
    mixed = torch.zeros_like(predictions[0])
    for share, prediction in zip(shares, predictions, strict=True):
        mixed += share / sum(shares) * prediction
    return mixed


def best(probabilities: Tensor, count: int = TOP) -> tuple[Tensor, Tensor]:
    """The likeliest classes of each image, and their probabilities: int64 and float64
    [n, at most count], falling. Among equals the lower class comes first.
    """
    values, classes = probabilities.sort(dim=1, descending=True, stable=True)
    return classes[:, :count], values[:, :count]


@dataclass(frozen=True)
class Verdicts:
    """What became of n images, each int64 [n] but the losses, float64 [n].

    `labels`: the true classes; `predicted`: the likeliest ones; `ranks`: how many classes come
    before the true one; `losses`: -log of its probability.
    """

    labels: Tensor
    predicted: Tensor
    ranks: Tensor
    losses: Tensor

    def means(self) -> dict[str, float]:
        """images, loss, top1_error and top5_error; errors are nan of no images.

        The sum is exact, so that the order of the images does not matter.
        """
        images = len(self.labels)
        n = images or math.nan
        return {
            "images": images,
            "loss": math.fsum(self.losses.tolist()) / n,
            "top1_error": int((self.ranks >= 1).sum()) / n,
            "top5_error": int((self.ranks >= TOP).sum()) / n,
        }

    def confusion(self, classes: int) -> Tensor:
        """int64 [k, 3]: a true class, a predicted one and how many images, where there are any, in
        order. A table of all pairs would take gigabytes for twenty thousand classes.
        """
        cells, counts = (self.labels * classes + self.predicted).unique(return_counts=True)
        return torch.stack([cells // classes, cells % classes, counts], 1)

    def by_class(self, classes: int) -> list[dict[str, float | None]]:
        """images, top1_error and top5_error of each class; errors are None without images."""

        def count(chosen: Tensor) -> list[int]:
            return torch.bincount(self.labels[chosen], minlength=classes).tolist()

        every = count(torch.ones_like(self.labels, dtype=torch.bool))
        wrong1, wrong5 = count(self.ranks >= 1), count(self.ranks >= TOP)
        return [
            {"images": n, "top1_error": a / n if n else None, "top5_error": b / n if n else None}
            for n, a, b in zip(every, wrong1, wrong5, strict=True)
        ]


def judge(probabilities: Tensor, labels: Tensor) -> Verdicts:
    """Compares probabilities [n, classes] with labels int64 [n]; among equal classes the lower
    comes first, as in training.
    """
    classes = torch.arange(probabilities.shape[1])
    target = probabilities.gather(1, labels[:, None])
    tied = (probabilities == target) & (classes < labels[:, None])
    ranks = (~(probabilities <= target) | tied).sum(1)  # all before the true one if it is nan
    tiny = torch.finfo(torch.float64).tiny  # the loss of an impossible truth stays finite
    losses = -target[:, 0].double().clamp_min(tiny).log()
    return Verdicts(labels, probabilities.argmax(1), ranks, losses)


def _laid_out(weight: Tensor) -> Tensor:
    """Convolutions with channels last, as in training; others as they are."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
