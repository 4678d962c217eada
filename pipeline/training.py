"""One step of training or evaluation on one rank: pixels to totals, and weights moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import NotANumber, native
from pipeline.crossing import Pair
from pipeline.graph import Graph
from pipeline.loss import cross_entropy
from pipeline.optimizer import SGD
from pipeline.schedule import Kind, Line, Reducer, order
from pipeline.tower import Dropout, Tower
from pipeline.tracing import Trace, clock
from pipeline.waiting import TIMEOUT, all_reduce, watch


@dataclass(frozen=True)
class Images:
    """One replica's images of a global batch, on any device.

    `crops` uint8 [n, crop, crop, 3], `labels` int64 [n], `shifts` float32 [n, 3] in grey levels to
    add to each pixel, `places` int64 [n] the place of each in the global batch, in order if unset.
    """

    crops: Tensor
    labels: Tensor
    shifts: Tensor
    places: Tensor | None = None

    @property
    def count(self) -> int:
        """How many images."""
        return len(self.labels if self.places is None else self.places)

    @property
    def placed(self) -> Tensor:
        """The place of each in the global batch, int64 [count]."""
        return torch.arange(self.count) if self.places is None else self.places

    def on_gpu(self, beside: torch.cuda.Stream) -> Images:
        """The same in a GPU's memory, copied in a stream of its own while steps go on."""
        tensors = (self.crops, self.labels, self.shifts, self.placed)
        with torch.cuda.stream(beside):
            moved = [t.pin_memory().to(beside.device, non_blocking=True) for t in tensors]
        beside.synchronize()
        for t in moved:  # the memory is not used anew until the steps are through with it
            t.record_stream(torch.cuda.default_stream(beside.device))
        return Images(*moved)


@dataclass(frozen=True)
class Totals:
    """Sums over images: the loss, and how many were not right at once or among five."""

    images: int = 0
    loss: float = 0.0
    wrong1: int = 0
    wrong5: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.images + other.images,
            self.loss + other.loss,
            self.wrong1 + other.wrong1,
            self.wrong5 + other.wrong5,
        )

    def means(self) -> dict[str, float]:
        """loss, top1_error and top5_error as means over the images (nan of none)."""
        n = self.images or math.nan
        return {
            "loss": self.loss / n,
            "top1_error": self.wrong1 / n,
            "top5_error": self.wrong5 / n,
        }


class Trainer:
    """Steps a tower together with the ranks of its pair and its replicas.

    `mean` float32 [crop, crop, 3] is subtracted from the pixels (0 to 255), then `scale` multiplies
    them. Gradients are those of the mean loss over the global batch, whatever its micro-batches,
    stages (`line`) and replicas. Only the first stage needs crops, only the last labels; all need
    to know how many images there are and their places. `schedule` orders a stage's micro-batches;
    `timeout`: seconds that it waits for another rank.
    """

    def __init__(
        self,
        tower: Tower,
        optimizer: SGD,
        mean: Tensor,
        *,
        seed: int,
        scale: float = 1.0,
        pair: Pair | None = None,
        replicas: dist.ProcessGroup | None = None,
        line: Line | None = None,
        microbatches: int = 1,
        schedule: Kind = "1f1b",
        timeout: float = TIMEOUT,
    ) -> None:
        self.tower, self.optimizer, self.pair = tower, optimizer, pair
        self.replicas = replicas if replicas and replicas.size() > 1 else None
        if self.replicas:
            watch(self.replicas, timeout)
        self.seed, self.scale, self.microbatches = seed, scale, microbatches
        self.line, self.schedule = line, schedule
        self.stage, self.stages = (line.stage, line.stages) if line else (0, 1)
        self.first, self.last = self.stage == 0, self.stage == self.stages - 1
        self.timeout, self.trace = timeout, Trace()
        for peer in (pair, line):
            if peer:
                peer.trace = self.trace
        self.reducer = Reducer(tower.weights(), self.replicas, timeout) if self.replicas else None
        self.device = next(tower.parameters()).device
        peers = pair or line or self.replicas  # whose answers would be awaited in the middle
        alone = self.device.type == "cuda" and not peers and tower.learns
        self.graph = Graph(self._work, tower.parameters()) if alone else None
        layers = [tower.network.layers[index] for index in tower.layers]
        self._drops = [layer.name for layer in layers if layer.dropout]
        self._like = torch.empty(0, dtype=tower.compute, device=self.device)
        # The dtype of the weights, so that a float64 tower is float64 from its pixels on.
        self.mean = mean.to(self.device, next(tower.parameters()).dtype).contiguous()

    def step(self, images: Images, step: int) -> Totals:
        """Trains on a global batch as step number `step`; returns its totals before the step. A
        batch without images changes nothing.

        Raises NotANumber (on every rank alike), `LabelsDiffer` from the loss, `waiting.Stuck` if a
        peer does not come.
        """
        sums = self._summed(self._sums(images, step))
        totals = _Later(sums)
        with self.trace.span("optimizer", ""):
            self.optimizer.step(sums[1].isfinite() & (sums[0] > 0))
        found = totals.get()
        if not math.isfinite(found.loss):
            raise NotANumber(f"the loss is {found.loss} at step {step}")
        return found

    def gradients(self, images: Images, step: int) -> Totals:
        """Sets the gradient of every parameter that is trained to that of the global batch's mean
        loss; returns the batch's totals. Raises `LabelsDiffer`, `waiting.Stuck`.
        """
        return _Later(self._summed(self._sums(images, step))).get()

    def _sums(self, images: Images, step: int) -> Tensor:
        """Sets the gradients; returns this rank's sums, float64 [4]."""
        if self.graph and images.count and not self.trace.on:
            batch = (images.crops, images.labels, images.shifts, images.placed)
            draws = [Dropout.key(self.seed, step, name) for name in self._drops]
            return self.graph(batch, draws)
        self.optimizer.zero_grad()
        # Over the hosts: on a GPU it would wait for the step before.
        count = int(self._over_replicas(torch.tensor([images.count])))
        return self._accumulate(images, count, step)

    def _work(self, batch: Sequence[Tensor], draws: Sequence[Tensor]) -> Tensor:
        """`_sums` of a lone process, with the draws of masks in the GPU's memory."""
        images, held = Images(*batch), dict(zip(self._drops, draws, strict=True))
        return self._accumulate(images, images.count, 0, held)

    def _accumulate(
        self, images: Images, count: int, step: int, held: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Adds up gradients over micro-batches of a global batch of `count` images."""
        parts = self._parts(images)
        sums, kept = self._zeros(), dict[int, tuple[Tensor, Tensor]]()
        for action, m in order(self.schedule, self.stage, self.stages, len(parts)):
            if action == "forward":
                start, end, places = parts[m]
                dropout = Dropout(self.seed, step, places, held)
                x, y, some = self._forward(images, start, end, dropout, str(m))
                sums += some
                kept[m] = x, y / count if self.last else y
                continue
            if self.reducer and m == len(parts) - 1:
                self.reducer.arm()
            x, y = kept.pop(m)
            if not self.tower.learns:
                continue
            grad = self.line.receive_gradient(y) if self.line and not self.last else None
            with self.trace.span("backward", str(m)):
                torch.autograd.backward(y, grad)
            if self.line and self.tower.learns_before:
                assert x.grad is not None
                self.line.send_gradient(x.grad)
        if self.reducer:
            self.reducer.finish()
        return sums

    @torch.no_grad()
    def evaluate(self, images: Images) -> Totals:
        """The totals of a global batch without dropout; weights and gradients stay.

        Raises NotANumber (on every rank alike), `LabelsDiffer`, `waiting.Stuck`.
        """
        sums = self._zeros()
        for start, end, _ in self._parts(images):
            sums += self._forward(images, start, end, None)[2]
        found = _Later(self._summed(sums)).get()
        if not math.isfinite(found.loss):
            raise NotANumber(f"the loss is {found.loss} in an evaluation")
        return found

    def _parts(self, images: Images) -> list[tuple[int, int, Tensor]]:
        """Start, end and places of each micro-batch; none of a batch without images."""
        parts, end = [], 0
        places = images.placed.to(self.device, non_blocking=True)
        for part in places.chunk(self.microbatches) if len(places) else ():
            start, end = end, end + len(part)
            parts.append((start, end, part))
        return parts

    def _forward(
        self, images: Images, start: int, end: int, dropout: Dropout | None, name: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What this stage read, what it made (the last one: the summed loss), and its sums."""
        if self.line and not self.first:
            x = self.line.receive(self.tower.input_shape(end - start), self._like)
            x.requires_grad_(torch.is_grad_enabled() and self.tower.learns_before)
            begun = clock()
        else:
            begun = clock()
            x = self._pixels(images, start, end)
        y = self.tower(x, self.pair, dropout)
        if self.line and not self.last:
            self.trace.add("forward", name, begun)
            self.line.send(y.detach())
            return x, y, self._zeros()
        if self.pair:
            self.pair.where = "the loss"
        labels = images.labels[start:end].to(self.device, non_blocking=True)
        loss, ranks = cross_entropy(y, labels, self.tower.first_class, self.pair)
        wrong1, wrong5 = (ranks >= 1).sum(), (ranks >= 5).sum()
        sums = torch.stack([loss.new_full((), end - start), loss.detach(), wrong1, wrong5])
        self.trace.add("forward", name, begun)
        return x, loss, sums

    def _zeros(self) -> Tensor:
        return torch.zeros(4, dtype=torch.float64, device=self.device)

    def _pixels(self, images: Images, start: int, end: int) -> Tensor:
        """[n, 3, crop, crop] in channels-last layout, mean taken off and colour shifted."""
        crops, shifts = (
            t[start:end].to(self.device, non_blocking=True) for t in (images.crops, images.shifts)
        )
        kernels = native.gpu_kernels() if crops.is_cuda else None
        if kernels and self.mean.dtype == torch.float32:
            x = kernels.pixels(crops, shifts, self.mean, self.scale, self.tower.compute)
        else:
            offset = shifts.to(self.mean.dtype)[:, None, None, :] - self.mean
            x = (offset + crops).mul_(self.scale)
        return x.permute(0, 3, 1, 2)

    def _over_replicas(self, x: Tensor) -> Tensor:
        if self.replicas:
            all_reduce(x, self.replicas, "the totals over replicas", self.timeout)
        return x

    def _summed(self, sums: Tensor) -> Tensor:
        """Over all ranks."""
        if self.line:
            self.line.finish()
            self.line.sum_(sums, "the totals")
        return self._over_replicas(sums)


class _Later:
    """Sums on their way to the host, without a wait for what comes after them."""

    def __init__(self, sums: Tensor) -> None:
        self._sums = sums.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if sums.is_cuda else None
        if self._there:
            self._there.record()

    def get(self) -> Totals:
        if self._there:
            self._there.synchronize()
        images, loss, wrong1, wrong5 = self._sums.tolist()
        return Totals(int(images), loss, int(wrong1), int(wrong5))
