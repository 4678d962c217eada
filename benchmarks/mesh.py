"""What the mesh costs: two towers against one process, pipeline bubbles, checkpoints on the side.

    python benchmarks/mesh.py [--batch 128] [--steps 5] [--turns 3]

Needs torch and NumPy alone. Everything runs with two threads in one run (`taskset -c 0,1` on a
machine of more cores):

- `alexnet` in two tower processes of a thread each against one process of two threads, in turns;
  and the share of a step that a tower stands still for the other.
- The idle share of two pipeline stages of equal cost under 1F1B, against (S - 1) / (M + S - 1).
- How long training stands still for a checkpoint of `alexnet` that is written in the background,
  and how much longer the step beside it takes, against writing it synchronously.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeline import checkpoint, host
from pipeline.crossing import Pair
from pipeline.mesh import Mesh
from pipeline.network import Layer, Network, Pool, build
from pipeline.optimizer import SGD
from pipeline.stages import cut
from pipeline.tower import Tower
from pipeline.tracing import Span, idle_fraction
from pipeline.training import Images, Trainer


def spread(job: Callable[..., Any], mesh: Mesh, threads: int, *arguments: Any) -> list[Any]:
    """What job(mesh, ...) returns on each rank, each a fresh process."""
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp()
    answers = context.Queue()
    call = (job, mesh, threads, f"file://{folder}/store", answers, arguments)
    ranks = [
        context.Process(target=_rank, args=(rank, *call), daemon=True) for rank in range(mesh.size)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        try:
            found |= [answers.get(timeout=1)]
        except queue.Empty:
            if any(process.exitcode for process in ranks):
                sys.exit("a rank failed")
    for process in ranks:
        process.join()
    shutil.rmtree(folder, ignore_errors=True)
    return [found[rank] for rank in range(mesh.size)]


def _rank(
    rank: int,
    job: Callable[..., Any],
    mesh: Mesh,
    threads: int,
    store: str,
    answers: Any,
    arguments: tuple[Any, ...],
) -> None:
    host.prepare(threads)
    if mesh.size > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=mesh.size)
    answers.put((rank, job(mesh, *arguments)))
    if mesh.size > 1:
        dist.destroy_process_group()


def make(network: Network, mesh: Mesh, **options: Any) -> tuple[Trainer, Any]:
    """This rank's trainer and the process groups."""
    _, stage, tower = mesh.place(dist.get_rank() if mesh.size > 1 else 0)
    groups = mesh.groups("cpu")
    part = Tower(
        network,
        seed=0,
        towers=mesh.towers,
        tower=tower,
        layers=cut(network, mesh.stages)[stage],
    )
    trainer = Trainer(
        part,
        SGD(part.weights(), rate=0.001),
        torch.full((network.crop, network.crop, 3), 120.0),
        seed=0,
        pair=Pair(groups.get_group("tower")) if groups and mesh.towers == 2 else None,
        line=mesh.line(groups, 300.0),
        **options,
    )
    return trainer, groups


def batch(network: Network, n: int) -> Images:
    """Noise with labels."""
    draw = torch.Generator().manual_seed(0)
    shape = (n, network.crop, network.crop, 3)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, network.classes, (n,), generator=draw)
    return Images(crops, labels, torch.zeros(n, 3), torch.arange(n))


def step_times(mesh: Mesh, n: int, steps: int) -> tuple[list[float], float]:
    """Seconds of each step of alexnet, and the share of them that this rank waited for its pair."""
    network = build("alexnet", 1000)
    trainer, _ = make(network, mesh)
    images = batch(network, n)
    for warm in range(2):
        trainer.step(images, warm)
    waited = trainer.pair.waited if trainer.pair else 0.0
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        trainer.step(images, step)
        seconds.append(time.perf_counter() - start)
    waited = (trainer.pair.waited if trainer.pair else 0.0) - waited
    return seconds, waited / sum(seconds)


def equal_stages() -> Network:
    """Convolutions of which the first five cost as much as the rest, with pooling in between: as in
    AlexNet, little has to cross a cut for the work on either side.
    """

    def conv(number: int, maps: int, pool: Pool | None = None) -> Layer:
        return Layer(f"conv{number}", "conv", maps, 3, 1, (1, 1), std=0.05, pool=pool)

    layers = [conv(i, 64) for i in range(4)] + [conv(4, 64, Pool(2, 2))]
    layers += [conv(i, 128) for i in range(5, 9)] + [conv(9, 64)]
    layers.append(Layer("last", "full", 10, activation=None))
    return Network("equal", 32, 1, tuple(layers))


def spans(mesh: Mesh, microbatches: int, steps: int) -> list[Span]:
    """What this rank did in some steps, once warm."""
    trainer, _ = make(equal_stages(), mesh, microbatches=microbatches)
    images = batch(trainer.tower.network, 32 * microbatches)
    for step in range(steps + 2):
        trainer.trace.on, trainer.trace.step = step >= 2, step
        trainer.step(images, step)
    return trainer.trace.spans


def checkpoint_times(mesh: Mesh, repeat: int) -> tuple[list[float], ...]:
    """Seconds to write a checkpoint of alexnet, those that training stands still for one in the
    background, and those that the step beside it takes longer than one by itself.
    """
    network = build("alexnet", 1000)
    trainer, groups = make(network, mesh)
    trainer.step(batch(network, 4), 0)
    folder = tempfile.mkdtemp()
    writer = checkpoint.Writer(groups)
    written, stood, longer = [], [], []
    images = batch(network, 16)
    for turn in range(repeat + 1):
        state = trainer.tower, trainer.optimizer, {"step": turn}
        if groups:
            dist.barrier()
        start = time.perf_counter()
        checkpoint.save(f"{folder}/{turn}", *state, groups)
        written.append(time.perf_counter() - start)
        shutil.rmtree(f"{folder}/{turn}", ignore_errors=True)
        if groups:
            dist.barrier()
        start = time.perf_counter()
        trainer.step(images, turn)
        alone = time.perf_counter() - start
        before, start = writer.stood, time.perf_counter()
        writer.save(f"{folder}/{turn}", *state)
        trainer.step(images, turn)
        longer.append(time.perf_counter() - start - alone)
        stood.append(writer.stood - before)
        writer.finish()
        shutil.rmtree(f"{folder}/{turn}", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    return written[1:], stood[1:], longer[1:]  # the first is to warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()

    one, two, waited = [], [], []
    for _ in range(args.turns):
        one += spread(step_times, Mesh(towers=1), 2, args.batch, args.steps)[0][0]
        pair = spread(step_times, Mesh(), 1, args.batch, args.steps)
        two += [max(times) for times in zip(*(seconds for seconds, _ in pair), strict=True)]
        waited += [share for _, share in pair]
    rates = [args.batch / statistics.median(seconds) for seconds in (one, two)]
    print(f"alexnet, float32, batch {args.batch}, images a second:")
    print(f"  one process, two threads   {rates[0]:6.1f}")
    print(f"  two towers, a thread each  {rates[1]:6.1f}   ratio {rates[1] / rates[0]:.2f}")
    print(f"  a tower stands still for the other {statistics.median(waited):.1%} of a step")

    print("two equal stages under 1F1B, idle share of a step, and (S - 1) / (M + S - 1):")
    for m in (1, 2, 4, 8):
        ranks = spread(spans, Mesh(stages=2, towers=1), 1, m, 8)
        steps = sorted({span.step for rank in ranks for span in rank})
        idle = statistics.median(idle_fraction(ranks, step) for step in steps)
        print(f"  {m} micro-batches  {idle:6.1%}  {1 / (m + 1):6.1%}")

    pair = spread(checkpoint_times, Mesh(), 1, 4)
    medians = (max(statistics.median(rank[i]) for rank in pair) for i in range(3))
    written, stood, longer = medians
    print("a checkpoint of alexnet with momentum, two towers:")
    print(f"  written synchronously        {written * 1e3:7.0f} ms")
    print(f"  training stands still for it {stood * 1e3:7.0f} ms   {stood / written:.1%}")
    print(f"  the step beside it is longer {longer * 1e3:7.0f} ms   {longer / written:.1%}")


if __name__ == "__main__":
    main()
