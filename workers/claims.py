"""The paper's claims, each a small experiment: what is compared, by what, and when it is shown.

Krizhevsky, Sutskever and Hinton, NIPS 2012 ("paper"); run 150 stands in the authors' code of 2012.
A claim that is not counted compares two arms by one measure, each trained from several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

GOAL = 0.25  # the training error that the paper's figure 1 counts iterations to


@dataclass(frozen=True)
class Arm:
    """A recipe: settings beside its network's own, trained for `epochs` at scale 1.

    Each of its `rates` is tried with the first seed, and the best one taken for the others: the one
    with the lowest error, or with `to_goal`, where a run ends at that training error, the one that
    came there first.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    rates: tuple[float, ...] = ()
    to_goal: bool = False


# Crops of 32 pixels out of 36, so that they move, and ten of them differ, as the paper's do.
CIFAR = {"network": "cifar", "image": 36, "pad": 0}
PLAIN = {"crops": False, "mirror": False, "colour": 0.0}
# The paper's four layers and nothing that regularises, at one rate throughout.
BARE = {**PLAIN, "lrn": False, "decay": 0.0, "schedule": "steps", "drops": (), "warmup": 0}
RATES = (0.01, 0.03, 0.1)
# Pixels as they are, and all weights drawn alike, as the paper has them (2, 5).
UNSCALED = {**CIFAR, "scale": 1.0, "init_std": 0.01}
AS_THEN = {**UNSCALED, **BARE, "columns": 1}
# Alpha of the authors' network for this claim (cuda-convnet, layers-conv-local-11pct.cfg: .001 over
# a window of 5).
NORMALISED = {**UNSCALED, "lrn_alpha": 2e-4}
SLOW = (0.0015, 0.003, 0.006)
# Crops of which windows of 3/2 and of 2/2 leave maps of the same sides, 15, 7 and 3 pixels, as both
# do of the paper's crops.
EVEN = {**CIFAR, "crop": 31}
# The rate stays: where a fall of it came before the goal, an arm's epochs would decide.
STEADY = {"network": "alexnet-mini", "drops": ()}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("relu", AS_THEN, 100, (0.001, 0.003, 0.01), to_goal=True),
        Arm("tanh", {**AS_THEN, "activation": "tanh"}, 100, (0.01, 0.03, 0.1), to_goal=True),
        Arm("relu-scaled", {**CIFAR, **BARE}, 40, RATES, to_goal=True),
        Arm("tanh-scaled", {**CIFAR, **BARE, "activation": "tanh"}, 40, RATES, to_goal=True),
        Arm("dropout", {"network": "alexnet-mini"}),
        Arm("no-dropout", {"network": "alexnet-mini", "dropout": 0.0}),
        Arm("dropout-to-goal", STEADY, 100, to_goal=True),
        Arm("no-dropout-to-goal", {**STEADY, "dropout": 0.0}, 100, to_goal=True),
        Arm("base", CIFAR),
        Arm("lrn", NORMALISED, rates=SLOW),
        Arm("no-lrn", {**UNSCALED, "lrn": False}, rates=SLOW),
        Arm("pooling-3-2", EVEN),
        Arm("pooling-2-2", {**EVEN, "pooling": "2/2"}),
        Arm("half-column", {**CIFAR, "columns": 1}),
        Arm("crossings-last", {**CIFAR, "crossings": "last"}),
        Arm("no-augmentation", {**CIFAR, **PLAIN}),
        Arm("mirror", {**CIFAR, **PLAIN, "mirror": True}),
        Arm("crops", {**CIFAR, **PLAIN, "crops": True}),
        Arm("colour", {**CIFAR, **PLAIN, "colour": 0.1}),
    )
}


@dataclass(frozen=True)
class Claim:
    """`better` has less of `measure` than `worse`, says the paper: each an arm, or an arm and a
    measure of its own where the same arm is measured twice.

    The figure is worse - better, or with `ratio` worse / better, of which the paper says `factor`.
    `beside` are arms that are only shown.
    """

    name: str
    says: str
    paper: str
    better: str
    worse: str
    measure: str = "top1_error"
    worse_measure: str = ""
    ratio: bool = False
    factor: float | None = None
    beside: tuple[str, ...] = ()

    @property
    def arms(self) -> tuple[str, ...]:
        """All that are trained for it, each once."""
        return tuple(dict.fromkeys((self.better, self.worse, *self.beside)))

    @property
    def measures(self) -> tuple[str, str]:
        """Of the better and of the worse arm."""
        return self.measure, self.worse_measure or self.measure

    @property
    def compared(self) -> tuple[str, ...]:
        """What there are values of: its arms, or the measures of the one that is measured twice."""
        return self.measures if self.better == self.worse else self.arms


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "relu",
            "ReLU reaches 25% training error in a sixth of tanh's iterations",
            "6 x (3.1, figure 1)",
            *("relu", "tanh", "iterations"),
            ratio=True,
            factor=6.0,
        ),
        Claim(
            "relu-scaled",
            "ReLU is there first too if pixels and weights are scaled so that tanh can follow",
            "not stated",
            *("relu-scaled", "tanh-scaled", "iterations"),
            ratio=True,
        ),
        Claim(
            "lrn",
            "Response normalisation lowers the error",
            "1.4 points; CIFAR-10: 13% to 11% (3.3)",
            *("lrn", "no-lrn"),
        ),
        Claim(
            "pooling",
            "Overlapping pooling, 3/2 against 2/2, lowers the error",
            "0.4 points (3.4)",
            *("pooling-3-2", "pooling-2-2"),
        ),
        Claim(
            "dropout",
            "Dropout of .5 in layers 6 and 7 lessens overfitting",
            "without it substantial (4.2)",
            *("dropout", "no-dropout", "gap"),
        ),
        Claim(
            "dropout-time",
            "Dropout takes about twice the iterations",
            "2 x (4.2)",
            *("no-dropout-to-goal", "dropout-to-goal", "iterations"),
            ratio=True,
            factor=2.0,
        ),
        Claim(
            "augmentation",
            "Crops, mirror images and colours lessen overfitting",
            "without them substantial (4.1)",
            *("base", "no-augmentation", "gap"),
            beside=("mirror", "crops", "colour"),
        ),
        Claim(
            "colour",
            "Shifts of colour lower the error",
            "more than 1 point (4.1)",
            *("colour", "no-augmentation"),
        ),
        Claim(
            "towers",
            "Two towers have a lower error than one half-size column",
            "1.7 points (3.2)",
            *("base", "half-column"),
        ),
        Claim(
            "towers-time",
            "Two towers, on two devices, step a little faster than the half-size column on one",
            "slightly less time (3.2)",
            *("base", "half-column", "step_seconds"),
            ratio=True,
        ),
        Claim(
            "crossings",
            "Towers that cross before the last layer too have a lower error",
            "1.2 points (run 150)",
            *("base", "crossings-last"),
        ),
        Claim(
            "ten-crops",
            "Ten crops of a test image lower the error against the centre alone",
            "1.5 points (4.1)",
            *("base", "base", "ten_crops", "one_crop"),
        ),
        Claim(
            "averaging",
            "The averaged prediction of several networks lowers the error of one",
            "2.6 points, five networks (6)",
            *("base", "base", "averaged", "one_crop"),
        ),
    )
}

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for 95% of both sides, by degrees of freedom from 1 on."""

SUPPORTED, REFUTED, UNSHOWN = "supported", "not supported", "cannot show at this scale"
WEAKER = "supported, but weaker"


@dataclass(frozen=True)
class Finding:
    """The figure of a claim, `low` to `high` what it may be with 95% certainty by the spread
    between seeds (nan of one seed), and the verdict. `bound`: the figure is a least one.
    """

    figure: float
    low: float
    high: float
    verdict: str
    bound: bool = False


def judge(
    claim: Claim,
    better: Sequence[float],
    worse: Sequence[float],
    *,
    better_reached: bool = True,
    worse_reached: bool = True,
) -> Finding:
    """The finding from the measure of either arm's run of each seed, seeds in the same order.

    Supported is what lies beyond the spread between seeds on the claim's side, with the paper's
    factor within it, if there is one. A run that did not come to the goal counts as if it had come
    there at its end, so that only the worse arm's may not.
    """
    if not (better and worse and better_reached):
        return Finding(math.nan, math.nan, math.nan, UNSHOWN)
    if claim.ratio:
        better, worse = [math.log(v) for v in better], [math.log(v) for v in worse]
    figure, low, high = interval(better, worse)
    if low > 0:
        weak = claim.factor is not None and worse_reached and high < math.log(claim.factor)
        verdict = WEAKER if weak else SUPPORTED
    else:
        verdict = REFUTED if high < 0 and worse_reached else UNSHOWN
    if claim.ratio:
        figure, low, high = math.exp(figure), math.exp(low), math.exp(high)
    return Finding(figure, low, high, verdict, bound=not worse_reached)


TINY = 1e-20  # a variance that is what is left of rounding


def interval(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float, float]:
    """The difference of the means, worse - better, and where it lies with 95% certainty by the
    spread of the values, nan without one: errors are counts, and equal ones say little of it.

    As many values of either are taken in pairs: runs of one seed see the same images in the same
    order. A single value is taken to be as uncertain as one of the others.
    """
    figure = fmean(worse) - fmean(better)
    several = [values for values in (better, worse) if len(values) > 1]
    if not several:
        return figure, math.nan, math.nan
    if len(better) == len(worse):
        several = [[w - b for w, b in zip(worse, better, strict=True)]]
        per_run = 1 / len(better)
    else:
        per_run = 1 / len(better) + 1 / len(worse)
    freedom = sum(len(values) - 1 for values in several)
    spread = fmean([variance(values) for values in several])
    if spread < TINY:
        return figure, math.nan, math.nan
    margin = T95[min(freedom, len(T95)) - 1] * math.sqrt(spread * per_run)
    return figure, figure - margin, figure + margin
