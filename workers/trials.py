"""Runs side by side as trials of Ray Tune: each has towers of its own, one fleet serves them all.

A trial is an ordinary run in a folder of its own, which goes on from its last checkpoint whatever
is killed. Tune only decides which runs there are, and which of them end early.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from ray import tune
from ray.tune.search import Searcher

from datasets.drawn import write_drawn
from datasets.shards import open_dataset
from workers import placement
from workers.cluster import connected
from workers.config import Config, UserError
from workers.data import check_classes, known_statistics, measured
from workers.errors import ClusterLost, RunFailed
from workers.pool import Pool
from workers.progress import Progress
from workers.run import checkpoint_url, checkpoints, is_run
from workers.supervisor import train

TUNE = "tune"  # Tune's own files in the folder
POINTER = "run.json"
FAILURES = 3  # times that a trial whose process was killed is started again

Make = Callable[[dict[str, Any], str], Config]
"""The configuration of a trial with these settings and this id; with it the run's folder."""


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
    a `searcher` of Tune's if not at random, ended early by a `scheduler`; `parallel` at a time, one
    a CPU or GPU if None; all of them ended after `minutes`, and one once `stop(report)`.
    """

    space: dict[str, Any]
    samples: int = 1
    searcher: Any = None
    scheduler: Any = None
    parallel: int | None = None
    minutes: float | None = None
    stop: Callable[[dict[str, Any]], bool] | None = None


def run_trials(
    make: Make, plan: Plan, folder: str, progress: Progress, *, resume: bool = False
) -> list[Trial]:
    """Runs the trials of a plan in `folder` (a path or URL); `resume` goes on with those that are
    there. Within `connected`. Raises UserError if `resume` finds nothing, RunFailed if every trial
    failed.
    """
    _silence()
    parallel = plan.parallel or slots()
    pool = Pool.started(parallel, placement.cluster_nodes())
    function = tune.with_parameters(_trial, make=make, pool=pool, folder=folder)
    # A trial's own process only waits; the run inside it asks for its towers' room itself. Tune
    # wants it to ask for something: a byte.
    trainable = tune.with_resources(function, {"CPU": 0, "memory": 1})
    try:
        tuner = _restored(folder, trainable, progress) if resume else None
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
                    max_concurrent_trials=parallel if _limited(plan) else None,
                    trial_dirname_creator=_id,
                    time_budget_s=60 * plan.minutes if plan.minutes else None,
                ),
                run_config=tune.RunConfig(
                    name=TUNE,
                    storage_path=folder,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=FAILURES),
                    stop=_Stop(plan.stop) if plan.stop else None,
                    callbacks=[_Told(progress)],
                ),
            )
        found = [_told(result) for result in tuner.fit()]
    finally:
        pool.end()
    trials = [trial for trial in found if trial.report or trial.failed]
    if trials and all(trial.failed for trial in trials):
        raise RunFailed(f"every trial failed; trial {trials[0].name}: {trials[0].failed}")
    return trials


def _limited(plan: Plan) -> bool:
    return plan.searcher is None or isinstance(plan.searcher, Searcher)


def _id(trial: Any) -> str:
    name: str = trial.trial_id
    return name


def slots() -> int:
    """How many trials run side by side if nobody says: one a GPU, or else a CPU."""
    nodes = placement.cluster_nodes()
    homes = [node for node in nodes if placement.AUGMENT not in node] or nodes
    gpus = sum(int(node.get("GPU", 0)) for node in homes)
    return gpus or max(1, int(sum(node.get("CPU", 0) for node in homes)))


def prepare_data(configs: Sequence[Config], folder: str, progress: Progress) -> str:
    """What trials share: the shards, drawn in `folder` if none are named, whose URL is returned,
    and statistics for each size of image. Raises DataError for data that cannot be trained on,
    UserError without a split to evaluate on.
    """
    shards = configs[0].shards
    if not shards:
        shards = f"{folder}/shards"
        fs, path = fsspec.core.url_to_fs(shards)
        if not fs.exists(f"{path}/dataset.json"):
            progress.say("drawing the built-in data set")
            write_drawn(shards)
    dataset = open_dataset(shards)
    check_classes(dataset)
    if not dataset.held_out:
        raise UserError(f"{shards}: no val or test split to compare trials on")
    for config in {config.image: config for config in configs}.values():
        place = _statistics(folder, config)
        if not known_statistics(config.image, shards, place):
            fs, path = fsspec.core.url_to_fs(place)
            fs.makedirs(path, exist_ok=True)
            used = dataset.first("train", config.images) if config.images else dataset
            measured(used, config, place, {"CPU": 1}, progress)
    return shards


def _statistics(folder: str, config: Config) -> str:
    return f"{folder}/statistics/{config.image}"


def _trial(settings: dict[str, Any], make: Make, pool: Pool, folder: str) -> None:
    """One trial, in a process of its own."""
    try:
        config = make(settings, tune.get_context().get_trial_id())
    except UserError as error:  # settings that do not go together
        tune.report({"top1_error": 1.0, "epoch": 0, "why": str(error)})
        return
    config = _placed(config)
    if found := known_statistics(config.image, _statistics(folder, config)):
        fs, path = fsspec.core.url_to_fs(config.run)
        fs.makedirs(path, exist_ok=True)
        found.save(f"{config.run}/statistics.npz")
    reporter = _Reporter(config)
    with connected():
        try:
            result = train(
                config,
                resume=is_run(config.run),
                progress=reporter,
                progressed=reporter.checkpointed,
                pool=pool,
            )
        except ClusterLost:
            raise
        except RunFailed as error:  # such as a loss that is not a number: another try is the same
            reporter.failed(str(error))
        else:
            reporter.ended(result)


def _placed(config: Config) -> Config:
    """The configuration with the folder where this trial goes on: its own, or, if it is to go on
    from where another trial is (population-based training), a new one that begins there.
    """
    came = tune.get_checkpoint()
    if came is None:
        return config
    with came.as_directory() as place:
        pointer = json.loads(Path(place, POINTER).read_text())
    if pointer["run"] == config.run or pointer["run"].startswith(f"{config.run}+"):
        return _at(config, pointer["run"])
    count = 1
    while is_run(f"{config.run}+{count}"):
        count += 1
    return _forked(_at(config, f"{config.run}+{count}"), pointer["run"], pointer["step"])


def _at(config: Config, run: str) -> Config:
    return Config(**{**vars(config), "run": run})


def _forked(config: Config, origin: str, step: int) -> Config:
    """Makes the run begin at the checkpoint of a step of another run, or the first one after that
    which is still kept.
    """
    step = next(kept for kept in checkpoints(origin) if kept >= step)
    fs, path = fsspec.core.url_to_fs(checkpoint_url(config.run, step))
    _, source = fsspec.core.url_to_fs(checkpoint_url(origin, step))
    fs.makedirs(path, exist_ok=True)
    for file in fs.ls(source, detail=False):  # what makes it complete comes last
        if not file.endswith("/.metadata"):
            fs.cp_file(file, f"{path}/{file.rpartition('/')[2]}")
    fs.cp_file(f"{source}/.metadata", f"{path}/.metadata")
    fs.pipe_file(f"{path.partition('/checkpoints/')[0]}/config.toml", config.to_toml().encode())
    return config


class _Reporter(Progress):
    """Tells Tune of each evaluation once its checkpoint is written, so that none is told twice."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.run, self.last = config.run, -1
        self.training: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}

    def step(self, report: dict[str, Any]) -> None:
        super().step(report)
        self.training = report

    def evaluation(self, report: dict[str, Any]) -> None:
        super().evaluation(report)
        self.evaluated = report

    def checkpointed(self) -> None:
        """To be called at each checkpoint."""
        if self.evaluated and self.evaluated["step"] != self.last:
            self._report(self.evaluated["epoch"] + 1, self.evaluated)

    def ended(self, result: dict[str, Any]) -> None:
        """The run is at its end; a trial that was killed after its last report tells it here."""
        if self.last != result["steps"]:
            self._report(round(result["epochs"]), {**result, "step": result["steps"]})

    def failed(self, why: str) -> None:
        """As bad as can be for whoever compares trials, and not to be shown as measured."""
        tune.report({"top1_error": 1.0, "epoch": self.evaluated.get("epoch", -1) + 1, "why": why})

    def _report(self, epoch: int, line: dict[str, Any]) -> None:
        self.last = line["step"]
        names = ("step", "loss", "top1_error", "top5_error")
        report = {"epoch": epoch, "run": self.run, **{name: line[name] for name in names}}
        report["train_error"] = self.training.get("top1_error")
        with tempfile.TemporaryDirectory() as place:
            Path(place, POINTER).write_text(json.dumps({"run": self.run, "step": self.last}))
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(place))


class _Told(tune.Callback):
    """A line for each report of a trial."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if why := result.get("why"):
            self.progress.say(f"trial {trial.trial_id} failed: {why}")
            return
        done = sum(other.is_finished() for other in trials)
        self.progress.say(
            f"trial {trial.trial_id}  epoch {result['epoch']}  "
            f"top-1 error {result['top1_error']:.1%}  ({done} of {len(trials)} trials done)"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.progress.say(f"trial {trial.trial_id} lost its process for good")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.progress.say(f"trial {trial.trial_id} lost its process: it goes on")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps its callbacks in files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.progress = Progress()


class _Stop(tune.Stopper):
    """Ends a trial once `stop(report)`."""

    def __init__(self, stop: Callable[[dict[str, Any]], bool]) -> None:
        self.stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.stop(result)

    def stop_all(self) -> bool:
        return False


def _restored(folder: str, trainable: Any, progress: Progress) -> Any:
    """Tune as it was when it last wrote down where it is; None if it had not got so far."""
    place = f"{folder}/{TUNE}"
    fs, path = fsspec.core.url_to_fs(place)
    if not (tune.Tuner.can_restore(place) and fs.glob(f"{path}/experiment_state-*.json")):
        progress.say("no trial had begun: from the start")
        return None
    tuner = tune.Tuner.restore(place, trainable, resume_errored=True)
    found = [_told(result) for result in tuner.get_results()]
    known = sum(bool(trial.report or trial.failed) for trial in found)
    progress.say(f"{len(found)} trials restored, {known} of them with results")
    return tuner


def _told(result: Any) -> Trial:
    report = dict(result.metrics or {})
    lines = str(result.error or "").strip().splitlines()
    failed = report.pop("why", "") or (lines[-1] if lines else "")
    name = report.get("trial_id") or Path(result.path).name
    report = {} if "run" not in report else report
    return Trial(str(name), dict(result.config or {}), report, failed)


def _silence() -> None:
    """Of Tune's own output, which comes beside ours."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    for name in ("ray.tune", "ray.train", "ray.air", "optuna"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"ray\.tune")
