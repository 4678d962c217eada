"""A run goes on after the loss of its supervisor, and of the whole cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import below, kill
from workers.run import checkpoints

pytestmark = pytest.mark.own_ray
SMALL = {"network": "alexnet-mini", "batch": 64, "epochs": 20, "steps": 30}
SMALL |= {"augmenters": "1:1", "log_every": 1}
# A Ray of its own, in which towers have as many threads as in that of `longer`.
ALONE = {**os.environ, "RAY_ADDRESS": "local", "RAY_OVERRIDE_RESOURCES": '{"CPU": 4}'}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def command(shards: str, run: Path, *options: str) -> list[str]:
    """`towers train` of the same run as `SMALL`, as a user starts it."""
    given = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    program = str(Path(sys.executable).parent / "towers")
    flags = [word.replace("_", "-") if word.startswith("--") else word for word in given]
    return [program, "train", shards, "--run", str(run), *flags, *options, "--json"]


def test_a_killed_supervisor_is_started_again_and_a_lost_cluster_resumed(
    longer: str, shards: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        command(shards, run, "--checkpoint-every", "2"),
        env=ALONE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        for kept in (1, 5):  # the supervisor at the first, all that there is at a later step

            def there(kept: int = kept) -> bool:
                return checkpoints(str(run))[-1:] >= [kept]

            while job.poll() is None and not there():
                time.sleep(0.05)
            assert there()
            if kept == 1:
                assert kill(job, "supervisor")
        for pid in [job.pid, *below(job.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, said = job.communicate()
    assert "the run's supervisor was killed by SIGKILL: started again" in said
    assert [event["restarts"] for event in events(run, "lost")] == [1]
    assert not events(run, "end")
    done = checkpoints(str(run))
    again = subprocess.run(
        [sys.executable.replace("python", "towers"), "train", "--run", str(run), "--resume"],
        env=ALONE,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert events(run, "start")[-1]["step"] == done[-1]
    assert events(run, "end")[-1]["weights_sha256"] == longer
