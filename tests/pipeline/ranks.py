"""Ranks in processes of their own, started once a session, and what the tests let them do.

The folder is on `sys.path` (conftest.py), so that the processes can import this file too.
"""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pipeline.crossing import Pair
from pipeline.mesh import Mesh
from pipeline.network import Network
from pipeline.optimizer import SGD
from pipeline.schedule import Kind, Line
from pipeline.stages import cut as cut_network
from pipeline.tower import Tower
from pipeline.training import Images, Totals, Trainer
from pipeline.waiting import TIMEOUT

SEED = 3
ALONE = Mesh(towers=1)
TOWERS = Mesh()


class Ranks:
    """`size` processes in one gloo group; `run` has each call a function of a test file."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What job(*arguments) returns on each rank; fails with the first traceback."""
        if not self._processes:
            self._start()
        call = pickle.dumps((inspect.getfile(job), job.__name__, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            missing = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(missing, timeout=120)
            if not ready:
                self.stop()
                raise TimeoutError(f"{len(missing)} of {self.size} ranks gave no answer")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                good, answer = pickle.loads(self._pipes[rank].recv_bytes())
                if not good:
                    # The others may be waiting for it; the next call starts afresh.
                    self.stop()
                    raise AssertionError(f"rank {rank}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(self.size)]

    def first(self, job: Callable[..., Any], *arguments: Any) -> Any:
        """What rank 0 returns of the same on all, while others may never end."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((inspect.getfile(job), job.__name__, arguments)))
        assert self._pipes[0].poll(60), "rank 0 gave no answer"
        good, answer = pickle.loads(self._pipes[0].recv_bytes())
        self.stop()
        assert good, answer
        return answer

    def _start(self) -> None:
        # Torch takes seconds to import: once in the server that all ranks are forked from.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.checkpoint", "hypothesis", "pytest"])
        store = f"file://{tempfile.mkdtemp()}/store"
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, self.size, store), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        try:
            path, name, arguments = pickle.loads(call)
            answer = True, getattr(_module(path), name)(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


@cache
def _module(path: str) -> ModuleType:
    """The test file at a path: under pytest's importlib mode it has no name to import it by."""
    if path == __file__:
        return sys.modules[__name__]
    spec = spec_from_file_location(f"job_{Path(path).stem}", path)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def devices(mesh: Mesh) -> DeviceMesh | None:
    return mesh.groups("cpu")


def pair_of(mesh: Mesh) -> Pair | None:
    groups = devices(mesh)
    return Pair(groups.get_group("tower")) if groups and mesh.towers == 2 else None


@cache
def line_of(mesh: Mesh) -> Line | None:
    return mesh.line(devices(mesh), TIMEOUT)


def this_rank(mesh: Mesh) -> tuple[int, int]:
    """(replica, tower) of this process."""
    replica, _, tower = place(mesh)
    return replica, tower


def place(mesh: Mesh) -> tuple[int, int, int]:
    """(replica, stage, tower) of this process."""
    return mesh.place(dist.get_rank() if mesh.size > 1 else 0)


def batch(network: Network, n: int, seed: int = 0) -> Images:
    """Noise with labels and colour shifts."""
    draw = torch.Generator().manual_seed(seed)
    shape = (n, network.crop, network.crop, 3)
    return Images(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw),
        torch.randint(0, network.classes, (n,), generator=draw),
        torch.randn(n, 3, generator=draw) * 5,
    )


def cut(images: Images, start: int, end: int) -> Images:
    """The part of a global batch that one replica gets."""
    crops, labels, shifts = (t[start:end] for t in (images.crops, images.labels, images.shifts))
    return Images(crops, labels, shifts, torch.arange(start, start + len(labels)))


def seen(images: Images, trainer: Trainer) -> Images:
    """What a stage gets of a batch: pixels the first alone, labels the last alone."""
    places = torch.arange(images.count) if images.places is None else images.places
    crops = images.crops if trainer.first else images.crops[:0]
    labels = images.labels if trainer.last else images.labels[:0]
    return Images(crops, labels, images.shifts if trainer.first else images.shifts[:0], places)


def mean_image(network: Network) -> Tensor:
    shape = (network.crop, network.crop, 3)
    return 120 + 10 * torch.rand(shape, generator=torch.Generator().manual_seed(9))


def make_trainer(
    network: Network,
    mesh: Mesh = ALONE,
    *,
    dtype: torch.dtype = torch.float64,
    compute: torch.dtype | None = None,
    microbatches: int = 1,
    scale: float = 1 / 64,
    rate: float = 0.01,
    cuts: Sequence[str] = (),
    schedule: Kind = "1f1b",
    frozen: range = range(0),
    device: str = "cpu",
) -> Trainer:
    """This rank's trainer, as the tower actors of a run make theirs."""
    tower = Tower(
        network,
        seed=SEED,
        towers=mesh.towers,
        tower=this_rank(mesh)[1],
        dtype=dtype,
        compute=compute,
        layers=cut_network(network, mesh.stages, cuts)[place(mesh)[1]],
        frozen=frozen,
    ).to(device)
    groups = devices(mesh)
    return Trainer(
        tower,
        SGD(tower.weights(), rate=rate),
        mean_image(network),
        seed=SEED,
        scale=scale,
        pair=pair_of(mesh),
        replicas=groups.get_group("replica") if groups else None,
        line=line_of(mesh),
        microbatches=microbatches,
        schedule=schedule,
    )


def gradients(
    network: Network,
    images: Images,
    mesh: Mesh,
    cuts: Sequence[int] | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Totals, dict[str, Tensor]]:
    """Totals and gradients of this rank; replica r has the images cuts[r] to cuts[r + 1]."""
    trainer = make_trainer(network, mesh, **options or {})
    replica = this_rank(mesh)[0]
    part = cut(images, *cuts[replica : replica + 2]) if cuts else images
    totals = trainer.gradients(seen(part, trainer), step=7)
    weights = trainer.tower.weights()
    assert all((p.grad is not None) == p.requires_grad for p in weights.values())
    return totals, {name: p.grad for name, p in weights.items() if p.grad is not None}


def joined(shares: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole network's tensors from those of one replica's stages and towers, in order."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: torch.cat([s[name] for s in shares if name in s]) for name in names}


def error(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """The largest difference, over the largest element or `least`, whichever is larger."""
    assert got.shape == want.shape
    largest = max(least, want.double().abs().max().item())
    return (got.double() - want.double()).abs().max().item() / (largest or 1.0)


def assert_same(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, least: float = 0.0
) -> None:
    """Every tensor equals its namesake, relative to its largest element or to `least`."""
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name], least) for name in want}
    assert {n: e for n, e in errors.items() if not e <= tolerance} == {}


def assert_totals(got: Totals, want: Totals, tolerance: float, least: float = 0.0) -> None:
    assert (got.images, got.wrong1, got.wrong5) == (want.images, want.wrong1, want.wrong5)
    assert abs(got.loss - want.loss) <= tolerance * max(least, abs(want.loss))
