"""Shards and run on an object store, spoken to by the S3 protocol."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray
from moto.server import ThreadedMotoServer

from datasets import DataError
from datasets.drawn import draw
from datasets.images import encode
from datasets.shards import write_manifest, write_split
from pipeline.checkpoint import read_progress
from workers.config import configure
from workers.progress import Progress
from workers.run import RunFolder, checkpoints, read_scale, write_scale
from workers.supervisor import train
from workers.trained import open_trained


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    made = ThreadedMotoServer("127.0.0.1", 0)
    made.start()
    yield made
    with suppress(Exception):  # the test ended it
        made.stop()


@pytest.fixture(scope="module")
def bucket(server: ThreadedMotoServer) -> Iterator[str]:
    """A bucket on a server of our own, with a Ray whose processes know where it is."""
    host, port = server.get_host_and_port()
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
    ray.shutdown()  # the cluster of the other tests here
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": known | {"PATH": os.environ["PATH"]}},
    )
    yield "s3://bucket"
    ray.shutdown()
    patch.undo()
    fsspec.filesystem("s3").clear_instance_cache()


def test_shards_and_run_on_an_object_store(
    bucket: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fs = fsspec.filesystem("s3")
    fs.put(f"{shards}/", "bucket/shards", recursive=True)
    given = {"network": "alexnet-mini", "batch": 64, "epochs": 2, "augmenters": "1:1", "keep": 1}
    config = configure({**given, "shards": f"{bucket}/shards/", "run": f"{bucket}/run/"})
    result = train(config)
    assert result["steps"] == 6
    assert 6 in checkpoints(f"{bucket}/run")
    fs.invalidate_cache()
    last = json.loads(fs.cat_file("bucket/run/events.jsonl").splitlines()[-1])
    assert last["weights_sha256"] == result["weights_sha256"]
    assert fs.exists("bucket/run/config.toml")
    assert fs.exists("bucket/run/metrics.jsonl")
    assert open_trained(f"{bucket}/run/").step == 6
    # The same, resumed where it had ended.
    again = train(config, resume=True)
    assert again["weights_sha256"] == result["weights_sha256"]
    assert not list(tmp_path.iterdir())  # what it had put there for a while


def test_a_run_that_died_before_it_published_a_line_goes_on() -> None:
    config = configure({"network": "alexnet-mini", "run": "memory://died/run"})
    RunFolder(config, resume=False).create()
    folder = RunFolder(config, resume=True)
    folder.create()
    folder.event("start")
    folder.close()
    again = RunFolder(config, resume=True)
    again.create()
    assert again.count("start") == 1
    again.close()


def test_a_fleet_that_was_asked_for_holds_until_another_is() -> None:
    config = configure({"network": "alexnet-mini", "run": "memory://asked/run"})
    folder = RunFolder(config, resume=False)
    folder.create()
    folder.close()
    write_scale(config.run, "2:3")  # while it does not run
    for given, left in ((config, "2:3"), (replace(config, augmenters="4:5"), "")):
        folder = RunFolder(given, resume=True)
        folder.create()
        folder.close()
        assert read_scale(config.run) == left
    folder = RunFolder(given, resume=True)
    folder.create()
    folder.scaled("6:7")  # and is killed
    assert configure({}, f"{config.run}/config.toml").augmenters == "6:7"


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
            folder.prune(1, None)
    assert folder.checkpoints() == [2]
    folder.prune(1, None)
    left = folder.fs.ls(f"/{name}/checkpoints", detail=False)
    assert left == [f"/{name}/checkpoints/step-00000002"]


class Outages(Progress):
    """Ends a store's server after a step for some seconds, and after a later one for good."""

    def __init__(self, server: ThreadedMotoServer, steps: list[int], seconds: float) -> None:
        super().__init__()
        self.server, self.steps, self.seconds = server, steps, seconds
        self.again: list[threading.Timer] = []

    def step(self, report: dict[str, Any]) -> None:
        super().step(report)
        if not self.steps or report["step"] < self.steps[0]:
            return
        self.steps.pop(0)
        for again in self.again:
            again.join()
        host, port = self.server.get_host_and_port()
        self.server.stop()
        self.server = ThreadedMotoServer(host, port)  # what it holds outlives it
        if self.steps:
            self.again.append(threading.Timer(self.seconds, self.server.start))
            self.again[0].start()


def test_a_store_that_stops_answering(
    bucket: str, server: ThreadedMotoServer, tmp_path: Path
) -> None:
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
    outages = Outages(server, [12, 50], 4.0)
    with pytest.raises(DataError, match=r"s3://.*the store failed, again and again"):
        train(configure(given), progress=outages)
    assert not outages.steps
    last = checkpoints(run)[-1]
    assert last >= 50  # over the first outage, for which it did wait
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events].count("start") == 1  # no restart
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in metrics]
    assert any(b - a > 2 for a, b in itertools.pairwise(times))
    assert read_progress(f"{run}/checkpoints/step-{last:08d}")["step"] == last
