"""One trial of Ray Tune from within: a run, told to Tune as it goes on."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from datasets import DataError
from datasets.statistics import STATISTICS
from datasets.storage import StoreFailed, storage, write_whole
from workers.cluster import connected
from workers.config import Config, UserError
from workers.data import known_statistics
from workers.errors import Diverged
from workers.placement import Lacking
from workers.pool import Pool
from workers.progress import Progress
from workers.run import COMPLETE, CONFIG, checkpoint_url, checkpoints, is_run, occupied
from workers.supervisor import train

POINTER = "run.json"
LEASE = 180.0  # seconds; NFS takes 90

Make = Callable[[dict[str, Any], str], Config]
"""The configuration of a trial with these settings and this id; with it the run's folder."""


def statistics_place(folder: str, config: Config) -> str:
    """Where trials find the statistics of images of their size."""
    return f"{folder}/statistics/{config.image}"


def trial(settings: dict[str, Any], make: Make, pool: Pool, folder: str) -> None:
    """One trial, in a process of its own."""
    name = tune.get_context().get_trial_id()
    try:
        config = make(settings, name)
    except UserError as error:  # settings that do not go together
        tune.report({"top1_error": 1.0, "epoch": 0, "why": str(error)})
        return
    config = _placed(config)
    if found := known_statistics(config.image, statistics_place(folder, config)):
        fs, path = storage(config.run)
        fs.makedirs(path, exist_ok=True)
        found.save(f"{config.run}/{STATISTICS}")
    reporter = Reporter(config)
    with connected():
        _free(config.run)
        try:
            result = train(
                config,
                resume=is_run(config.run),
                progress=reporter,
                progressed=reporter.checkpointed,
                pool=replace(pool, name=name),
            )
        except (StoreFailed, Lacking):  # either may be mended by another try
            raise
        except (DataError, UserError, Diverged) as error:
            reporter.failed(str(error))  # another try would end the same way
        else:
            reporter.ended(result)


def _free(run: str) -> None:
    """Waits while this trial's last try holds the run's folder: a node that is gone does so for as
    long as the file system believes in it.
    """
    deadline = time.monotonic() + LEASE
    while occupied(run) and time.monotonic() < deadline:
        time.sleep(1)


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
        return replace(config, run=pointer["run"])
    count = 1
    while is_run(f"{config.run}+{count}"):
        count += 1
    fork = replace(config, run=f"{config.run}+{count}")
    return _forked(fork, pointer["run"], pointer["step"])


def _forked(config: Config, origin: str, step: int) -> Config:
    """Makes the run begin at the checkpoint of a step of another run, or the first one after that
    which is still kept.
    """
    step = next(kept for kept in checkpoints(origin) if kept >= step)
    fs, path = storage(checkpoint_url(config.run, step))
    _, source = storage(checkpoint_url(origin, step))
    fs.makedirs(path, exist_ok=True)
    for file in fs.ls(source, detail=False):  # what makes it complete comes last
        if not file.endswith(f"/{COMPLETE}"):
            fs.cp_file(file, f"{path}/{file.rpartition('/')[2]}")
    fs.cp_file(f"{source}/{COMPLETE}", f"{path}/{COMPLETE}")
    write_whole(fs, f"{storage(config.run)[1]}/{CONFIG}", config.to_toml().encode())
    return config


class Reporter(Progress):
    """Tells Tune of each evaluation once, when its checkpoint is written."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.run, self.last, self.epochs = config.run, -1, 0
        self.training: list[tuple[float, float]] = []  # images and wrong ones, of this epoch
        self.waiting: list[dict[str, Any]] = []  # evaluations that were not told yet

    def start(self, job: Any, augmenters: tuple[int, int], step: int) -> None:
        super().start(job, augmenters, step)
        self.training.clear()

    def step(self, report: dict[str, Any]) -> None:
        super().step(report)
        images = report["images_per_second"] * report["seconds"]
        self.training.append((images, images * report["top1_error"]))

    def evaluation(self, report: dict[str, Any]) -> None:
        super().evaluation(report)
        self.epochs, step = report["epoch"] + 1, report["step"]
        line = {**report, "train_error": self._train_error()}
        if step > self.last:  # what was lost with a tower, and comes again, is told as it is then
            self.waiting = [*(old for old in self.waiting if old["step"] < step), line]

    def checkpointed(self, kept: int) -> None:
        """To be called with the step of each checkpoint, which may come after the next
        evaluation.
        """
        while self.waiting and self.waiting[0]["step"] <= kept:
            line = self.waiting.pop(0)
            self._report(line["epoch"] + 1, line)

    def ended(self, result: dict[str, Any]) -> None:
        """The run is at its end; a trial that was killed after its last report tells it here."""
        self.checkpointed(result["steps"])
        if self.last != result["steps"]:
            line = {**result, "step": result["steps"], "train_error": self._train_error()}
            self._report(round(result["epochs"]), line)

    def failed(self, why: str) -> None:
        """As bad as can be for whoever compares trials, and not to be shown as measured."""
        tune.report({"top1_error": 1.0, "epoch": self.epochs, "why": why})

    def _train_error(self) -> float | None:
        """Since it was asked for last; None if nothing was trained."""
        images, wrong = map(sum, zip((0.0, 0.0), *self.training, strict=True))
        self.training.clear()
        return wrong / images if images else None

    def _report(self, epoch: int, line: dict[str, Any]) -> None:
        self.last = line["step"]
        names = ("step", "loss", "top1_error", "top5_error", "train_error")
        report = {"epoch": epoch, "run": self.run, **{name: line[name] for name in names}}
        with tempfile.TemporaryDirectory() as place:
            Path(place, POINTER).write_text(json.dumps({"run": self.run, "step": self.last}))
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(place))
