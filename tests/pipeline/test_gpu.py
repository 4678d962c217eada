"""Steps on a GPU: those of a processor, the same bits each time, and no host that stands still."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from forms import CUDA
from ranks import assert_same, assert_totals, batch, make_trainer

from pipeline import checkpoint, host
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
@pytest.mark.parametrize("network", ["alexnet-mini", "alexnet-2012", "cifar"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 1e-3)])
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
def test_the_host_waits_for_the_gpu_once_a_step() -> None:
    table = build("alexnet-mini", 10)
    trainer = make_trainer(table, dtype=torch.float32, device="cuda")
    images = batch(table, 8).on_gpu(torch.cuda.Stream())
    trainer.step(images, 0)  # compiles, and makes the buffers of momentum
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.step(images, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in said if "synchronizing" in str(w.message)]
    assert len(waits) == 1  # for the totals


@on_gpu
def test_images_are_the_same_on_a_gpu() -> None:
    images = batch(build("cifar", 10), 5)
    there = images.on_gpu(torch.cuda.Stream())
    for name in ("crops", "labels", "shifts"):
        assert getattr(there, name).is_cuda
        assert torch.equal(getattr(there, name).cpu(), getattr(images, name))
    assert there.places is not None
    assert there.places.tolist() == list(range(5))
