"""Towers' own metrics, which Ray exports to Prometheus beside its own, as `ray_towers_...`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

GAUGES = {
    "loss": "Mean cross-entropy since the last report.",
    "top1_error": "Share of images not right at once.",
    "top5_error": "Share of images not right among five.",
    "images_per_second": "Images that all replicas trained on a second.",
    "stall_fraction": "Share of the time that the towers waited for the fleet.",
    "exchange_fraction": "Share of the time that a tower stood still for its peers.",
    "augmenters": "Augmenters that run.",
    "step": "Steps trained.",
}


class Gauges:
    """The gauges of one run, set by its reports; `run` and `split` are their tags."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.gauges = {
            name: Gauge(f"towers_{name}", text, tag_keys=("run", "split"))
            for name, text in GAUGES.items()
        }

    def set(self, split: str, report: Mapping[str, Any]) -> None:
        """Takes what a report has of `GAUGES`."""
        for name, gauge in self.gauges.items():
            if isinstance(report.get(name), int | float):
                gauge.set(float(report[name]), tags={"run": self.run, "split": split})
