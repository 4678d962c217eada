"""Finding a cluster: one that is gone is not waited for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from workers.cluster import _address

START = """
import os, signal, time
import ray
signal.signal(signal.SIGTERM, lambda *_: print("ours"))
from workers.cluster import connected
try:
    with connected():
        print(len(ray.nodes()), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
"""


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def start(**environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", START],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_cluster_that_was_killed_is_not_looked_for_and_ours_ends_in_order(nobody: str) -> None:
    # Short, because Ray keeps its sockets below it.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text(nobody)
        done = start(RAY_TMPDIR=folder)
    # Terminated, it ends as if interrupted, where Ray would print a stack trace; after it the
    # caller's own handler is back.
    assert (done.stdout, done.stderr) == ("1\ninterrupted\nours\n", "")


def test_a_named_cluster_that_does_not_answer_is_named(nobody: str) -> None:
    done = start(RAY_ADDRESS=nobody)
    assert f"UserError: no Ray cluster at {nobody}: Connection refused" in done.stderr


@pytest.mark.parametrize("kind", ["http", "ray"])
def test_an_address_of_another_kind_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"{kind}://somewhere:8265")
    with pytest.raises(ConnectionError, match="HOST:6379 is wanted; `towers submit` takes http"):
        _address()
