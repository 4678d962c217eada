"""Steps on a GPU: those of a processor, the same bits each time, and no host that stands still."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import CUDA, GPU, WHY_NOT
from ranks import assert_same, assert_totals, batch, make_trainer, mean_image

from pipeline import NotANumber, checkpoint, host
from pipeline.network import build

on_gpu = pytest.mark.skipif(not CUDA, reason="no GPU")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def steps(device: str, precision: str, network: str) -> str:
    """The weights after three steps, hashed; in a process whose first work this is."""
    host.prepare(2, device)
    table = build(network, 10)
    trainer = make_trainer(
        table, dtype=torch.float32, compute=DTYPES[precision], rate=1e-3, device=device
    )
    for step in range(3):
        trainer.step(batch(table, 64, step), step)
    return checkpoint.sha256(trainer.tower.weights())


@pytest.mark.parametrize(
    ("device", "precision", "network"),
    [
        ("cpu", "float32", "cifar"),
        pytest.param("cuda", "float32", "alexnet-mini", marks=on_gpu),
        pytest.param("cuda", "bfloat16", "alexnet-mini", marks=on_gpu),
        pytest.param("cuda", "bfloat16", "alexnet-2012", marks=on_gpu),
    ],
)
def test_steps_give_the_same_bits_in_every_process(
    device: str, precision: str, network: str
) -> None:
    code = f"import test_gpu; print(test_gpu.steps({device!r}, {precision!r}, {network!r}))"
    here = Path(__file__).parent
    paths = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]\n"
    runs = [
        subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True)
        for _ in range(2)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert len(runs[0].stdout) == 65
    assert runs[0].stdout == runs[1].stdout


@on_gpu
@pytest.mark.parametrize(
    ("network", "precision", "tolerance"),
    [
        ("alexnet-mini", "float64", 1e-10),
        ("alexnet-2012", "float64", 1e-10),  # whose maxima float32 rounding turns round
        ("cifar", "float64", 1e-10),
        ("alexnet-mini", "float32", 1e-3),
        ("cifar", "float32", 1e-3),
    ],
)
def test_gradients_are_those_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, network: str, precision: str, tolerance: float
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    table, dtype = build(network, 10), DTYPES[precision]
    found = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(table, dtype=dtype, microbatches=2, device=device)
        totals = trainer.gradients(batch(table, 8), 7)
        weights = trainer.tower.weights()
        found.append((totals, {n: p.grad.cpu() for n, p in weights.items() if p.grad is not None}))
    assert_totals(found[1][0], found[0][0], tolerance)
    assert_same(found[1][1], found[0][1], tolerance)


@on_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_replayed_steps_are_those_worked_through(precision: str, microbatches: int) -> None:
    host.same_bits()
    table = build("alexnet-mini", 10)
    found = []
    for replayed in (True, False):
        trainer = make_trainer(
            table,
            dtype=torch.float32,
            compute=DTYPES[precision],
            rate=1e-3,
            microbatches=microbatches,
            device="cuda",
        )
        if not replayed:
            trainer.graph = None
        sizes = (16, 16, 16, 9, 16, 16, 9, 16)  # an epoch's last batch is smaller
        totals = [trainer.step(batch(table, n, step), step) for step, n in enumerate(sizes)]
        found.append((totals, checkpoint.sha256(trainer.tower.weights())))
    assert found[0] == found[1]


@on_gpu
def test_a_step_that_is_none_changes_nothing() -> None:
    table = build("cifar", 10)
    trainer = make_trainer(table, dtype=torch.float32, device="cuda")
    good, bad = batch(table, 8), batch(table, 8)
    bad.shifts[0] = torch.inf
    for step in range(3):
        trainer.step(good, step)
    before = checkpoint.sha256(trainer.tower.weights()), trainer.optimizer.momenta()
    momenta = [m.clone() for m in before[1].values()]
    with pytest.raises(NotANumber):
        trainer.step(bad, 3)
    assert checkpoint.sha256(trainer.tower.weights()) == before[0]
    for now, then in zip(trainer.optimizer.momenta().values(), momenta, strict=True):
        assert torch.equal(now, then)


@on_gpu
@pytest.mark.parametrize("replayed", [True, False])
def test_the_host_never_waits_within_a_step(replayed: bool) -> None:
    table = build("alexnet-mini", 10)
    trainer = make_trainer(table, dtype=torch.float32, device="cuda")
    if not replayed:
        trainer.graph = None
    images = batch(table, 8).on_gpu(torch.cuda.Stream())
    for step in range(3):  # compiles, makes the buffers of momentum, records
        trainer.step(images, step)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.step(images, 3)  # the wait for the totals, at its end, is for an event
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [str(w.message) for w in said if "synchronizing" in str(w.message)] == []


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_the_kernel_makes_pixels_as_torch_does() -> None:
    kernels: Any = import_module("pipeline.gpu")
    images, mean = batch(build("cifar", 10), 5), mean_image(build("cifar", 10))
    args = [t.to(GPU.device) for t in (images.crops, images.shifts, mean)]
    got = kernels.pixels(*args, 1 / 64, torch.float32)
    want = (images.shifts[:, None, None] - mean + images.crops) * (1 / 64)
    assert torch.equal(got.cpu(), want)


@on_gpu
def test_images_are_the_same_on_a_gpu() -> None:
    images = batch(build("cifar", 10), 5)
    there = images.on_gpu(torch.cuda.Stream())
    for name in ("crops", "labels", "shifts"):
        assert getattr(there, name).is_cuda
        assert torch.equal(getattr(there, name).cpu(), getattr(images, name))
    assert there.places is not None
    assert there.places.tolist() == list(range(5))
