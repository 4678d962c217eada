"""What a run reports is what Prometheus reads, and what the board shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from workers.gauges import GAUGES

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "clusters/grafana.json"
TELEMETRY = "RAY_enable_open_telemetry"  # which the other tests do without


PROGRAM = """
import socket, sys, time, urllib.request
import ray
from workers.gauges import Gauges

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(
    address="local",
    num_cpus=1,
    include_dashboard=False,
    _metrics_export_port=port,
    _system_config={"metrics_report_interval_ms": 500},
)
Gauges("runs/one").set("train", {"loss": 2.5, "step": 7, "kind": "train"})
text, deadline = "", time.monotonic() + 60
while not ("towers_loss" in text and "towers_step" in text) and time.monotonic() < deadline:
    time.sleep(0.5)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    except OSError:
        pass  # not yet there
print(text)
"""


def test_prometheus_reads_what_a_run_reports() -> None:
    environment = {k: v for k, v in os.environ.items() if k != TELEMETRY}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = {
        match[1]: (match[2], match[3])
        for line in run.stdout.splitlines()
        if (match := re.match(r"ray_towers_(\w+)\{(.*)\} (\S+)$", line))
    }
    assert {name: float(value) for name, (_, value) in found.items()} == {"loss": 2.5, "step": 7}
    assert 'run="runs/one"' in found["loss"][0]
    assert 'split="train"' in found["loss"][0]


def test_the_board_shows_every_gauge() -> None:
    shown = re.findall(r"ray_towers_(\w+)\{", BOARD.read_text())
    assert set(shown) == set(GAUGES)
    panels = json.loads(BOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
