"""The main job on real actors: two towers equal one, killed ones come back, nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from PIL import Image

from datasets import DataError
from datasets.drawn import draw, write_drawn
from datasets.images import encode
from datasets.shards import open_dataset, write_manifest, write_split
from datasets.statistics import STATISTICS, sums_of_groups
from pipeline.checkpoint import load_weights
from workers.attempts import Attempts
from workers.cli import main
from workers.config import UserError, configure
from workers.errors import RunFailed
from workers.gauges import GAUGES
from workers.placement import decide
from workers.progress import Progress, result_table
from workers.run import RunFolder, checkpoint_url, checkpoints, write_scale
from workers.supervisor import train
from workers.weights import export, import_

pytestmark = pytest.mark.usefixtures("cluster")
SMALL = {"network": "alexnet-mini", "batch": 64, "epochs": 2, "augmenters": "1:1"}


def run(folder: Path, shards: str, progress: Progress | None = None, **given: Any) -> dict:
    how = {name: given.pop(name, False) for name in ("resume", "sized")}
    config = configure({**SMALL, "shards": shards, "run": str(folder), **given})
    return train(config, progress=progress, **how)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def finished(trained: Path) -> tuple[Path, dict]:
    """A run of two towers, which is only looked at, and its result."""
    return trained / "run", json.loads((trained / "result.json").read_text())


def test_a_run_and_its_folder(finished: tuple[Path, dict]) -> None:
    folder, result = finished
    assert set(result) == {
        *("run", "steps", "epochs", "loss", "top1_error", "top5_error", "images_per_second"),
        *("stall_fraction", "weights_sha256", "restarts", "mesh", "split"),
    }
    assert (result["steps"], result["epochs"], result["mesh"]) == (6, 2, "1x1x2")
    assert 0 <= result["top5_error"] <= result["top1_error"] <= 1
    metrics = lines(folder, "metrics.jsonl")
    assert {m["step"]: m["images"] for m in metrics if m["split"] == "val"} == {3: 50, 6: 50}
    # What a page of Prometheus shows of it.
    assert set(GAUGES) <= metrics[0].keys()
    assert max(m["step"] for m in metrics if m["split"] == "train") == 6
    assert lines(folder, "events.jsonl")[-1]["weights_sha256"] == result["weights_sha256"]
    assert checkpoints(str(folder)) == [3, 6]
    assert list((folder / "tensorboard").glob("events.*"))
    assert load_weights(f"{folder}/checkpoints/step-00000006")["fc8.weight"].shape == (10, 1024)


@pytest.fixture(scope="module")
def staged(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged") / "run"
    result = run(
        folder,
        shards,
        replicas=2,
        stages=2,
        towers=1,
        microbatches=4,
        profile=True,
        pipeline="gpipe",
    )
    assert result["mesh"] == "2x2x1"
    return folder


def test_stages_and_replicas_learn_what_one_stage_learns(
    staged: Path, finished: tuple[Path, dict]
) -> None:
    one = load_weights(f"{finished[0]}/checkpoints/step-00000006")
    found = load_weights(f"{staged}/checkpoints/step-00000006")
    assert found.keys() == one.keys()
    for name, weight in found.items():
        assert (weight - one[name]).abs().max() < 1e-5, name


def test_one_process_and_then_two_stages_learn_what_two_towers_learn(
    finished: tuple[Path, dict],
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run goes on with another mesh, and a checkpoint made before an evaluation stays whole while
    that is made, and after.
    """

    def compare(step: int) -> None:
        places = (f"{place}/checkpoints/step-{step:08d}" for place in (finished[0], folder))
        two, one = map(load_weights, places)
        assert two.keys() == one.keys()
        for name, weight in two.items():
            assert (weight - one[name]).abs().max() < 1e-5, name

    data, folder = open_dataset(shards), tmp_path / "run"
    shutil.copytree(shards, tmp_path / "train")
    write_manifest(f"{tmp_path}/train", {"train": data.shards("train")}, data.classes)
    assert run(folder, f"{tmp_path}/train", towers=1, steps=3)["mesh"] == "1x1x1"
    compare(3)
    kept = folder / "checkpoints/step-00000003"
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    events = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(re.sub(r'"threads": \d+', '"threads": 7', events))
    result = run(folder, shards, resume=True, stages=2, towers=1)
    assert (result["mesh"], result["steps"]) == ("1x2x1", 6)
    assert re.search(r"towers have \d+ thread\(s\) each, and had 7 be", capsys.readouterr().err)
    assert [m["step"] for m in lines(folder, "metrics.jsonl") if m["split"] == "val"] == [3, 6]
    compare(6)
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before


def test_a_profile_shows_every_rank(staged: Path) -> None:
    trace = json.loads((staged / "profile" / "trace.json").read_text())["traceEvents"]
    spans = [e for e in trace if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == {0, 1, 2, 3}
    assert {e["cat"] for e in spans} >= {"forward", "backward", "optimizer", "wait"}
    assert {e["args"]["step"] for e in spans} == {4, 5, 6}
    for step in (4, 6):  # no evaluation, which follows upon the latter
        forward = [e for e in spans if e["cat"] == "forward" and e["args"]["step"] == step]
        assert len(forward) == 4 * 4
    with Image.open(staged / "profile" / "schedule.png") as picture:
        assert picture.width == 1600


def test_a_checkpoint_of_another_network_is_refused(
    finished: tuple[Path, dict], shards: str, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(
        UserError, match=r"is of another network: conv1.weight is \(32, 3, 11, 11\)"
    ):
        run(tmp_path / "run", shards, network="cifar", image=72, resume=True)
    with pytest.raises(UserError, match=r"has done \d+ steps, and the run is to have 1: more"):
        run(tmp_path / "run", shards, steps=1, resume=True)
    for given, message in (
        ({"batch": 32}, "batch 64, not 32"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"images": 10}, r"training images \d+, not \d+"),
    ):
        with pytest.raises(UserError, match=rf"step-00000006 is of a run with {message}: the im"):
            run(tmp_path / "run", shards, resume=True, **given)
    assert {path: path.read_bytes() for path in before} == before


class Killer(Progress):
    """Kills a process of each kind once a report of its step has come."""

    signal = signal.SIGKILL

    def __init__(self, when: dict[int, str], find: Callable[[str], list[int]]) -> None:
        super().__init__()
        self.when, self.find = dict(when), find

    def step(self, report: dict[str, Any]) -> None:
        super().step(report)
        for step in [s for s in self.when if s <= report["step"]]:
            os.kill(self.find(self.when.pop(step))[0], self.signal)


def test_killed_towers_and_feed_come_back_to_the_same_weights(
    longer: str,
    shards: str,
    tmp_path: Path,
    kill_own: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed amid an epoch and at its end, when the store does not answer for a moment. As the
    undisturbed run, with another fleet, whose size stays; one restart between two checkpoints.
    """
    due, away = {4: "ray::TowerActor", 9: "ray::Feed"}, [0]

    def listed(run: str) -> list[int]:
        if away[0]:
            away[0] -= 1
            raise OSError(errno.EBUSY, "the store is away")
        return checkpoints(run)

    def saved(step: int) -> None:
        if step == 2:
            write_scale(f"{tmp_path}/run", "2:2")
        # A kill is felt some steps later: the second one is not to come before.
        starts = [e for e in lines(tmp_path / "run", "events.jsonl") if e["event"] == "start"]
        if due and step >= min(due) and len(starts) + len(due) == 3:
            kill_own(due.pop(min(due)))
            away[0] = 4  # it cannot be pruned now, nor is known what it is to go on from

    monkeypatch.setattr("workers.run.checkpoints", listed)
    monkeypatch.setattr("workers.patience.PAUSES", (0, 0, 0, 0, 1))
    monkeypatch.setattr("workers.attempts.LOOK_SECONDS", 0.0)

    given = {**SMALL, "shards": shards, "epochs": 20, "steps": 30, "run": f"{tmp_path}/run"}
    given |= {"augmenters": "1:1", "checkpoint_every": 2, "log_every": 1, "restarts": 1}
    result = train(configure(given), progressed=saved)
    assert not due
    assert result["restarts"] == 2
    assert result["weights_sha256"] == longer
    events = lines(tmp_path / "run", "events.jsonl")
    lost = [event["processes"] for event in events if event["event"] == "lost"]
    assert len(lost) == 2
    assert lost[0][0].startswith("tower rank")
    starts = [event["step"] for event in events if event["event"] == "start"]
    assert starts[0] == 0
    assert 4 <= starts[1] < starts[2]
    assert starts[2] >= 9
    assert [e["augmenters"] for e in events if e["event"] == "scale"] == ["2:2"]


class Scaler(Progress):
    """Asks for other fleets as steps go by."""

    def __init__(self, folder: Path, when: dict[int, str]) -> None:
        super().__init__()
        self.folder, self.when = folder, dict(when)

    def step(self, report: dict[str, Any]) -> None:
        super().step(report)
        if due := [step for step in self.when if step <= report["step"]]:
            assert main(["scale", str(self.folder), "--augmenters", self.when.pop(due[0])]) == 0


def test_a_place_that_does_not_come_back_leaves_a_run_to_be_resumed(
    finished: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has trained, so that it is no mistake of the user's that there is no room."""
    monkeypatch.setattr("workers.room.PATIENCE", 1.0)
    config = configure({}, f"{finished[0]}/config.toml")
    where = replace(decide([{"CPU": 4}], config), tower={"CPU": 4})  # two such are more than all
    job: Any = SimpleNamespace(placement=where, config=config)
    fleet: Any = SimpleNamespace(name="")
    attempts = Attempts(job, fleet, RunFolder(config, resume=True), Progress(), list, 0, 0.0, None)
    with pytest.raises(UserError, match=r"has no room for 2 towers .* or add nodes$"):
        attempts._reserved()
    attempts.made = True
    with pytest.raises(RunFailed, match=r"no room .*; the last checkpoint is of step 6: --resume"):
        attempts._reserved()


def test_what_another_tower_would_fail_at_too_is_told(
    finished: tuple[Path, dict],
) -> None:
    @ray.remote(num_cpus=0)
    class Broken:
        def __init__(self) -> None:
            raise ImportError("libcudart.so.13: cannot open shared object file")

    config = configure({}, f"{finished[0]}/config.toml")
    job: Any = SimpleNamespace(config=config)
    run = Attempts(job, Any, RunFolder(config, resume=True), Progress(), list, 0, 0.0, None)
    with pytest.raises(ray.exceptions.RayActorError) as failed:
        ray.get(Broken.remote().__ray_ready__.remote())
    with pytest.raises(RunFailed, match=r"^ImportError: libcudart.*; the last checkpoint is of s"):
        run._judge(failed.value, Any)


def test_a_folder_that_holds_a_run_is_not_overwritten(
    finished: tuple[Path, dict], shards: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"already holds a run: --resume it, or name another"):
        run(finished[0], shards)
    with pytest.raises(UserError, match=r"holds no run to resume"):
        run(tmp_path / "nothing", shards, resume=True)


def test_weights_go_out_and_make_a_run(
    finished: tuple[Path, dict], shards: str, tmp_path: Path
) -> None:
    folder, result = finished
    file = f"{tmp_path}/w.safetensors"
    assert export(str(folder), file)["step"] == 6
    assert "step 6 of" in Path(f"{file}.md").read_text()
    made = import_(file, f"{tmp_path}/made", {"network": "alexnet-mini", "shards": shards})
    assert made["weights_sha256"] == result["weights_sha256"]
    with pytest.raises(UserError, match="made: none of its checkpoints was evaluated; --step N"):
        export(f"{tmp_path}/made", file, "best")
    again = run(tmp_path / "made", shards, resume=True, steps=1, towers=1)
    assert again["steps"] == 1
    with pytest.raises(UserError, match=r"fc4.bias is missing"):
        import_(file, f"{tmp_path}/other", {"network": "cifar"})
    with pytest.raises(UserError, match="no checkpoint of step 4; there are 3, 6"):
        export(str(folder), file, 4)
    evaluations = [line for line in lines(folder, "metrics.jsonl") if line["split"] == "val"]
    best = min(evaluations, key=lambda line: line["top1_error"])["step"]
    assert export(str(folder), file, "best")["step"] == best


class Stopper(Killer):
    """Stops a process instead of killing it: it lives and answers nothing."""

    signal = signal.SIGSTOP


class Terminator(Killer):
    """Sends this process, the run's, a signal once a step is done."""

    def step(self, report: dict[str, Any]) -> None:
        Progress.step(self, report)
        for step in [s for s in self.when if s <= report["step"]]:
            os.kill(os.getpid(), signal.Signals[self.when.pop(step)])


def test_a_run_that_hung_was_stopped_or_is_out_of_restarts_goes_on_and_its_fleet_is_scaled(
    longer: str,
    shards: str,
    tmp_path: Path,
    processes: Callable[[str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each time from where it was, to the weights of a run in peace."""
    given = {"epochs": 20, "log_every": 1, "restarts": 0}
    stopper = Stopper({2: "ray::TowerActor"}, processes)
    stuck = r"Stuck: rank \d waited 3 s for rank \d at (conv|fc|the)"
    with monkeypatch.context() as soon:
        soon.setattr("workers.actors.SECONDS", 1.0)
        with pytest.raises(RunFailed, match=stuck):
            run(tmp_path / "run", shards, stopper, timeout=3.0, **given)
    assert main(["scale", f"{tmp_path}/run", "--augmenters", "7:9"]) == 0  # which is taken back
    terminator = Terminator({10: "SIGTERM"}, processes)  # amid an epoch
    with pytest.raises(RunFailed, match=r"stopped by SIGTERM at step \d+, of which a check"):
        run(tmp_path / "run", shards, terminator, resume=True, sized=True, **given)
    assert checkpoints(f"{tmp_path}/run")[-1] >= 10
    killer = Killer({13: "ray::TowerActor"}, processes)
    with pytest.raises(RunFailed, match=r"died, once too often; the last checkpoint is of step \d"):
        run(tmp_path / "run", shards, killer, resume=True, **given)
    assert main(["scale", f"{tmp_path}/run", "--augmenters", "1:3"]) == 0
    monkeypatch.setattr("workers.attempts.LOOK_SECONDS", 0.0)  # after each report
    scaler = Scaler(tmp_path / "run", {18: "2:2", 23: "1:2"})
    # The same data and schedule to another end: what was done so far is what it would have done.
    config = configure({"steps": 30}, f"{tmp_path}/run/config.toml")
    capsys.readouterr()
    result = train(config, resume=True, progress=scaler)
    assert " 1 to 3 augmenters, 30 steps, from step 1" in capsys.readouterr().err
    assert not scaler.when
    assert (result["restarts"], result["steps"]) == (0, 30)  # the towers were not touched
    assert result["weights_sha256"] == longer
    events = lines(tmp_path / "run", "events.jsonl")
    scales = [event["augmenters"] for event in events if event["event"] == "scale"]
    assert scales == ["2:2", "1:2"]
    assert configure({}, f"{tmp_path}/run/config.toml").augmenters == "1:2"


@pytest.fixture
def damaged(tmp_path: Path) -> str:
    records = [(encode(draw(0, "train", i)[0]), f"{i}", i % 10) for i in range(100)]
    records[70] = (b"no image", "70", 0)
    names = [str(i) for i in range(10)]
    shards = write_split(f"{tmp_path}/shards", "train", records, names)
    folder = f"{tmp_path}/shards"
    write_manifest(folder, {"train": shards}, names)
    sums = sums_of_groups(open_dataset(folder), "train", 72, range(1), on_error="skip")
    sums.finish().save(f"{folder}/{STATISTICS}")  # so that it is an augmenter which finds it
    return folder


def test_a_bad_image_is_named(damaged: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of-00001.parquet row 70: the image \(8 bytes"):
        run(tmp_path / "run", damaged, epochs=1, towers=1)


def test_bad_images_are_skipped_and_counted(
    damaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path / "run", damaged, epochs=1, towers=1, on_error="skip")
    assert "no val or test split: nothing is evaluated\n" in capsys.readouterr().err
    assert result["split"] == "train"
    assert "top-1 error, training" in result_table(result)
    skipped = [e for e in lines(tmp_path / "run", "events.jsonl") if e["event"] == "skipped"]
    assert [e["count"] for e in skipped] == [1]
    assert "row 70" in skipped[0]["faults"][0]


def test_a_loss_that_is_not_a_number_ends_the_run_at_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run without shards, for which they are drawn."""
    monkeypatch.setattr("workers.data.write_drawn", partial(write_drawn, train=150, val=50))
    with pytest.raises(
        RunFailed, match=r"NotANumber: the loss is (nan|inf) at step \d+, e.*--rate R"
    ) as told:
        run(tmp_path / "run", "", rate=1e6, warmup=0, towers=1, checkpoint_every=1)
    assert open_dataset(f"{tmp_path}/run/shards").rows("train") == 150
    step = int(re.findall(r"at step (\d+)", str(told.value))[0])
    # The one that was being written is there, unless the step before had spoilt it already.
    last = checkpoints(f"{tmp_path}/run")[-1]
    assert last in (step - 1, step - 2)
    weights = load_weights(checkpoint_url(f"{tmp_path}/run", last))
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_full_cluster_is_said_not_waited_for(
    finished: tuple[Path, dict], shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ray.util.placement_group([{"CPU": 3}])
    ray.get(other.ready())

    def asked() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    try:
        with monkeypatch.context() as soon:
            soon.setattr("workers.room.PATIENCE", 1.0)
            with pytest.raises(UserError, match="cluster has no room for 2 towers with 1 CPU each"):
                run(tmp_path / "run", shards)
        with monkeypatch.context() as waiting:
            waiting.setattr("workers.room._starting", asked)
            with pytest.raises(RunFailed, match="stopped by SIGTERM before there was room"):
                run(tmp_path / "run", shards)
        assert not (tmp_path / "run").exists()
        # A supervisor that is started again makes the run what it was, or says that it goes on.
        shutil.copytree(finished[0], tmp_path / "run")
        config = configure({"run": f"{tmp_path}/run"}, f"{tmp_path}/run/config.toml")
        write_scale(config.run, "39:39")  # of which as many run as find room
        with monkeypatch.context() as soon:
            soon.setattr("workers.room.PATIENCE", 1.0)
            with pytest.raises(RunFailed, match=r"no room for .*checkpoint is of step 6: --resume"):
                train(config, resume=True, deaths=1)
        with open(tmp_path / "run/events.jsonl", "a") as events:
            start = {"event": "start", "time": 0, "step": 6, "mesh": "1x1x2", "device": "cuda"}
            print(json.dumps(start), file=events)
        with pytest.raises(UserError, match="2 towers need 2 GPUs"):
            train(config, resume=True, deaths=1)
    finally:
        ray.util.remove_placement_group(other)
