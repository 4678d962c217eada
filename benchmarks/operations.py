"""What a training step of `alexnet` consists of, one by one: convolutions, LRN and pooling.

    python benchmarks/operations.py [--batch 128] [--precision bfloat16] [--device cuda] [--json F]

Needs torch alone. Forward and backward of each by itself, as one process with both towers runs it.
"share" is of the rate of a matrix product for a convolution, and of the bytes a second of a large
copy for what else reads its input and writes its output once, both measured just before; at the end
a whole step. Operations by themselves need a batch that keeps a GPU busy for longer than the host
takes to ask: 512, say.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from step import CLASSES, FIRST, gemm_rate, images, timing, trainer
from table import publish
from torch import Tensor

from pipeline import host
from pipeline.network import build
from pipeline.normalization import normalize
from pipeline.pooling import max_pool
from pipeline.tower import Tower


def copy_rate(device: str) -> float:
    """Bytes a second that a large copy reads and writes, the best of ten."""
    a = torch.ones(1 << (26 if device == "cpu" else 28), device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timing(lambda: b.copy_(a)) for _ in range(10))


def seconds(job: Callable[[], Any], device: str) -> float:
    """Of a job, the best of some turns after a first one; a GPU does it many times in each."""
    many = 1 if device == "cpu" else 20
    turns = [timing(lambda: [job() for _ in range(many)]) for _ in range(4)]
    return min(turns[1:]) / many


def measure(batch: int, precision: str, device: str) -> list[dict[str, Any]]:
    """A row an operation, and at the end convolutions together and the two rates."""
    dtype = getattr(torch, precision)
    network = build("alexnet", CLASSES)
    blocks = Tower(network, seed=0, compute=dtype).to(device).blocks
    rates = {"GFLOP": gemm_rate(precision, device) / 1e9, "GB": copy_rate(device) / 1e9}
    rows: list[dict[str, Any]] = []

    def both(name: str, unit: str, work: list[float], job: Any, *read: Tensor) -> Tensor:
        """Rows of a job's forward, and of its backward to those of `read` that need gradients."""
        made: Tensor = job(*read)
        grad, wanted = torch.randn_like(made), [t for t in read if t.requires_grad]
        with torch.no_grad():
            forward = seconds(lambda: job(*read), device)
        backward = seconds(
            lambda: torch.autograd.grad(made, wanted, grad, retain_graph=True), device
        )
        for way, amount, time in zip(("", "'s backward"), work, (forward, backward), strict=True):
            share = amount / time / rates[unit]
            rows.append({"operation": name + way, "ms": time * 1e3, unit: amount, "share": share})
        return made.detach().requires_grad_()

    for index, layer in enumerate(network.layers):
        if layer.kind != "conv":
            continue
        block: Any = blocks[layer.name]
        shape = network.inputs(index)
        x = torch.randn(batch, shape.maps, shape.side, shape.side, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(index > 0)
        weight, bias = (p.detach().to(dtype).requires_grad_() for p in (block.weight, block.bias))
        work = 2e-9 * batch * network.multiply_adds(index)
        conv = lambda x, w, b, block=block: block._conv(x, w, b, None)  # noqa: E731
        x = both(layer.name, "GFLOP", [work, work * (1 + (index > 0))], conv, x, weight, bias)
        for norm in layer.norms:
            lrn = lambda x, norm=norm, block=block: normalize(x, norm, block.columns, True)  # noqa: E731
            x = both(f"{layer.name} LRN", "GB", [2e-9 * x.nbytes, 3e-9 * x.nbytes], lrn, x)
        if layer.pool:
            pool = lambda x, pool=layer.pool: max_pool(x, pool)  # noqa: E731
            y = pool(x)
            moved = 1e-9 * (x.nbytes + y.nbytes + y.numel())  # a byte for each maximum
            both(f"{layer.name} pooling", "GB", [moved] * 2, pool, x)
    convolutions = [row for row in rows if "GFLOP" in row]
    ms, work = (sum(row[key] for row in convolutions) for key in ("ms", "GFLOP"))
    share = work / ms * 1e3 / rates["GFLOP"]
    rows.append({"operation": "convolutions", "ms": ms, "GFLOP": work, "share": share})
    rows += steps(batch, precision, device)
    rows += [{"operation": "a product, a second", "GFLOP": rates["GFLOP"]}]
    return [*rows, {"operation": "a copy, a second", "GB": rates["GB"]}]


def steps(batch: int, precision: str, device: str) -> list[dict[str, Any]]:
    """A whole step; on a GPU also as its host asks for each kernel."""
    case = {"precision": precision, "device": device}
    ours, rows = trainer(case, build("alexnet", CLASSES)), []
    one = images(batch, ours.tower.network.crop, device)
    for name in ("a step", "a step, not recorded") if ours.graph else ("a step",):
        if name != "a step":
            ours.graph = None
        for first in range(FIRST):
            ours.step(one, first)
        rows.append({"operation": name, "ms": seconds(lambda: ours.step(one, FIRST), device) * 1e3})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host.prepare(cores or 1, options.device)
    rows = measure(options.batch, options.precision, options.device)
    where = f"{cores} cores" if options.device == "cpu" else torch.cuda.get_device_name()
    publish(f"alexnet {options.precision}, batch {options.batch}, {where}", rows, options.json)


if __name__ == "__main__":
    main()
