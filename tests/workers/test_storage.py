"""Shards and run on an object store, spoken to by the S3 protocol."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import fsspec
import pytest
import ray
from moto.server import ThreadedMotoServer

from workers.config import configure
from workers.run import checkpoints
from workers.supervisor import train


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server of our own, with a Ray whose processes know where it is."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    known = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    # fsspec keeps file systems, which keep where their server was.
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("bucket")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": known | {"PATH": os.environ["PATH"]}},
    )
    yield "s3://bucket"
    ray.shutdown()
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def test_shards_and_run_on_an_object_store(bucket: str, shards: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.put(f"{shards}/", "bucket/shards", recursive=True)
    given = {"network": "alexnet-mini", "batch": 64, "epochs": 2, "augmenters": "1:1", "keep": 1}
    config = configure({**given, "shards": f"{bucket}/shards", "run": f"{bucket}/run"})
    result = train(config)
    assert result["steps"] == 6
    assert 6 in checkpoints(f"{bucket}/run")
    fs.invalidate_cache()
    last = json.loads(fs.cat_file("bucket/run/events.jsonl").splitlines()[-1])
    assert last["weights_sha256"] == result["weights_sha256"]
    assert fs.exists("bucket/run/config.toml")
    assert fs.exists("bucket/run/metrics.jsonl")
    # The same, resumed where it had ended.
    again = train(config, resume=True)
    assert again["weights_sha256"] == result["weights_sha256"]
