"""Law 3: whatever is killed, at any moment, the weights are those of the undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def test_a_kill_at_a_random_moment_changes_nothing() -> None:
    """Of the supervisor; the other kinds have tests of their own."""
    options = ["--kills", "1", "--kinds", "supervisor", "--seed", "1", "--json"]
    done = subprocess.run(
        [sys.executable, PROGRAM, *options], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"]
    assert [kill["kind"] for kill in found["kills"]] == ["supervisor"]
    assert found["restarts"] == 1
