"""Shards and run on an object store, spoken to by the S3 protocol."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray
from moto.server import ThreadedMotoServer

from datasets.drawn import draw
from datasets.images import encode
from datasets.shards import write_manifest, write_split
from pipeline.checkpoint import read_progress
from workers.cli import main
from workers.config import UserError, configure
from workers.errors import RunFailed
from workers.patience import patiently
from workers.progress import Progress
from workers.run import (
    RunFolder,
    checkpoints,
    occupied,
    read_lines,
    read_scale,
    write_scale,
)
from workers.supervisor import train
from workers.trained import open_trained

pytestmark = pytest.mark.own_ray


class Store:
    """A server of an object store, which may be away for a while: what it holds outlives that."""

    def __init__(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", 0)
        self.server.start()
        self.address = self.server.get_host_and_port()

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server = ThreadedMotoServer(*self.address)
        self.server.start()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    made = Store()
    yield made
    with suppress(Exception):  # the test ended it
        made.stop()


@pytest.fixture(scope="module")
def bucket(store: Store) -> Iterator[str]:
    """A bucket on a server of our own, with a Ray whose processes know where it is."""
    host, port = store.address
    known = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # or botocore alone takes two minutes to give up
    }
    patch = pytest.MonkeyPatch()
    for name, value in known.items():
        patch.setenv(name, value)
    # fsspec keeps file systems, which keep where their server was.
    fsspec.filesystem("s3").clear_instance_cache()
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # servers of one process hold the same
    fsspec.filesystem("s3").mkdir("bucket")

    def hurried() -> None:
        """In each of Ray's processes: a store is given up after ten seconds, not after minutes."""
        import datasets.storage
        import workers.patience

        datasets.storage.PAUSE = 0.1
        workers.patience.PAUSES = 0, 1, 5

    ray.shutdown()  # the cluster of the other tests here
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={
            "env_vars": known | {"PATH": os.environ["PATH"]},
            "worker_process_setup_hook": hurried,
        },
    )
    yield "s3://bucket"
    ray.shutdown()
    patch.undo()
    fsspec.filesystem("s3").clear_instance_cache()


class Outages(Progress):
    """Ends a store's server after a step until the run says a thing, after a later one for good."""

    def __init__(self, store: Store, steps: list[int], until: str) -> None:
        super().__init__()
        self.store, self.steps, self.until = store, steps, until
        self.away = False

    def say(self, text: str) -> None:
        super().say(text)
        if self.away and self.steps and self.until in text:
            self.away = False
            self.store.start()

    def step(self, report: dict[str, Any]) -> None:
        super().step(report)
        if self.steps and report["step"] >= self.steps[0] and not self.away:
            self.steps.pop(0)
            self.store.stop()
            self.away = True


def test_shards_and_run_on_an_object_store(
    bucket: str,
    store: Store,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose server is away when the first checkpoints are due: the last one is waited for."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fs = fsspec.filesystem("s3")
    fs.put(f"{shards}/", "bucket/shards", recursive=True)
    given = {"network": "alexnet-mini", "batch": 64, "epochs": 2, "augmenters": "1:1", "keep": 1}
    given |= {"shards": f"{bucket}/shards/", "run": f"{bucket}/run/", "log_every": 1}
    config, published = configure(given), []

    def saved(step: int) -> None:
        fs.invalidate_cache()
        published.append(fs.cat_file("bucket/run/metrics.jsonl"))

    outages = Outages(store, [1, 1000], "goes on without this checkpoint")
    result = train(config, progress=outages, progressed=saved)
    assert result["steps"] == 6
    assert checkpoints(f"{bucket}/run") == [6]
    fs.invalidate_cache()
    events = [json.loads(line) for line in fs.cat_file("bucket/run/events.jsonl").splitlines()]
    kinds = [event["event"] for event in events]
    assert "unsaved" in kinds
    assert kinds.count("start") == 1  # no restart
    assert events[-1]["weights_sha256"] == result["weights_sha256"]
    # Whoever goes on from a checkpoint has all lines before it.
    lines = [json.loads(line) for line in published[-1].splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["split"] == "val"] == [3, 6]
    assert fs.exists("bucket/run/config.toml")
    assert open_trained(f"{bucket}/run/").step == 6
    # The same, resumed where it had ended.
    again = train(config, resume=True)
    assert again["weights_sha256"] == result["weights_sha256"]
    assert not list(tmp_path.iterdir())  # what it had put there for a while


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    """Also if both began when there was none, or one is to go on while it still does."""
    config = configure({"network": "alexnet-mini", "run": f"{tmp_path}/run"})
    first, second = (RunFolder(config, resume=False) for _ in range(2))
    first.create()
    with pytest.raises(UserError, match="run: another process trains there"):
        RunFolder(config, resume=True).create()
    second_to_go_on = RunFolder(config, resume=True).held(print)  # before it asks for room
    with pytest.raises(UserError, match="another process trains there"), second_to_go_on:
        raise AssertionError
    assert occupied(config.run)
    first.close()
    assert not occupied(config.run)
    with pytest.raises(UserError, match="run already holds a run: --resume it, or name another"):
        second.create()
    goes_on = RunFolder(config, resume=True)
    goes_on.create()
    goes_on.close()


def test_a_store_is_waited_for_until_the_run_is_stopped() -> None:
    answers: list[Any] = [OSError(errno.EBUSY, "away"), OSError(errno.EIO, "away"), 7]

    def ask() -> int:
        if isinstance(answer := answers.pop(0), OSError):
            raise answer
        return int(answer)

    def stop() -> None:
        raise RunFailed("stopped")

    with pytest.raises(RunFailed, match="stopped"):
        patiently(ask, stop)
    assert patiently(ask) == 7
    answers.append(PermissionError("no"))
    with pytest.raises(PermissionError):
        patiently(ask)


def test_lines_that_a_store_did_not_take_at_the_end_are_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And hide neither the run's result nor what ended it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = RunFolder(
        configure({"network": "alexnet-mini", "run": "memory://untaken"}), resume=False
    )
    said: list[str] = []
    folder.create()
    folder.event("end")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("expired")

    monkeypatch.setattr(folder.fs, "put", refuse)
    with pytest.raises(RunFailed, match="the reason"), folder.held(said.append):
        raise RunFailed("the reason")
    assert len(said) == 1
    kept = said[0].rpartition("the run's last lines are in ")[2]
    assert len(read_lines(kept, "events.jsonl")) == 1
    assert said[0].startswith("memory://untaken: expired; ")


def test_a_full_disk_ends_a_run_in_a_line(tmp_path: Path) -> None:
    config = configure({"network": "alexnet-mini", "run": f"{tmp_path}/run"})
    folder = RunFolder(config, resume=False)
    folder.create()
    os.remove(f"{tmp_path}/run/events.jsonl")
    os.symlink("/dev/full", f"{tmp_path}/run/events.jsonl")
    with pytest.raises(RunFailed, match=r"run/events.jsonl cannot be written: No space left"):
        folder.event("start")
    folder.close()


def test_half_a_line_of_a_machine_that_failed_is_dropped(tmp_path: Path) -> None:
    config = configure({"network": "alexnet-mini", "run": f"{tmp_path}/run"})
    for resume in False, True, True:
        folder = RunFolder(config, resume=resume)
        folder.create()
        folder.event("start")
        folder.close()
        with open(f"{tmp_path}/run/events.jsonl", "a") as file:
            file.write('{"time": 1.0, "eve')
    assert len(read_lines(f"{tmp_path}/run", "events.jsonl")) == 3


def test_a_fleet_is_asked_for_again_if_the_store_did_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = RunFolder(configure({"network": "alexnet-mini", "run": "memory://r"}), resume=None)

    errors = [OSError(errno.EIO, "the store is away"), PermissionError("keys are renewed")]

    def fail(_: str) -> str:
        raise errors.pop()

    monkeypatch.setattr("workers.run.read_scale", fail)
    assert [folder.wanted_augmenters() for _ in list(errors)] == ["", ""]


def test_who_has_no_credentials_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    fsspec.filesystem("s3").clear_instance_cache()
    assert main(["report", "s3://bucket/run"]) == 2
    assert "towers: Unable to locate credentials" in capsys.readouterr().err
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_run_that_died_before_it_published_a_line_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where it leaves its lines
    config = configure({"network": "alexnet-mini", "run": "memory://died/run"})
    RunFolder(config, resume=False).create()
    folder = RunFolder(config, resume=True)
    folder.create()
    folder.event("start")
    folder.close()
    again = RunFolder(config, resume=True)
    again.create()
    assert len(again.events("start")) == 1
    again.close()


def test_a_fleet_that_was_asked_for_is_kept_until_another_is() -> None:
    config = configure({"network": "alexnet-mini", "run": "memory://asked/run"})
    folder = RunFolder(config, resume=False)
    folder.create()
    folder.close()
    write_scale(config.run, "2:3")  # while it does not run
    folder = RunFolder(config, resume=True)
    folder.create()
    assert folder.wanted_augmenters() == "2:3"
    folder.scaled("2:3")  # and is killed
    assert configure({}, f"{config.run}/config.toml").augmenters == "2:3"
    write_scale(config.run, "many")
    assert folder.wanted_augmenters() == ""
    write_scale(config.run, "3:4")
    folder.forget_scale("2:3")  # another was asked for meanwhile
    assert read_scale(config.run) == "3:4"
    for _ in range(2):
        folder.forget_scale("3:4")
        assert read_scale(config.run) == ""
    folder.event("end")
    folder.close()
    assert not write_scale(config.run, "8:9")


@pytest.mark.parametrize("name", ["pruned", "a[1]*?"])
def test_what_is_left_of_a_removed_checkpoint_is_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(
        configure({"network": "alexnet-mini", "run": f"memory://{name}"}), resume=None
    )
    for step in (1, 2):
        for file in ("__0_0.distcp", ".metadata"):
            folder.fs.pipe_file(f"/{name}/checkpoints/step-0000000{step}/{file}", b"x")

    def ended(fs: Any, path: str) -> None:
        assert f"{path}/__0_0.distcp" in fs.find(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("workers.run.remove", ended)
        with pytest.raises(KeyboardInterrupt):
            folder.prune(1, {})
    assert folder.checkpoints() == [2]
    folder.prune(1, {})
    left = folder.fs.ls(f"/{name}/checkpoints", detail=False)
    assert left == [f"/{name}/checkpoints/step-00000002"]


def test_a_store_that_stops_answering(bucket: str, store: Store, tmp_path: Path) -> None:
    """A while is waited for; for good, the run ends and says why, its last checkpoint whole."""
    names = [str(label) for label in range(10)]
    drawn = (draw(0, "train", n) for n in range(1600))
    records = [(encode(pixels), str(n), label) for n, (pixels, label) in enumerate(drawn)]
    # Small row groups, so that the run reads all the time.
    url = f"{bucket}/small-groups"
    written = write_split(url, "train", records, names, rows_per_group=4)
    write_manifest(url, {"train": written}, names)
    run = f"{tmp_path}/run"
    given = {"network": "alexnet-mini", "batch": 16, "epochs": 1, "augmenters": "1:1"}
    given |= {"checkpoint_every": 5, "log_every": 1, "shards": url, "run": run}
    outages = Outages(store, [12, 30], "waited for")
    said = r"s3://.*the store failed, again and again.*; the last checkpoint is of step \d+: --res"
    with pytest.raises(RunFailed, match=said):
        train(configure(given), progress=outages)
    assert not outages.steps
    last = checkpoints(run)[-1]
    assert last >= 30  # over the first outage, for which it did wait
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events.count("start") == 1  # no restart
    assert events.count("away") >= 1
    assert read_progress(f"{run}/checkpoints/step-{last:08d}")["step"] == last
