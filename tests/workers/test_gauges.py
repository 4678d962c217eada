"""What a run reports is what Prometheus reads, and what the board shows."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from workers.gauges import GAUGES, Gauges

pytestmark = pytest.mark.own_ray

BOARD = Path(__file__).parents[2] / "clusters/grafana.json"


def test_prometheus_reads_what_a_run_reports() -> None:
    if ray.is_initialized():
        ray.shutdown()
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
    try:
        Gauges("runs/one").set("train", {"loss": 2.5, "step": 7, "kind": "train"})
        deadline = time.monotonic() + 60
        while True:
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            except OSError:
                text = ""
            found = {
                match[1]: match[2]
                for line in text.splitlines()
                if (match := re.match(r"ray_towers_(\w+)\{(.*)\}", line))
            }
            if {"loss", "step"} <= set(found):
                break
            assert time.monotonic() < deadline, text[-2000:]
            time.sleep(0.5)
        assert set(found) == {"loss", "step"}
        assert 'run="runs/one"' in found["loss"]
        assert 'split="train"' in found["loss"]
        assert re.search(r"^ray_towers_loss\{.*\} 2\.5$", text, re.MULTILINE)
    finally:
        ray.shutdown()


def test_the_board_shows_every_gauge() -> None:
    shown = re.findall(r"ray_towers_(\w+)\{", BOARD.read_text())
    assert set(shown) == set(GAUGES)
    panels = json.loads(BOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
