"""A tower computes what its configuration says, and what it reports is kept; without Ray."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from datasets import DataError
from datasets.plan import Itinerary
from pipeline import checkpoint
from pipeline.optimizer import SGD
from pipeline.tower import Tower
from pipeline.training import Images, Totals, Trainer
from workers import rank
from workers.config import UserError, configure
from workers.devices import gpu
from workers.placement import decide
from workers.position import position
from workers.progress import Progress
from workers.rank import Rank
from workers.record import Record
from workers.run import CONFIG, EVENTS, RunFolder, read_lines
from workers.towers import Job

SIDE, CLASSES = 32, 10
MEAN = np.full((SIDE, SIDE, 3), 120, np.float32)


def job(folder: str, itinerary: Itinerary, **options: Any) -> Job:
    given = {"network": "cifar", "towers": 1, "batch": 4, "log_every": 1, "run": folder}
    config = configure({**given, **options})
    return Job(config, decide([{"CPU": 2}], config), itinerary, CLASSES, MEAN, folder)


def images(itinerary: Itinerary, item: int) -> Images:
    """Noise in place of an item's images, the same at each evaluation."""
    at, n = itinerary.item(item), len(itinerary.rows(item))
    draw = torch.Generator().manual_seed(at.step if at.training else 100 + at.batch)
    return Images(
        torch.randint(0, 256, (n, SIDE, SIDE, 3), dtype=torch.uint8, generator=draw),
        torch.randint(0, CLASSES, (n,), generator=draw),
        torch.randn(n, 3, generator=draw),
    )


class Noise:
    """Stands for a rank's stream."""

    waited, skipped, faults, node = 0.0, 0, (), ""

    def __init__(self, feed: Itinerary, replica: int, start: int, stop: int, **_: Any) -> None:
        self.itinerary, self.item = feed, start

    def next(self) -> Images:
        self.item += 1
        return images(self.itinerary, self.item - 1)


Trained = tuple[Rank, list[dict[str, Any]]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """Goes through an itinerary on noise; the tower and its reports."""
    monkeypatch.setattr(rank, "Stream", Noise)
    monkeypatch.setattr(rank.host, "prepare", lambda *_: None)  # this process is not its own
    (tmp_path / CONFIG).touch()

    def trained(itinerary: Itinerary, **options: Any) -> Trained:
        actor = Rank(job(str(tmp_path), itinerary, **options), 0)
        actor.join(("", 0), None)
        return actor, list(actor.train(itinerary, 0))

    return trained


def test_a_tower_trains_as_its_configuration_says(train: Callable[..., Trained]) -> None:
    itinerary = Itinerary([8], None, batch=4, seed=0, epochs=2)
    actor, _ = train(
        itinerary,
        epochs=2,
        seed=3,
        rate=0.02,
        momentum=0.5,
        decay=0.1,
        bias_rate=3.0,
        decay_bias=False,
        scale=1 / 32,
        precision="bfloat16",
        microbatches=2,
        freeze="conv1",
        drops=(),
        warmup=0,
    )
    network = configure({"network": "cifar"}).build(CLASSES)
    tower = Tower(network, seed=3, compute=torch.bfloat16, frozen=range(1))
    more = {"momentum": 0.5, "decay": 0.1, "bias_rate": 3.0, "decay_bias": False}
    optimizer = SGD(tower.weights(), rate=0.02, **more)
    mean = torch.from_numpy(MEAN)
    trainer = Trainer(tower, optimizer, mean, seed=3, scale=1 / 32, microbatches=2)
    for item in range(4):
        trainer.step(images(itinerary, item), item + 1)
    found = actor.tower.weights()
    assert [name for name, p in tower.weights().items() if not torch.equal(found[name], p)] == []


def test_a_run_goes_on_from_a_checkpoint_as_it_was_told_and_as_it_is_read(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    itinerary = Itinerary([8], ("val", [4]), batch=4, seed=0, epochs=2)
    tower, reports = train(itinerary, epochs=2, checkpoint_every=1)
    told = {r["step"]: r["evaluated"] for r in reports if r["kind"] == "checkpoint"}
    assert told == {1: False, 2: True, 3: False, 4: True}
    folder = RunFolder(tower.job.config, resume=None)
    for step in reversed(told):
        found = position(folder, tower.job, {})
        assert position(folder, tower.job, told) == found
        assert found[0] == folder.checkpoint(step)
        shutil.rmtree(folder.checkpoint(step))


def test_a_run_that_stopped_before_an_evaluation_goes_on_with_it(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    itinerary = Itinerary([8], ("val", [4]), batch=4, seed=0, epochs=2)
    own = Noise.next
    monkeypatch.setattr(Noise, "next", lambda self: None if self.item == 2 else own(self))
    tower, reports = train(itinerary, epochs=2, checkpoint_every=9)
    told = {r["step"]: r["evaluated"] for r in reports if r["kind"] == "checkpoint"}
    assert told == {2: False}
    folder = RunFolder(tower.job.config, resume=None)
    for known in told, {}:
        assert position(folder, tower.job, known) == (folder.checkpoint(2), 2)


def test_a_checkpoint_is_written_to_its_end_though_the_data_are_not(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Noise.next

    def bad(self: Noise) -> Images:
        if self.item == 3:
            raise DataError("row 7 does not decode")
        return own(self)

    monkeypatch.setattr(Noise, "next", bad)
    monkeypatch.setattr(checkpoint.Writer, "busy", True)  # until somebody waits for it
    told: list[str] = []
    monkeypatch.setattr(Rank, "_written", noted(Rank._written, told))
    with pytest.raises(DataError, match="row 7"):
        train(Itinerary([16], None, batch=4, seed=0, epochs=1), checkpoint_every=2)
    assert told == ["checkpoint"]
    assert RunFolder(configure({"run": str(tmp_path)}), resume=None).checkpoints() == [2]


def noted(written: Callable[..., Any], told: list[str]) -> Callable[..., Any]:
    def tell(self: Rank, *args: Any, **more: Any) -> Any:
        for report in written(self, *args, **more):
            told.append(report["kind"])
            yield report

    return tell


def test_steps_without_an_image_are_not_reported(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Noise.next

    def skipped(self: Noise) -> Images:
        given = own(self)
        n = 0 if self.item == 2 else given.count
        return Images(given.crops[:n], given.labels[:n], given.shifts[:n])

    monkeypatch.setattr(Noise, "next", skipped)
    _, reports = train(Itinerary([16], None, batch=4, seed=0, epochs=1))
    lines = [report for report in reports if report["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert not any(math.isnan(line["loss"]) for line in lines)


def test_a_run_that_stops_tells_of_all_its_steps(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    itinerary = Itinerary([16], None, batch=4, seed=0, epochs=2)
    own = Noise.next
    monkeypatch.setattr(Noise, "next", lambda self: None if self.item == 3 else own(self))
    _, reports = train(itinerary, epochs=2, drops=(), log_every=2)
    told = [(report["step"], report["epoch"]) for report in reports if report["kind"] == "train"]
    assert told == [(2, 0), (3, 0)]


def test_a_failed_gpu_ends_its_tower(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor looks for towers that have died, and goes on without them."""

    def fail(self: Trainer, images: Images, step: int) -> Totals:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(Trainer, "step", fail)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        train(Itinerary([16], None, batch=4, seed=0, epochs=1), epochs=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_a_gpu_that_torch_cannot_use_is_a_line() -> None:
    with pytest.raises(UserError, match=r"torch .* cannot use the GPU of .*: .*; --device cpu"):
        gpu()


STILL = {"rate": 1e-9}  # at which no error changes


def test_an_evaluation_is_of_all_its_batches(train: Callable[..., Trained]) -> None:
    itinerary = Itinerary([8], ("val", [6]), batch=4, seed=0, epochs=2)
    actor, reports = train(itinerary, epochs=2, **STILL)
    found = [report for report in reports if report["kind"] == "evaluation"]
    assert [(report["step"], report["epoch"]) for report in found] == [(2, 0), (4, 1)]
    for report, items in zip(found, [(2, 3), (6, 7)], strict=True):
        parts = (actor.trainer.evaluate(images(itinerary, item)) for item in items)
        totals = sum(parts, Totals())
        assert report["images"] == totals.images == 6
        assert report["top1_error"] == totals.means()["top1_error"]
        assert report["loss"] == pytest.approx(totals.means()["loss"], rel=1e-5)


def rates(reports: list[dict[str, Any]]) -> list[float]:
    return [report["rate"] for report in reports if report["kind"] == "train"]


def test_the_rate_falls_after_evaluations_that_are_no_better(
    train: Callable[..., Trained],
) -> None:
    itinerary = Itinerary([8], ("val", [6]), batch=4, seed=0, epochs=3)
    more = {"schedule": "plateau", "drops": (), "patience": 1, "warmup": 2}
    _, reports = train(itinerary, epochs=3, **more, **STILL)
    # The first evaluation is the best so far, the second no better.
    want = [1 / 3, 2 / 3, 1, 1, 0.1, 0.1]
    assert [rate / STILL["rate"] for rate in rates(reports)] == pytest.approx(want)


def test_the_rate_falls_at_the_batch_of_the_epoch_that_is_said(
    train: Callable[..., Trained],
) -> None:
    itinerary = Itinerary([16], None, batch=4, seed=0, epochs=2)
    _, reports = train(itinerary, epochs=2, rate=0.01, drops=(0.5, 1.0), warmup=0)
    want = [0.01] * 2 + [0.001] * 2 + [0.0001] * 4
    assert rates(reports) == pytest.approx(want)


def test_of_the_checkpoints_the_newest_and_the_best_are_kept() -> None:
    url, saved = "memory://record/run", list[list[int]]()
    itinerary = Itinerary([4], ("val", [4]), batch=4, seed=0, epochs=3)
    about = job(url, itinerary, epochs=3, keep=1)
    folder = RunFolder(about.config, resume=None)
    folder.create()
    try:

        def note(step: int, evaluated: bool) -> None:
            saved.append([step * evaluated, *folder.checkpoints()])

        record = Record(about, folder, Progress(), note)
        for step, wrong in ((1, 5), (2, 2), (3, 1), (4, 3)):
            line = {"step": step, "epoch": step - 1, "images": 10}
            line |= Totals(10, 20.0, wrong, 0).means()
            record.take({"kind": "evaluation", **line}, None)
            if step == 3:  # the best of all, which a store did not take
                record.take({"kind": "unsaved", "why": "no store", "then": "going on"}, None)
                continue
            for file in ("__0_0.distcp", ".metadata"):
                folder.fs.pipe_file(f"{folder.path}/checkpoints/step-{step:08d}/{file}", b"")
            path = folder.checkpoint(step)
            written = {"step": step, "path": path, "evaluated": True}
            record.take({"kind": "checkpoint", **written}, None)
        assert folder.checkpoints() == [2, 4]
        assert saved == [[1, 1], [2, 1, 2], [4, 2, 4]]
        events = read_lines(url, EVENTS)  # published with the checkpoint
        found = [(e["event"], e.get("step")) for e in events]
        assert found == [*(("checkpoint", n) for n in (1, 2)), ("unsaved", None), ("checkpoint", 4)]
    finally:
        folder.close()
        fsspec.filesystem("memory").rm("/record", recursive=True)
