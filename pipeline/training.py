"""One step of training or evaluation on one rank: pixels to totals, and weights moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.crossing import Pair
from pipeline.loss import cross_entropy
from pipeline.optimizer import SGD
from pipeline.tower import Dropout, Tower


class NotANumber(RuntimeError):
    """The loss is no longer a finite number; weights are as they were before the step."""


@dataclass(frozen=True)
class Images:
    """One replica's images of a global batch, on any device.

    `crops` uint8 [n, crop, crop, 3], `labels` int64 [n], `shifts` float32 [n, 3] in grey levels to
    add to each pixel, `places` int64 [n] the place of each in the global batch, in order if unset.
    """

    crops: Tensor
    labels: Tensor
    shifts: Tensor
    places: Tensor | None = None


@dataclass(frozen=True)
class Totals:
    """Sums over images: the loss, and how many were not right at once or among five."""

    images: int = 0
    loss: float = 0.0
    wrong1: int = 0
    wrong5: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.images + other.images,
            self.loss + other.loss,
            self.wrong1 + other.wrong1,
            self.wrong5 + other.wrong5,
        )

    def means(self) -> dict[str, float]:
        """loss, top1_error and top5_error as means over the images (nan of none)."""
        n = self.images or math.nan
        return {
            "loss": self.loss / n,
            "top1_error": self.wrong1 / n,
            "top5_error": self.wrong5 / n,
        }


class Trainer:
    """Steps a tower together with the ranks of its pair and its replicas.

    `mean` float32 [crop, crop, 3] is subtracted from the pixels (0 to 255), then `scale` multiplies
    them. Gradients are those of the mean loss over the global batch, whatever its micro-batches and
    replicas.
    """

    def __init__(
        self,
        tower: Tower,
        optimizer: SGD,
        mean: Tensor,
        *,
        seed: int,
        scale: float = 1.0,
        pair: Pair | None = None,
        replicas: dist.ProcessGroup | None = None,
        microbatches: int = 1,
    ) -> None:
        self.tower, self.optimizer, self.pair = tower, optimizer, pair
        self.replicas = replicas if replicas and replicas.size() > 1 else None
        self.seed, self.scale, self.microbatches = seed, scale, microbatches
        self.device = next(tower.parameters()).device
        # The dtype of the weights, so that a float64 tower is float64 from its pixels on.
        self.mean = mean.to(self.device, next(tower.parameters()).dtype)

    def step(self, images: Images, step: int) -> Totals:
        """Trains on a global batch as step number `step`; returns its totals before the step.

        Raises NotANumber (on every rank alike), `LabelsDiffer` from the loss.
        """
        totals = self.gradients(images, step)
        if not math.isfinite(totals.loss):
            raise NotANumber(f"the loss is {totals.loss} at step {step}")
        self.optimizer.step()
        return totals

    def gradients(self, images: Images, step: int) -> Totals:
        """Sets the gradient of every parameter to that of the global batch's mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        count = int(self._over_replicas(torch.tensor([len(images.labels)], device=self.device)))
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        places = torch.arange(len(images.labels)) if images.places is None else images.places
        end = 0
        for part in places.to(self.device).chunk(self.microbatches) if len(places) else ():
            start, end = end, end + len(part)
            loss, sums = self._forward(images, start, end, Dropout(self.seed, step, part))
            (loss / count).backward()
            totals += sums
        if self.replicas:
            # Every rank in the table's order, also one that had no image of a short last batch.
            for p in self.tower.parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                self._over_replicas(p.grad)
        return self._totals(totals)

    @torch.no_grad()
    def evaluate(self, images: Images) -> Totals:
        """The totals of a global batch without dropout; weights and gradients stay."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        if n := len(images.labels):
            sums += self._forward(images, 0, n, None)[1]
        return self._totals(sums)

    def _forward(
        self, images: Images, start: int, end: int, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        x, labels = self._pixels(images, start, end)
        logits = self.tower(x, self.pair, dropout)
        loss, ranks = cross_entropy(logits, labels, self.tower.first_class, self.pair)
        wrong1, wrong5 = (ranks >= 1).sum(), (ranks >= 5).sum()
        return loss, torch.stack([loss.new_tensor(end - start), loss.detach(), wrong1, wrong5])

    def _pixels(self, images: Images, start: int, end: int) -> tuple[Tensor, Tensor]:
        """[n, 3, crop, crop] in channels-last layout, mean taken off and colour shifted."""
        crops, labels, shifts = (
            t[start:end].to(self.device, non_blocking=True)
            for t in (images.crops, images.labels, images.shifts)
        )
        offset = shifts.to(self.mean.dtype)[:, None, None, :] - self.mean
        return (offset + crops).mul_(self.scale).permute(0, 3, 1, 2), labels

    def _over_replicas(self, x: Tensor) -> Tensor:
        if self.replicas:
            dist.all_reduce(x, group=self.replicas)
        return x

    def _totals(self, sums: Tensor) -> Totals:
        images, loss, wrong1, wrong5 = self._over_replicas(sums).tolist()
        return Totals(int(images), loss, int(wrong1), int(wrong5))
