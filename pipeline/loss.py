"""Cross-entropy over classes that are split between the towers, and where the truth ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.crossing import Pair
from pipeline.randomness import mix


class LabelsDiffer(RuntimeError):
    """The towers of a pair were given different labels for the same batch."""


def cross_entropy(
    logits: Tensor, labels: Tensor, first: int, pair: Pair | None
) -> tuple[Tensor, Tensor]:
    """The summed loss and the rank of the true class of each image.

    `logits` [n, own classes], those of classes first, first + 1, ...; `labels` int64 [n] over all
    classes. Returns a scalar, the sum over the n images of -log softmax (so that it adds up over
    micro-batches and replicas), and int64 [n], how many classes come before the true one: 0 means
    right, under 5 right among five. Among equal logits the lower class comes first.

    Two all-reduces cross, of 2n + 2 and 2n numbers: row maxima, the true class's logit and a
    checksum of the labels; sums of exponentials and ranks. (torch's `loss_parallel` takes three,
    wants DTensors, and neither ranks nor compares labels.) Raises LabelsDiffer if the labels of the
    two towers differ.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return _CrossEntropy.apply(wide, labels, first, pair)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, pair: Pair | None
    ) -> tuple[Tensor, Tensor]:
        own = labels - first
        mine = (own >= 0) & (own < logits.shape[1])
        own = own.clamp(0, logits.shape[1] - 1)

        peak = logits.amax(1)
        target = logits.gather(1, own[:, None])[:, 0].masked_fill(~mine, -math.inf)
        if pair:
            check = _checksum(labels).to(peak)
            largest = pair.max_(torch.cat((peak, target, check, -check)))
            if largest[-2] != -largest[-1]:
                raise LabelsDiffer("the two towers were given different labels for one batch")
            peak, target = largest[:-2].chunk(2)
        exponents = (logits - peak[:, None]).exp_()
        classes = torch.arange(first, first + logits.shape[1], device=logits.device)
        tied = (logits == target[:, None]) & (classes < labels[:, None])
        # Not `>`, so that none is right among what are not numbers.
        before = (~(logits <= target[:, None]) | tied).sum(1)
        sums = torch.stack((exponents.sum(1), before.to(exponents)))  # exact up to 2^24 classes
        if pair:
            pair.sum_(sums)
        total, ranks = sums[0], sums[1].long()
        loss = (total.log() + peak - target).sum()

        truth = (classes == labels[:, None]).to(exponents)
        ctx.save_for_backward(exponents.div_(total[:, None]).sub_(truth))
        ctx.mark_non_differentiable(ranks)
        return loss, ranks

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return difference * grad, None, None, None


def _checksum(labels: Tensor) -> Tensor:
    """[1], under 2^24, so that float32 holds it exactly; it depends on the order."""
    # Hashed, because a plain weighted sum is the same for 2, 0 and 0, 1, say.
    place = torch.arange(len(labels), dtype=torch.int32, device=labels.device)
    return mix(mix(labels.to(torch.int32)) + place).sum(0, keepdim=True) & 0xFFFFFF
