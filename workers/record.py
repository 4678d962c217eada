"""What the towers report: into the run's folder, onto the terminal, to Prometheus, and the sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from pipeline.tracing import Span
from workers.gauges import Gauges
from workers.output import attempted
from workers.progress import Progress
from workers.run import RunFolder
from workers.timeline import write_profile

if TYPE_CHECKING:
    from workers.towers import Job


class Record:
    """Of one run; `saved` is called with the step of each checkpoint that is complete, and whether
    that has the step's evaluation.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        progress: Progress,
        saved: Callable[[int, bool], object],
    ) -> None:
        self.job, self.folder, self.progress, self.saved = job, folder, progress, saved
        self.evaluations: list[dict[str, Any]] = []  # so far, in the order of steps
        self.traces: dict[int, list[Span]] = {}  # of each rank
        self._last: dict[str, Any] = {}
        self._images = self._seconds = self._stalled = 0.0
        self._gauges = Gauges(folder.url)

    def take(self, report: dict[str, Any], feed: Any) -> None:
        """Acts on one report of a tower."""
        kind = report.pop("kind")
        if kind == "train":
            seconds = report["seconds"]
            self._seconds += seconds
            self._images += report["images_per_second"] * seconds
            self._stalled += report["stall_fraction"] * seconds
            report["augmenters"] = ray.get(feed.state.remote())["augmenters"]
            self._last = report
            self._measured("train", report)
            self.progress.step(report)
        elif kind == "evaluation":
            self.evaluations.append(report)
            self._measured(str(self.job.itinerary.held_out), report)
            self.progress.evaluation(report)
        elif kind == "saving":
            self.later(self.folder.publish)  # who goes on from there may lack no line before it
        elif kind == "checkpoint":
            errors = {line["step"]: line["top1_error"] for line in self.evaluations}
            self.saved(report["step"], report.pop("evaluated"))
            self.folder.event("checkpoint", **report)
            self.later(self.folder.publish)
            self.later(partial(self.folder.prune, self.job.config.keep, errors))
        elif kind == "unsaved":
            self.folder.event("unsaved", why=report["why"])
            self.progress.say(f"{report['why']}; {report['then']}")
        elif kind == "trace":
            self.traces[report["rank"]] = report["spans"]
            if len(self.traces) == self.job.placement.mesh.size:
                self.progress.say(self._profile())
                self.traces = {}
        elif kind == "skipped":
            self.folder.event("skipped", **report)
            for fault in report["faults"]:
                self.progress.say(f"skipped: {fault}")

    def _profile(self) -> str:
        """Writes what the towers did in the profiled steps; a line that says so."""
        mesh, folder = self.job.placement.mesh, self.folder
        steps = write_profile(f"{folder.local}/profile", self.traces, mesh)
        if not steps:
            return "no profile: the run is over before its fourth step"
        return f"profiled steps {steps[0]} to {steps[-1]}: {folder.url}/profile"

    def later(self, work: Callable[[], object]) -> None:
        """Does what the next checkpoint makes up for, if a store or a disk fails now."""
        with attempted(lambda why: self.progress.say(f"{self.folder.url}: {why}; later again")):
            work()

    def end(self, step: int, sha: str, restarts: int) -> dict[str, Any]:
        """The run's result, which is its last event too; `sha` is of the weights of `step`."""
        mesh = self.job.placement.mesh
        best = self.evaluations[-1] if self.evaluations else self._last
        result = {
            "run": self.folder.url,
            "steps": step,
            "epochs": round(step / self.job.itinerary.steps_per_epoch, 3),
            "split": self.job.itinerary.held_out if self.evaluations else "train",
            "loss": best.get("loss"),
            "top1_error": best.get("top1_error"),
            "top5_error": best.get("top5_error"),
            "images_per_second": self._images / self._seconds if self._seconds else 0.0,
            "stall_fraction": self._stalled / self._seconds if self._seconds else 0.0,
            "weights_sha256": sha,
            "restarts": restarts,
            "mesh": str(mesh),
        }
        self.folder.event("end", **result)
        return result

    def _measured(self, split: str, report: dict[str, Any]) -> None:
        self.folder.metrics({"split": split, **report})
        self._gauges.set(split, report)
