"""A training step of `alexnet` against the same network in plain torch modules, on the same cores
or GPU.

    python benchmarks/step.py [--batch 128] [--steps 3] [--turns 2] [--only WORD] [--device cuda]
                              [--json FILE]

Needs torch and NumPy alone (`PYTHONPATH=.` where Towers is not installed). Each row is a fresh
process, because an allocator's settings are a process's; all rows take turns, and the best turn of
each counts:

- "plain": torch.nn's grouped convolutions, LocalResponseNorm (within each column), CrossEntropyLoss
  and torch.optim.SGD, sixteen bits by autocast; as people run it, with Towers' allocator settings,
  and compiled; in both layouts, of which the better counts.
- "towers": this project's step in one process with a thread a core, and as two towers in two
  processes with half of them each; and without LRN, the bound to close in on.

MFU is the share of a matrix product's rate measured in the same process just before. On a GPU
images lie in its memory already, as the stream brings them; plain modules have cuDNN try its
algorithms out, Towers takes those that give the same bits, and "same bits" says whether two
processes did. Where a processor cannot multiply bfloat16, plain modules take minutes for a step
and are left out, and the product is one of float32; so are compiled ones without a compiler, which
is said, as our own normalisation has none then either. `--memory` lists what a step keeps for
backward instead; operations.py times what it consists of.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from table import cores as cores_here
from table import publish
from torch import Tensor, nn

from pipeline import checkpoint, host, native
from pipeline.crossing import Pair
from pipeline.network import Network, build
from pipeline.optimizer import SGD
from pipeline.products import lacks_bfloat16, wide
from pipeline.tower import Tower
from pipeline.training import Images, Trainer

CLASSES = 1000
FIRST = 3  # steps before any is timed: the first one compiles
PEER, KEPT = "as people run it", "our allocator settings"
Made = tuple[Callable[[int], Any], Trainer | None]
"""What takes a step of a number, and whose it is."""


class Plain(nn.Module):
    """The paper's network as one writes it with torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, 4, 2)
        self.conv2 = nn.Conv2d(96, 256, 5, 1, 2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, 3, 1, 1)
        self.conv4 = nn.Conv2d(384, 384, 3, 1, 1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, 1, 1, groups=2)
        self.lrn = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # it divides by 5
        self.fc6, self.fc7 = nn.Linear(9216, 4096), nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, CLASSES)
        self.pool, self.dropout = nn.MaxPool2d(3, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = F.relu(conv(x))
            n, maps, side, _ = x.shape
            x = self.lrn(x.reshape(2 * n, maps // 2, side, side)).reshape(n, maps, side, side)
            x = self.pool(x)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = self.pool(F.relu(self.conv5(x))).flatten(1)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.dropout(F.relu(self.fc7(x)))
        return self.fc8(x)


def images(batch: int, crop: int, device: str) -> Images:
    """A batch of noise, on a GPU as the stream brings it there."""
    draw = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (batch, crop, crop, 3), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, CLASSES, (batch,), generator=draw)
    made = Images(crops, labels, torch.zeros(batch, 3))
    return made.on_gpu(torch.cuda.Stream()) if device == "cuda" else made


def plain(case: dict[str, Any]) -> Made:
    """The peer."""
    last = case["layout"] == "channels-last"
    layout = torch.channels_last if last else torch.contiguous_format
    device = case["device"]
    torch.backends.cudnn.benchmark = True
    model: Any = Plain().to(device).to(memory_format=layout)  # type: ignore[call-overload]
    if case.get("compiled"):
        model = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
    criterion, batch = nn.CrossEntropyLoss(), images(case["batch"], 224, device)
    labels = batch.labels
    half = case["precision"] == "bfloat16"

    def step(_: int) -> None:
        x = batch.crops.permute(0, 3, 1, 2).float() - 120.0
        x = x.contiguous(memory_format=layout)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = criterion(model(x), labels)
        loss.backward()
        optimizer.step()

    return step, None


def trainer(case: dict[str, Any], network: Network) -> Trainer:
    """This process's tower, or the whole network."""
    towers, tower, pair = case.get("towers", 1), case.get("tower", 0), None
    if towers == 2:
        torch.distributed.init_process_group(
            "gloo", init_method=case["store"], rank=tower, world_size=2
        )
        assert torch.distributed.group.WORLD
        pair = Pair(torch.distributed.group.WORLD)
    share = Tower(
        network, seed=0, towers=towers, tower=tower, compute=getattr(torch, case["precision"])
    ).to(case["device"])
    mean = torch.full((network.crop, network.crop, 3), 120.0)
    return Trainer(share, SGD(share.weights(), rate=0.001), mean, seed=0, pair=pair)


def towers(case: dict[str, Any]) -> Made:
    """Ours."""
    network = build("alexnet", CLASSES, lrn=case.get("lrn", True))
    ours, batch = trainer(case, network), images(case["batch"], network.crop, case["device"])
    return lambda step: ours.step(batch, step), ours


def gemm_rate(precision: str, device: str) -> float:
    """Floating-point operations a second of a product of square matrices, the best of some; on a
    GPU in TF32 for float32, as its convolutions are.
    """
    side, times = (2048, 10) if device == "cpu" else (8192, 50)
    a = wide(torch.randn(side, side, device=device).to(getattr(torch, precision)))
    torch.backends.cuda.matmul.allow_tf32 = True
    seconds = min(timing(lambda: a @ a) for _ in range(times))
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * side**3 / seconds


def timing(job: Callable[[], Any]) -> float:
    """Seconds until a job is done, by a GPU too."""
    _ready()
    start = time.perf_counter()
    job()
    _ready()
    return time.perf_counter() - start


def _ready() -> None:
    """A GPU has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def work(network: Network) -> int:
    """Operations of an image's step: a multiply-add is two, backward is twice the forward but for
    the first layer, whose input needs no gradient.
    """
    costs = [network.multiply_adds(index) for index in range(len(network.layers))]
    return 2 * (3 * sum(costs) - costs[0])


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Runs one case in this process."""
    threads = max(1, case["cores"] // case.get("towers", 1))
    device, peer = case["device"], case["name"] == "plain"
    if case.get("allocator", True):
        host.prepare(threads, "cpu" if peer else device)
    torch.set_num_threads(threads)
    rate = gemm_rate(case["precision"], device)
    found = [timed({**case, "layout": layout}) for layout in case["layouts"]]
    if "images/s" not in found[0]:
        return found[0]
    best = max(found, key=lambda one: float(one["images/s"]))
    network = build("alexnet", CLASSES)
    mfu = best["images/s"] * work(network) / (rate * case.get("towers", 1))
    return {**best, "GEMM GFLOP/s": rate / 1e9, "MFU": mfu}


def timed(case: dict[str, Any]) -> dict[str, Any]:
    """The rate of one case in one layout; on a GPU the weights after the first steps too, and no
    more than those if no step is to be timed.
    """
    gpu, found = case["device"] == "cuda", {"layout": case["layout"]}
    if case.get("compiled"):
        torch.compiler.reset()  # or the second layout is taken for a change of shapes
    step, ours = (plain if case["name"] == "plain" else towers)(case)
    for first in range(FIRST):
        step(first)
    if gpu and ours:
        found["weights"] = checkpoint.sha256(ours.tower.weights())
    if not case["steps"]:
        return found
    # A GPU is asked for many steps at a time, and for a second before that, which wakes its clocks.
    start, many = time.perf_counter(), 10 if gpu else 1
    while gpu and time.perf_counter() - start < 1:
        timing(lambda: step(FIRST))
    turns = [timing(lambda: [step(FIRST) for _ in range(many)]) for _ in range(case["steps"])]
    return {**found, "images/s": case["batch"] * many / min(turns)}


def spawn(case: dict[str, Any]) -> dict[str, Any] | None:
    """Runs one case in a process of its own, or its two towers in two; None if one failed."""
    count = case.get("towers", 1)
    store = f"file:///tmp/towers-step-{os.getpid()}-{time.monotonic_ns()}"
    ranks = []
    for tower in range(count):
        one = json.dumps({**case, "tower": tower, "store": store})
        command = [sys.executable, __file__, "--case", one]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    answers = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        return None
    return dict(json.loads(answers[0].splitlines()[-1]))


def cases(batch: int, steps: int, cores: int, device: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows, each with what to run; rows of one name are layouts, of which the best counts."""
    found: list[tuple[str, dict[str, Any]]] = []
    common = {"batch": batch, "steps": steps, "cores": cores, "device": device}
    kinds: list[tuple[str, dict[str, Any]]] = [
        (PEER, {"allocator": False}),
        (KEPT, {}),
        (f"{KEPT}, compiled", {"compiled": True}),
    ]
    if device != "cpu":  # an allocator has no such settings, and two processes no device each
        kinds = [(PEER, {}), (f"{PEER}, compiled", {"compiled": True})]
    if native.missing(device):  # nothing can be compiled
        kinds.pop()
    both = ["channels-first", "channels-last"]
    # A process each where its allocator may matter, and one for both on a GPU: it starts slowly.
    apart = [[layout] for layout in both] if device == "cpu" else [both]
    last = common["layouts"] = ["channels-last"]
    for precision in ("float32", "bfloat16"):
        base = {**common, "precision": precision}
        slow = device == "cpu" and precision == "bfloat16" and lacks_bfloat16()
        for kind, more in [] if slow else kinds:
            # To compile takes a GPU's host half a minute; channels-last is the better one there.
            for layouts in [last] if device != "cpu" and "compiled" in more else apart:
                name = f"plain {precision}, {kind}"
                found.append((name, {**base, "name": "plain", "layouts": layouts, **more}))
        found.append((f"towers {precision}", {**base, "name": "towers"}))
        if device == "cpu":
            two = {**base, "name": "towers", "towers": 2}
            found.append((f"towers {precision}, two processes", two))
        found.append((f"towers {precision}, no LRN", {**base, "name": "towers", "lrn": False}))
    return found


def kept(batch: int, precision: str) -> list[dict[str, Any]]:
    """The tensors that forward keeps for backward, by size; weights apart."""
    network = build("alexnet", CLASSES)
    ours = trainer({"precision": precision, "device": "cpu"}, network)
    weights = {p.untyped_storage().data_ptr() for p in ours.tower.parameters()}
    seen: dict[int, dict[str, Any]] = {}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in weights:
            row = {"tensor": str(list(x.shape)), "dtype": str(x.dtype).removeprefix("torch.")}
            seen.setdefault(place, {**row, "MiB": x.untyped_storage().nbytes() / 2**20})
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ours.gradients(images(batch, network.crop, "cpu"), 0)
    rows = sorted(seen.values(), key=lambda row: -row["MiB"])
    return [*rows, {"tensor": "all", "MiB": sum(row["MiB"] for row in rows)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="timed, of which the best counts")
    parser.add_argument("--turns", type=int, default=2, help="of all rows")
    parser.add_argument("--only", default="", help="rows whose name has this")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", action="store_true", help="what a step keeps for backward")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    if options.memory:
        publish("kept for backward", kept(options.batch, "float32"), options.json)
        return
    cores = cores_here()
    best: dict[str, dict[str, Any]] = {}
    failed = set()
    if why := native.missing(options.device):
        print(f"nothing is compiled: {why}", file=sys.stderr)
    rows = cases(options.batch, options.steps, cores, options.device)
    for name, case in [row for row in rows if options.only in row[0]] * options.turns:
        found = spawn(case)
        if not found:
            failed.add(name)
            continue
        weights = found.pop("weights", None)
        if weights and case.get("lrn", True) and name not in best:
            again = spawn({**case, "steps": 0})
            found["same bits"] = again is not None and again["weights"] == weights
        print(f"{name}, {found['layout']}: {found['images/s']:.1f} images/s", file=sys.stderr)
        if name not in best or found["images/s"] > best[name]["images/s"]:
            best[name] = {**best.get(name, {}), "step": name, **found}
    for name, row in best.items():
        precision = "bfloat16" if "bfloat16" in name else "float32"
        for column, against in (
            ("to plain", f"plain {precision}, {PEER}"),
            ("with our allocator", f"plain {precision}, {KEPT}"),
            ("to plain float32", f"plain float32, {PEER}"),
            ("to no LRN", f"towers {precision}, no LRN"),
        ):
            if against in best:
                row[column] = row["images/s"] / best[against]["images/s"]
        peers = [best[peer]["images/s"] for peer in best if peer.startswith(f"plain {precision}")]
        if peers:
            row["to the best plain"] = row["images/s"] / max(peers)
    where = f"{cores} cores" if options.device == "cpu" else torch.cuda.get_device_name()
    publish(f"alexnet, batch {options.batch}, {where}", list(best.values()), options.json)
    if failed:
        raise SystemExit(f"failed: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
