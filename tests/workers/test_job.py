"""A job on a cluster that runs already: `ray start`, a node of augmenters, `ray job submit`."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """What a user's shell has: the project's programs first, and the cluster's token.

    Ray's files lie apart, so that it does not look for this cluster after the test.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield kept | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": folder,
        }


@pytest.fixture(scope="module")
def dashboard(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A head and a node that takes augmenters, started as a user starts them."""
    logs = tmp_path_factory.mktemp("ray")
    gcs, http = free_port(), free_port()
    head = ("--head", f"--port={gcs}", f"--dashboard-port={http}", "--include-dashboard=true")
    node = (f"--address=127.0.0.1:{gcs}", "--resources", '{"augment": 1}')
    started = []

    def start(name: str, *options: str) -> None:
        with (logs / name).open("w") as log:
            command = [f"{BIN}/ray", "start", "--block", "--num-cpus=2", *options]
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    url = f"http://127.0.0.1:{http}"
    try:
        start("head.log", *head)
        _wait(url, environment["RAY_AUTH_TOKEN"], lambda nodes: nodes >= 1)
        start("node.log", *node)
        _wait(url, environment["RAY_AUTH_TOKEN"], lambda nodes: nodes >= 2)
        yield url
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, token: str, enough) -> None:  # type: ignore[no-untyped-def]
    request = urllib.request.Request(
        f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if enough(len(json.load(answer)["data"]["summary"])):
                    return
        except (urllib.error.URLError, OSError, KeyError):
            pass
        assert time.monotonic() < deadline, "the cluster did not come up"
        time.sleep(0.5)


def test_a_submitted_job_trains(
    dashboard: str, environment: dict[str, str], shards: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ["--network", "alexnet-mini", "--batch", "64", "--epochs", "1", "--run", str(run)]
    command = [
        *(f"{BIN}/ray", "job", "submit", "--address", dashboard, "--working-dir", "."),
        *("--", "towers", "train", shards, *options, "--json"),
    ]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        # Ray answers before the node's agent is up, which takes a while on few cores.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "top-1 error" in done.stdout
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events if event["event"] != "fleet"]
    assert kinds == ["start", "checkpoint", "end"]
    assert events[-1]["weights_sha256"] in done.stdout
    assert (run / "checkpoints" / "step-00000003" / ".metadata").exists()
    # Two nodes of two cores, one of them set aside: the towers have the other for themselves.
    assert "1 thread(s) each" in done.stdout


def towers(environment: dict[str, str], folder: Path, *arguments: str) -> Any:
    return subprocess.run(
        [f"{BIN}/towers", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_towers_submit_sends_follows_and_returns_the_code(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "big").write_bytes(secrets.token_bytes(2**21))
    known = environment | {"RAY_API_SERVER_ADDRESS": dashboard}
    done = towers(known, tmp_path, "submit", "--", "describe", "--network", "cifar")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("conv1 ") == 1  # the log, once
    assert "a package of 0.00 MiB" in done.stderr  # without the run
    job = done.stderr.split(":")[0]

    mistake = towers(known, tmp_path, "submit", "--", "describe", "--network", "lenet")
    assert mistake.returncode == 2
    assert "network is 'lenet': one of" in mistake.stdout

    listed = towers(known, tmp_path, "jobs").stdout
    assert job in listed
    assert "SUCCEEDED" in listed
    assert "FAILED" in listed
    assert "conv1" in towers(known, tmp_path, "logs", job).stdout
    assert "had ended already" in towers(known, tmp_path, "stop", job).stdout


@pytest.mark.parametrize("command", [("logs", "none"), ("stop", "none")])
def test_an_unknown_job_is_named(
    command: tuple[str, str], dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = towers(environment, tmp_path, *command, "--address", dashboard)
    assert done.returncode == 2
    assert done.stderr == "towers: none: no such job; `towers jobs` lists them\n"


def test_who_has_no_token_is_told(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    for token, said in ((None, "Authentication required"), ("0" * 64, "Authentication failed")):
        given = {k: v for k, v in environment.items() if k != "RAY_AUTH_TOKEN"}
        given |= {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        done = towers(given, tmp_path, "jobs", "--address", dashboard)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "RAY_AUTH_TOKEN" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_cluster_that_is_not_there_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    done = towers(environment, tmp_path, "jobs", "--address", address)
    assert done.returncode == 2
    assert done.stderr.startswith(f"towers: no Ray cluster at {address}: ")
    assert done.stderr.count("\n") == 1
