"""A run's attempts: create the processes, watch them, create them again."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from datasets import DataError
from datasets.storage import StoreFailed, passing
from pipeline import NotANumber
from workers import cluster, room
from workers.actors import Actors
from workers.config import UserError
from workers.errors import Diverged, RunFailed
from workers.fleet import Fleet
from workers.patience import patiently
from workers.position import has_evaluation, position
from workers.progress import Progress
from workers.record import Record
from workers.run import RunFolder
from workers.towers import Job

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

LOOK_SECONDS = 2.0  # between looks at what `towers scale` wants
PLACES = ("nodes", "lost")  # of the fleet: those it has parts of now, those that are gone


class Attempts:
    """Those of one run; `result` goes through them."""

    def __init__(
        self,
        job: Job,
        fleet: Fleet,
        folder: RunFolder,
        progress: Progress,
        begin: Callable[[], object],
        deaths: int,
        since: float,
        progressed: Callable[[int], object] | None,
    ) -> None:
        self.job, self.fleet, self.folder, self.progress = job, fleet, folder, progress
        self.begin = begin  # writes into the folder what the run starts from
        self.deaths, self.since = deaths, since
        self.restarts, self.row = 0, 0  # in all, and since the last checkpoint
        self.made, self.progressed = False, progressed
        self.evaluated: dict[int, bool] = {}  # of our own checkpoints, by step
        self.record = Record(job, folder, progress, self._saved)
        self.stopping, self.stopped = "", False  # the signal that ends the run; whether it is heard
        self.stalls, self.looked = 0, 0.0
        self.away = ""
        self.seen: tuple[Any, ...] = ()

    def result(self) -> dict[str, Any]:
        while True:
            group = self._reserved()
            try:
                if not self.made:  # a run that found no room leaves no folder behind
                    self._position()  # nor is one changed that does not fit
                    self.folder.create()
                    self.begin()
                    del self.begin  # and the weights that it may hold
                    self.made = True
                    if self.deaths:
                        lost = self.folder.events("lost")
                        self.restarts = sum(event["time"] >= self.since for event in lost) + 1
                        self._lose(["the supervisor"])
                with Actors(self.job, self.fleet, group) as actors:
                    try:
                        return self._attempt(actors)
                    except ray.exceptions.RayError as error:
                        self._judge(error, actors)
            finally:
                if not cluster.lost():  # or nobody answers
                    ray.util.remove_placement_group(group)

    def _reserved(self) -> PlacementGroup:
        """The place of an attempt. Raises UserError if there is none for the first one, RunFailed
        for one that goes on.
        """
        try:
            return room.reserve(self.job.placement, self.fleet.name, self._check)
        except UserError as error:
            if not (self.made or self.deaths):
                raise
            raise RunFailed(f"{error}; {self._kept()}: --resume goes on from there") from None

    def _position(self) -> tuple[str | None, int]:
        return patiently(partial(position, self.folder, self.job, self.evaluated), self._check)

    def _steps(self) -> list[int] | None:
        """Of the checkpoints, None if the store does not tell now."""
        try:
            return self.folder.checkpoints()
        except Exception as error:
            if not passing(error):
                raise
            return None

    def _kept(self) -> str:
        steps = self._steps()
        if steps is None:
            return f"{self.folder.url} does not tell what checkpoints there are"
        return f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"

    def _judge(self, error: ray.exceptions.RayError, actors: Actors) -> None:
        """Returns if another attempt is due; raises what ends the run otherwise."""
        cause: BaseException | None = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, StoreFailed):
            raise RunFailed(f"{cause}; {self._kept()}: --resume") from None
        if isinstance(cause, (DataError, UserError)):
            raise cause from None
        kind = type(cause).__name__
        text = (str(cause).strip().splitlines() or ["no message"])[0]
        if getattr(cause, "actor_init_failed", False):  # by an exception, as any other's would
            text = str(cause).strip().splitlines()[-1]
            raise RunFailed(f"{textwrap.shorten(text, 300)}; {self._kept()}") from error
        lost = [] if isinstance(cause, NotANumber) else actors.lost(cause)
        if not lost:
            why = f"{kind}: {textwrap.shorten(text, 300)}; {self._kept()}"
            if isinstance(cause, NotANumber):
                lower = "a lower rate may be what it needs: --resume --rate RATE"
                raise Diverged(f"{why}; {lower}") from error
            raise RunFailed(why) from error
        self.restarts += 1
        self.row += 1
        if self.row > self.job.config.restarts:
            why = f"{', '.join(lost)} died, once too often; {self._kept()}: --resume"
            raise RunFailed(why) from None
        self._lose(lost)

    def _lose(self, lost: list[str]) -> None:
        """Says that the run goes on without these."""
        kept = self._steps()
        where = f"step {kept[-1]}, the last checkpoint" if kept else "the start"
        where = "the last checkpoint" if kept is None else where
        self.folder.event("lost", processes=lost, restarts=self.restarts)
        self.progress.say(f"{', '.join(lost)} died: going on from {where}")

    def _attempt(self, actors: Actors) -> dict[str, Any]:
        """Trains from the last checkpoint to the end."""
        resume, start = self._position()
        mesh, itinerary = self.job.placement.mesh, self.job.itinerary
        feed, towers = actors.feed, actors.towers
        self.stalls, self.away, self.stopped = 0, "", False  # as this feed has them
        opened = feed.open.remote(start)  # the fleet starts while the towers build their weights
        (address,) = self._get([towers[0].address.remote()])
        joined = self._get([tower.join.remote(address, resume) for tower in towers])
        found = joined[0]
        for why in sorted({one["slow"] for one in joined} - {""}):
            self.folder.event("slow", why=why)
            self.progress.say(f"normalisation is not compiled, and takes far longer: {why}")
        self._get([opened])
        self.record.evaluations = list(found["evaluations"])
        threads = self.job.placement.threads
        had = last_start(self.folder).get("threads")
        if had not in (None, threads):
            self.progress.say(
                f"towers have {threads} thread(s) each, and had {had} before: "
                "the weights' last bits may be others than without the interruption"
            )
        device = self.job.placement.device
        self.folder.event(
            "start", step=found["step"], mesh=str(mesh), device=device, threads=threads
        )
        self.record.later(self.folder.publish)
        self.progress.start(self.job, self.fleet.config.fleet, found["step"])
        for report in actors.reports(start):
            if report:
                self.record.take(report, feed)
            self._heed(feed)
        steps = patiently(self.folder.checkpoints)
        total = itinerary.total_steps
        judged = not itinerary.held_out or has_evaluation(total, self.record.evaluations)
        if not (judged and steps and steps[-1] == total):
            self._check()
        if not steps:
            raise RunFailed("the run ended without a checkpoint")
        last = steps[-1]
        sha = ray.get(towers[0].weights_sha256.remote(self.folder.checkpoint(last)))
        return self.record.end(last, sha, self.restarts)

    def _saved(self, step: int, evaluated: bool) -> None:
        self.row, self.evaluated[step] = 0, evaluated
        if self.progressed:
            self.progressed(step)

    def _get(self, refs: list[Any]) -> list[Any]:
        """Their values, which a node that is gone may keep one waiting for; signals are heard."""
        while True:
            try:
                return list(ray.get(refs, timeout=1))
            except ray.exceptions.GetTimeoutError:
                self._check()

    def _check(self) -> None:
        """Raises RunFailed if a signal has ended the run."""
        if not self.stopping:
            return
        if not self.made:
            raise RunFailed(f"stopped by {self.stopping} before there was room for the run")
        steps = self._steps()
        step = f"step {steps[-1]}, of which a checkpoint is kept" if steps else "the start"
        step = f"a step that {self.folder.url} does not tell" if steps is None else step
        raise RunFailed(f"stopped by {self.stopping} at {step}; --resume goes on from there")

    def _heed(self, feed: Any) -> None:
        """Does what was asked for from outside: a signal, or `towers scale`."""
        if self.stopping and not self.stopped:
            self.stopped = True
            ray.get(feed.stop.remote())
            self.progress.ending = True
            self.progress.say(f"{self.stopping}: a checkpoint, and then the end")
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        cluster.check()
        wanted = self.folder.wanted_augmenters()
        if wanted and wanted != self.fleet.config.augmenters:
            self.fleet.config = replace(self.fleet.config, augmenters=wanted)  # of later attempts
            self.record.later(partial(self.folder.scaled, wanted))
            ray.get(feed.scale.remote(wanted))
            self.progress.say(f"the fleet has {wanted} augmenters from here on")
        state = ray.get(feed.state.remote())
        if state["stalls"] > self.stalls:
            self.stalls = state["stalls"]
            self.folder.event("stall", stalls=self.stalls)
            self.progress.say("the fleet brought nothing for a while and was started anew")
        if state["away"] and not self.away:
            self.folder.event("away", why=state["away"])
            self.progress.say(f"waited for, some minutes at most: {state['away']}")
        self.away = state["away"]
        fleet = state["augmenters"], state["nodes"], state["lost"]
        if fleet != self.seen:
            self.seen = fleet
            self.folder.event("fleet", **{name: state[name] for name in ("augmenters", *PLACES)})


def last_start(folder: RunFolder) -> dict[str, Any]:
    """The event of when the run started last; {} if it did not."""
    return next(iter(folder.events("start")[-1:]), {})
