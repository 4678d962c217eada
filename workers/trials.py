"""Runs side by side as trials of Ray Tune: each has towers of its own, one fleet serves them all.

A trial is an ordinary run in a folder of its own, which goes on from its last checkpoint whatever
is killed. Tune only decides which runs there are, and which of them end early.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from datasets.shards import open_dataset
from datasets.statistics import STATISTICS
from datasets.storage import matching, storage
from workers import placement, room
from workers.config import Config, UserError
from workers.data import check_classes, drawn, known_statistics, measured
from workers.errors import RunFailed
from workers.pool import Pool
from workers.progress import Progress
from workers.trial import Make, statistics_place, trial

TUNE = "tune"
FAILURES = 3  # times that a trial which was killed, or could not go on, is started again


@dataclass(frozen=True)
class Trial:
    """What became of a trial: its last report, {} if it made none, and why it failed, if it did."""

    name: str
    settings: dict[str, Any]
    report: dict[str, Any]
    failed: str


@dataclass(frozen=True)
class Plan:
    """Which trials there are to be: `samples` draws from `space` (grids in it are gone through), by
    a `searcher` of Tune's if not at random, ended early by a `scheduler`; `parallel` at a time; all
    of them ended after `minutes`, and one once `stop(report)`.
    """

    space: dict[str, Any]
    parallel: int
    samples: int = 1
    searcher: Any = None
    scheduler: Any = None
    minutes: float | None = None
    stop: Callable[[dict[str, Any]], bool] | None = None

    @property
    def count(self) -> int:
        """How many trials there are to be."""
        grids = [d["grid_search"] for d in self.space.values() if isinstance(d, dict)]
        return self.samples * math.prod(map(len, grids))


def run_trials(
    make: Make,
    plan: Plan,
    folder: str,
    progress: Progress,
    *,
    name: str = TUNE,
    resume: bool = False,
) -> list[Trial]:
    """Runs the trials of a plan, within `connected`; what they share lies in `folder` (a path or
    URL), and there by `name` Tune's own files. `resume` goes on with the trials that are there.

    Raises RunFailed if Tune itself fails.
    """
    _silence()
    _Told.progress, _Told.total = progress, plan.count
    pool = Pool.started(plan.parallel, room.cluster_nodes())
    function = tune.with_parameters(trial, make=make, pool=pool, folder=folder)
    # A trial's own process only waits; the run inside it asks for its towers' room itself. Tune
    # wants it to ask for something: a byte.
    trainable = tune.with_resources(function, {"CPU": 0, "memory": 1})
    try:
        tuner = _restored(f"{folder}/{name}", trainable, progress) if resume else None
        if tuner is None:
            tuner = tune.Tuner(
                trainable,
                param_space=plan.space,
                tune_config=tune.TuneConfig(
                    num_samples=plan.samples,
                    metric="top1_error",
                    mode="min",
                    search_alg=plan.searcher,
                    scheduler=plan.scheduler,
                    # A generator of Tune's own has the limit in it.
                    max_concurrent_trials=plan.parallel if _limited(plan) else None,
                    trial_dirname_creator=_id,
                    time_budget_s=60 * plan.minutes if plan.minutes else None,
                ),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=folder,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=FAILURES),
                    stop=_Stop(plan.stop) if plan.stop else None,
                    callbacks=[_Told()],
                ),
            )
        found = [_trial_of(result) for result in tuner.fit()]
        for one in found:  # Tune says nothing of those that the time ends
            room.free(one.name)
    except tune.TuneError as error:
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"Ray Tune ended: {last}; what the trials did is kept") from error
    finally:
        pool.end()
    return [trial for trial in found if trial.report or trial.failed]


def run_all(
    configs: Mapping[str, Config],
    folder: str,
    progress: Progress,
    *,
    name: str,
    parallel: int | None = None,
    stop: Callable[[dict[str, Any]], bool] | None = None,
) -> dict[str, str]:
    """Runs these configurations, by the folders of their runs, as `run_trials` does; what went
    wrong by run. Raises UserError if the cluster is too small for as many at a time.
    """
    parallel = parallel or placement.side_by_side(room.cluster_nodes(), configs.values())
    parallel = min(parallel, len(configs))
    for config in configs.values():
        room.place(config, progress.say, parallel)
    plan = Plan({"run": tune.grid_search(list(configs))}, parallel, stop=stop)
    # Tune's own notes of each attempt apart; the runs themselves know what is done.
    name = f"{name}/{time.strftime('%Y%m%d-%H%M%S')}"
    trials = run_trials(partial(_of, configs), plan, folder, progress, name=name)
    return {trial.settings["run"]: trial.failed for trial in trials if trial.failed}


def _of(configs: Mapping[str, Config], settings: dict[str, Any], _: str) -> Config:
    return configs[settings["run"]]


def _limited(plan: Plan) -> bool:
    return plan.searcher is None or isinstance(plan.searcher, Searcher)


def _id(trial: Any) -> str:
    return trial.trial_id


def prepare_data(configs: Sequence[Config], folder: str, progress: Progress) -> str:
    """What trials share: the shards, drawn in `folder` if none are named, whose URL is returned,
    and statistics for each size of image. Raises DataError for data that cannot be trained on,
    UserError without a split to evaluate on.
    """
    shards = configs[0].shards
    dataset = open_dataset(shards) if shards else drawn(folder, progress)
    shards = shards or dataset.root
    check_classes(dataset)
    if not dataset.held_out:
        raise UserError(f"{shards}: no val or test split to compare trials on")
    for config in {config.image: config for config in configs}.values():
        place = statistics_place(folder, config)
        if not known_statistics(config.image, shards, place):
            fs, path = storage(place)
            fs.makedirs(path, exist_ok=True)
            used = dataset.first("train", config.images) if config.images else dataset
            measured(used, config, {"CPU": 1}, progress).save(f"{place}/{STATISTICS}")
    return shards


class _Told(tune.Callback):
    """A line for each report of a trial. Tune keeps its callbacks in a file and makes them anew
    from that, so that whom to tell is known by the class.
    """

    progress, total = Progress(), 0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if why := result.get("why"):
            self.progress.say(f"trial {trial.trial_id} failed: {why}")
            return
        done = sum(other.is_finished() for other in trials)
        self.progress.say(
            f"trial {trial.trial_id}  epoch {result['epoch']}  "
            f"top-1 error {result['top1_error']:.1%}  ({done} of {self.total} trials done)"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        room.free(trial.trial_id)  # one that Tune ends may not come to it

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        room.free(trial.trial_id)
        self.progress.say(f"trial {trial.trial_id} broke off for good")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.progress.say(f"trial {trial.trial_id} broke off: it goes on")


class _Stop(tune.Stopper):
    """Ends a trial once `stop(report)`."""

    def __init__(self, stop: Callable[[dict[str, Any]], bool]) -> None:
        self.stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.stop(result)

    def stop_all(self) -> bool:
        return False


def _restored(place: str, trainable: Any, progress: Progress) -> Any:
    """Tune as it was when it last wrote down where it is; None if it had not got so far."""
    fs, path = storage(place)
    if not (tune.Tuner.can_restore(place) and matching(fs, path, "experiment_state-*.json")):
        progress.say("no trial had begun: from the start")
        return None
    tuner = tune.Tuner.restore(place, trainable, resume_errored=True)
    found = [_trial_of(result) for result in tuner.get_results()]
    known = sum(bool(trial.report or trial.failed) for trial in found)
    progress.say(f"{len(found)} trials restored, {known} of them with results")
    return tuner


def _trial_of(result: Any) -> Trial:
    report = dict(result.metrics or {})
    lines = str(result.error or "").strip().splitlines()
    failed = report.pop("why", "") or (lines[-1] if lines else "")
    name = report.get("trial_id") or Path(result.path).name
    report = {} if "run" not in report else report
    return Trial(str(name), dict(result.config or {}), report, failed)


def _silence() -> None:
    """Of Tune's own output, which comes beside ours, and its own answer to an interrupt: it would
    end as if all trials were done.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    for name in ("ray.tune", "ray.train", "ray.air", "optuna"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"ray\.tune")
