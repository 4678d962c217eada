"""Trains the arms of claims and measures them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

from pipeline.recipes import Recipe
from workers.claims import Arm, Claim, Finding, judge
from workers.config import Config, UserError, configure
from workers.evaluate import evaluate
from workers.history import History, read_history
from workers.progress import Progress
from workers.run import CONFIG, is_run
from workers.trials import prepare_data, run_all


@dataclass(frozen=True)
class Scale:
    """What the arms are trained on and how long: `scale` times their epochs on `images` training
    images, all if None, of `data`, the drawn data set if "".
    """

    data: str = ""
    scale: float = 1.0
    images: int | None = None
    precision: str = "float32"


class ArmRun(NamedTuple):
    """A run of an arm; `rate` if it is not the recipe's own."""

    arm: Arm
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        rated = f"-rate{self.rate:g}" if self.rate else ""
        return f"{self.arm.name}{rated}-seed{self.seed}"


class Lab:
    """Trains arms and measures them."""

    def __init__(
        self, folder: str, scale: Scale, seeds: int, parallel: int | None, progress: Progress
    ) -> None:
        self.folder, self.scale, self.seeds = folder, scale, seeds
        self.parallel, self.progress = parallel, progress
        self.shards = scale.data
        self.failures: dict[str, str] = {}
        self.evaluated: dict[tuple[str, ...], Any] = {}

    def train(self, arms: Iterable[Arm]) -> dict[str, list[History]]:
        """The runs of each arm, those of each seed that came to their end."""
        arms = list({arm.name: arm for arm in arms}.values())
        configs = [self.config(ArmRun(arm, 0)) for arm in arms]
        self.shards = prepare_data(configs, self.folder, self.progress)
        seeds = range(self.seeds)
        tried = [ArmRun(arm, 0, rate) for arm in arms for rate in arm.rates]
        self._run(tried + [ArmRun(arm, seed) for arm in arms if not arm.rates for seed in seeds])
        best = {arm.name: self.best_rate(arm) for arm in arms}
        chosen = {arm.name: [ArmRun(arm, s, best[arm.name]) for s in seeds] for arm in arms}
        self._run(run for runs in chosen.values() for run in runs if run.rate)
        found = {name: map(self._history, runs) for name, runs in chosen.items()}
        return {name: [one for one in told if one.done] for name, told in found.items()}

    def config(self, run: ArmRun) -> Config:
        settings = {**run.arm.settings, **({"rate": run.rate} if run.rate else {})}
        if self.scale.images:
            settings["images"] = self.scale.images
        epochs = max(1, round(run.arm.epochs * self.scale.scale))
        more = {"epochs": epochs, "seed": run.seed, "precision": self.scale.precision}
        return configure({**settings, **more, "shards": self.shards, "run": self._place(run)})

    def _place(self, run: ArmRun) -> str:
        return f"{self.folder}/runs/{run.name}"

    def _run(self, wanted: Iterable[ArmRun]) -> None:
        """Runs what is not done yet."""
        configs, ending = {}, set()
        for run in wanted:
            place, config = self._place(run), self.config(run)
            if is_run(place):
                _check(place, config)
            if not self._history(run).done:
                configs[place] = config
                if run.arm.to_goal:
                    ending.add(place)
        if not configs:
            return
        self.progress.say(f"to run: {len(configs)}")
        failures = run_all(
            configs,
            self.folder,
            self.progress,
            name="tune",
            parallel=self.parallel,
            stop=partial(_at_goal, frozenset(ending)),
        )
        for place, why in failures.items():
            self.progress.say(f"{place} failed: {why}")
        self.failures |= failures

    def _history(self, run: ArmRun) -> History:
        return read_history(self._place(run), goal=run.arm.to_goal)

    def best_rate(self, arm: Arm) -> float | None:
        """The rate that came to the goal first, or nearest to it; of an arm that trains to its end
        the one with the lowest error.
        """
        if not arm.rates:
            return None

        def order(rate: float) -> tuple[float, float]:
            told = self._history(ArmRun(arm, 0, rate))
            if not (told.done and told.curve):
                return math.inf, math.inf
            if not arm.to_goal:
                return told.top1_error, 0.0
            return told.reached or math.inf, told.curve[-1][1]

        return min(arm.rates, key=order)

    def measured(
        self, claim: Claim, runs: dict[str, list[History]]
    ) -> tuple[Finding, dict[str, Any]]:
        """The finding of a claim, and what was measured of each arm, a value a seed."""

        def of(arm: str, measure: str) -> dict[str, float]:
            """By seed, of the runs that are long enough for the measure."""
            found = {one.seed: self._value(one, measure, claim, runs) for one in runs[arm]}
            return {seed: value for seed, value in found.items() if math.isfinite(value)}

        first, second = map(of, (claim.better, claim.worse), claim.measures)
        both = [seed for seed in first if seed in second]
        better, worse = [first[seed] for seed in both], [second[seed] for seed in both]
        if claim.measure == "averaged":
            better = better[:1]
        if claim.better == claim.worse:
            values = dict(zip(claim.measures, (better, worse), strict=True))
        else:
            arms = {arm: of(arm, claim.measure) for arm in claim.beside}
            arms = {claim.better: first, claim.worse: second, **arms}
            values = {arm: list(found.values()) for arm, found in arms.items()}
        reached = {
            arm: claim.measure != "iterations" or all(one.reached for one in runs[arm])
            for arm in claim.arms
        }
        finding = judge(
            claim,
            better,
            worse,
            better_reached=reached[claim.better],
            worse_reached=reached[claim.worse],
        )
        return finding, values

    def _value(
        self, one: History, measure: str, claim: Claim, runs: dict[str, list[History]]
    ) -> float:
        """A measure of a run."""
        if measure == "iterations":
            return float(one.reached or one.curve[-1][0])
        if measure == "gap":
            arms = [run.run for arm in claim.arms for run in runs[arm]]
            return one.top1_error - self._errors(arms, split="train")[one.run]
        if measure in ("one_crop", "ten_crops", "averaged"):
            same = [run.run for run in runs[claim.better]]
            errors = self._errors(same, crops=10 if measure == "ten_crops" else 1)
            return errors["averaged" if measure == "averaged" else one.run]
        return getattr(one, measure)

    def _errors(self, runs: Sequence[str], **options: Any) -> dict[str, float]:
        """The top-1 errors of runs as `towers evaluate` finds them, and of their average."""
        key = (*runs, json.dumps(options))
        if key not in self.evaluated:
            found = evaluate(runs, progress=self.progress, **options)
            errors = {line["run"]: line["top1_error"] for line in found["runs"]}
            self.evaluated[key] = {**errors, "averaged": found["top1_error"]}
        return self.evaluated[key]


def _check(run: str, config: Config) -> None:
    """Raises UserError if what was trained in a run is not what its arm is now."""
    kept = configure({}, f"{run}/{CONFIG}")
    for name in ("seed", "images", *(field.name for field in fields(Recipe))):
        old, new = getattr(kept, name), getattr(config, name)
        if old != new:
            raise UserError(
                f"{run} was trained with {name} {old!r}, and the claim has {new!r} now: "
                "remove it, or name another folder"
            )


def _at_goal(runs: frozenset[str], report: dict[str, Any]) -> bool:
    run = report.get("run")
    return run in runs and read_history(str(run), goal=True).reached is not None
