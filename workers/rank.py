"""One rank of the mesh, which goes through the run's items."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist

from datasets import DataError
from datasets.plan import Itinerary
from datasets.storage import passing
from pipeline import NotANumber, checkpoint, host, native
from pipeline.crossing import Pair
from pipeline.optimizer import SGD
from pipeline.tower import Tower
from pipeline.tracing import clock
from pipeline.training import Totals, Trainer
from workers.config import provenance
from workers.devices import gpu
from workers.meter import Meter
from workers.patience import PAUSES, patiently
from workers.position import has_evaluation
from workers.run import check_visible, checkpoint_url
from workers.stream import Stream
from workers.towers import Job

PROFILED = range(4, 12)  # steps since the start that a profile shows: the first ones warm up


class Rank:
    """A rank, in a process of its own. `address`, then `join` on every rank, then `train`."""

    def __init__(self, job: Job, rank: int) -> None:
        host.prepare(job.placement.threads, job.placement.device)
        self.job, self.rank = job, rank

    def address(self) -> tuple[str, int]:
        """Where the ranks meet, if this one is the first: its node's address and port."""
        ip = ray.util.get_node_ip_address()
        # It listens from now on: a port that was only found free may be another's a moment later.
        self.store = dist.TCPStore(
            ip, 0, self.job.placement.mesh.size, is_master=True, wait_for_workers=False
        )
        return ip, self.store.port

    def join(self, address: tuple[str, int], resume: str | None) -> dict[str, Any]:
        """Builds this rank's share, at the weights of checkpoint `resume` or at the start.

        Returns the progress that the checkpoint holds, and as "slow" why this rank lacks compiled
        code, if it does. Raises DataError if this node does not see the run's folder, UserError if
        torch cannot use its GPU.
        """
        config, placement = self.job.config, self.job.placement
        if self.job.folder:
            patiently(partial(check_visible, self.job.folder))
        device = gpu() if placement.device == "cuda" else torch.device("cpu")
        if placement.mesh.size > 1:
            _use_interface(ray.util.get_node_ip_address())
            size = placement.mesh.size
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=self.store if self.rank == 0 else dist.TCPStore(*address, size),
                rank=self.rank,
                world_size=size,
            )
        self.mesh = placement.mesh.groups(device.type)
        self.replica, stage, tower = placement.mesh.place(self.rank)
        towers = placement.mesh.towers
        self.pair = None
        if self.mesh and towers == 2:
            self.pair = Pair(self.mesh.get_group("tower"), config.timeout)
        network = config.build(self.job.classes)
        self.tower = Tower(
            network,
            seed=config.seed,
            towers=towers,
            tower=tower,
            compute=getattr(torch, config.precision),
            layers=config.parts[stage],
            frozen=config.frozen,
        ).to(device)
        self.line = placement.mesh.line(self.mesh, config.timeout)
        self.writer = checkpoint.Writer(self.mesh)
        self.optimizer = SGD(
            self.tower.weights(),
            rate=config.rate,
            momentum=config.momentum,
            decay=config.decay,
            bias_rate=config.bias_rate,
            decay_bias=config.decay_bias,
        )
        self.trainer = Trainer(
            self.tower,
            self.optimizer,
            torch.from_numpy(self.job.mean),
            seed=config.seed,
            scale=config.scale,
            pair=self.pair,
            replicas=self.mesh.get_group("replica") if self.mesh else None,
            line=self.line,
            microbatches=config.microbatches,
            schedule=config.pipeline,  # type: ignore[arg-type]
            timeout=config.timeout,
        )
        self.progress: dict[str, Any] = {"step": 0, "evaluations": []}
        if resume:
            load = partial(checkpoint.load, resume, self.tower, self.optimizer, self.mesh)
            self.progress = patiently(load)  # on all ranks: a load that fails does so on each
        self.progress |= {"order": self.job.itinerary.order, **provenance(config)}
        slow = native.missing(device.type) if config.lrn else ""
        return {**self.progress, "slow": slow}

    def train(self, feed: Any, start: int) -> Iterator[dict[str, Any]]:
        """Goes through the items from `start` on; rank 0 yields a report now and then.

        Raises NotANumber, `LabelsDiffer`, `DataError`; whatever else ends a collective. A GPU that
        fails ends this process: no other could be had here, and the run goes on with another one.
        """
        try:
            try:
                yield from self._items(feed, start)
            except (DataError, NotANumber):
                with suppress(NotANumber):  # of the step before, which this one tells of
                    yield from self._written()  # what it has learned ends with the run else
                raise
        except torch.AcceleratorError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)

    def _items(self, feed: Any, start: int) -> Iterator[dict[str, Any]]:
        config, itinerary = self.job.config, self.job.itinerary
        schedule, evaluations = config.rates(), self.progress["evaluations"]
        stream = self._stream(feed, start, len(itinerary))
        peers = [peer for peer in (self.pair, self.line) if peer]
        meter, totals, evaluated = Meter(peers, stream), Totals(), Totals()
        trace, begun = self.trainer.trace, 0
        trained, rate = 0, 0.0  # epoch and rate of the last step
        self.saved = self.progress["step"]  # of the last checkpoint, written or being written
        replica_size = self.job.placement.mesh.size // self.job.placement.mesh.replicas
        for index in range(start, len(itinerary)):
            item = itinerary.item(index)
            before = clock()
            images = stream.next()
            if images is None:  # the run is to stop here
                break
            if stream.skipped and self.rank % replica_size == 0:
                yield {"kind": "skipped", "count": stream.skipped, "faults": stream.faults}
            if item.training:
                epoch = (item.step - 1) / itinerary.steps_per_epoch
                errors = [e["top1_error"] for e in evaluations]
                rate = schedule.at(item.step - 1, epoch, errors)
                self.optimizer.set_rate(rate)
                begun += 1
                trace.on = config.profile and begun in PROFILED
                trace.step = item.step
                if trace.on:
                    trace.add("data", "", before)
                try:
                    part = self.trainer.step(images, item.step)
                except NotANumber as error:
                    raise NotANumber(f"{error}, epoch {item.epoch}, batch {item.batch}") from None
                self.progress["step"], trained = item.step, item.epoch
                if trace.on and begun == PROFILED[-1]:
                    yield self._traced()
                totals += part
                meter.images += part.images
                meter.nodes[stream.node[:8]] += images.count
                due = item.last or meter.due(item.step, config.log_every)
                if self.rank == 0 and due and totals.images:  # none if all were skipped
                    yield self._trained(trained, totals, rate, meter)
                    totals = Totals()
            else:
                trace.on = False
                part = self.trainer.evaluate(images)
                evaluated = part if item.batch == 0 else evaluated + part
                if item.last:
                    line = {"step": item.step, "epoch": item.epoch, "images": evaluated.images}
                    evaluations.append({**line, **evaluated.means()})
                    if self.rank == 0:
                        yield {"kind": "evaluation", **evaluations[-1]}
                meter.read()
            if not self.writer.busy:
                yield from self._written()
            if self._due(item, itinerary):
                yield from self._save()
        if self.rank == 0 and totals.images:  # since the last report, if the run stops
            yield self._trained(trained, totals, rate, meter)
        for pause, following in zip(PAUSES, (*PAUSES[1:], None), strict=True):
            time.sleep(pause)  # the last one counts more than the time
            yield from self._save()
            yield from self._written(f"again in {following} s", last=following is None)
            if self.saved == self.progress["step"]:
                break
        if config.profile and begun < PROFILED[-1]:
            yield self._traced()

    def _traced(self) -> dict[str, Any]:
        self.trainer.trace.on = False
        return {"kind": "trace", "rank": self.rank, "spans": self.trainer.trace.spans}

    def _trained(self, epoch: int, totals: Totals, rate: float, meter: Meter) -> dict[str, Any]:
        """A report of the steps since the last one."""
        step = {"kind": "train", "step": self.progress["step"], "epoch": epoch}
        return {**step, **totals.means(), "rate": rate, **meter.read()}

    def measure(self, feed: Any, start: int, steps: int) -> tuple[float, float]:
        """Seconds that so many training items from `start` on take, and those of them that this
        rank waited for data; all ranks at once.
        """
        stop = start + steps
        stream = self._stream(feed, start, stop)
        begun = time.perf_counter()
        for step in range(start, stop):
            images = stream.next()
            assert images
            self.trainer.step(images, step)  # which ends with numbers on the host
        return time.perf_counter() - begun, stream.waited

    def _stream(self, feed: Any, start: int, stop: int) -> Stream:
        first, device = self.trainer.first, self.trainer.device
        return Stream(feed, self.replica, start, stop, pixels=first, device=device)

    def _save(self) -> Iterator[dict[str, Any]]:
        """Starts to write a checkpoint, once the one before is written.

        One of the same step stays as it is, rather than be half-written for a while: a run that was
        stopped before an evaluation made it, and would only evaluate again.
        """
        yield from self._written()
        if self.saved == self.progress["step"]:
            return
        self.saved = self.progress["step"]
        self.judged = has_evaluation(self.saved, self.progress["evaluations"])
        path = checkpoint_url(self.job.folder, self.saved)
        if self.rank == 0:
            yield {"kind": "saving"}
        self.writer.save(path, self.tower, self.optimizer, self.progress)

    def _written(
        self, then: str = "training goes on without this checkpoint", last: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Waits for a checkpoint that is being written, if one is; rank 0 reports it.

        Raises NotSaved if it could not be written, unless a store failed which may be back before
        the `last` attempt: then there is none of this step, on any rank, and `then` says what
        follows.
        """
        try:
            written = self.writer.finish()
        except checkpoint.NotSaved as error:
            if last or not (error.__cause__ and passing(error.__cause__)):
                raise
            self.saved = -1
            if self.rank == 0:
                yield {"kind": "unsaved", "why": str(error), "then": then}
            return
        if written and self.rank == 0:
            path = checkpoint_url(self.job.folder, self.saved)
            found = {"step": self.saved, "path": path, "evaluated": self.judged}
            yield {"kind": "checkpoint", **found}

    def _due(self, item: Any, itinerary: Itinerary) -> bool:
        """Whether a checkpoint is due after an item: at the end of an epoch and its evaluation,
        and after so many steps."""
        every = self.job.config.checkpoint_every
        if item.last:
            return not item.training or itinerary.held_out is None
        return bool(item.training and every and item.step % every == 0)

    def weights_sha256(self, path: str) -> str:
        """Of the whole network's weights in a checkpoint."""
        return patiently(partial(checkpoint.weights_sha256, path))


def _use_interface(ip: str) -> None:
    """Has gloo and NCCL talk over the interface with this address, not the host name's."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(s.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(reply[20:24]) == ip:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
