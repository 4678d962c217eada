"""Imports run one way: workers use pipeline and datasets, these neither Ray nor each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"pipeline": {"ray", "workers", "datasets"}, "datasets": {"ray", "workers", "pipeline"}}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_run_one_way(folder: str) -> None:
    files = list((ROOT / folder).glob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & FORBIDDEN[folder], file.name


def test_pipeline_imports_where_there_is_torch_alone() -> None:
    files = (ROOT / "pipeline").glob("[a-z]*.py")
    # Triton's kernels are imported where there is Triton, and this says where not.
    names = [f"pipeline.{file.stem}" for file in files if file.stem not in ("kernels", "gpu")]
    absent = ("ray", "pyarrow", "triton")
    code = "import sys\n" + "".join(f"sys.modules[{n!r}] = None\n" for n in absent)
    code += f"import {', '.join(names)}\n"
    code += "assert 'triton' in pipeline.native.missing('cuda')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("workers.cli", {"torch", "ray", "pyarrow"}),
        ("workers.supervisor", {"torch", "ray.data", "pandas"}),
        ("workers.rank", {"ray.data", "pandas", "torch.distributed.checkpoint"}),
    ],
)
def test_nothing_is_imported_that_a_start_has_to_wait_for(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}\nassert not {absent} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_first_step_does_without_torchs_compiler() -> None:
    """Which takes as long to import as the rest of torch."""
    code = """
import sys, torch
from pipeline.network import build
from pipeline.optimizer import SGD
from pipeline.tower import Tower
from pipeline.training import Images, Trainer
network = build("alexnet-mini", 10)
tower = Tower(network, seed=0)
trainer = Trainer(tower, SGD(tower.weights(), rate=0.01), torch.zeros(64, 64, 3), seed=0)
crops, places = torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.arange(2)
trainer.step(Images(crops, places, torch.zeros(2, 3), places), 0)
assert not {"torch._dynamo", "torch.distributed.checkpoint"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
