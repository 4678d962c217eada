"""Law 3: whatever is killed, at any moment, the weights are those of the undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def test_kills_at_random_moments_change_nothing() -> None:
    """One of each of these, the first of them while a checkpoint is written."""
    options = ["--kills", "2", "--kinds", "supervisor,tower", "--seed", "1", "--json"]
    done = subprocess.run(
        [sys.executable, PROGRAM, *options], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"]
    assert [kill["kind"] for kill in found["kills"]] == ["supervisor", "tower"]
    assert found["restarts"] == 2
