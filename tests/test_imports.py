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
        ("workers.towers", {"ray.data", "pandas", "torch.distributed.checkpoint"}),
        ("workers.feed", {"torch", "ray.data", "pandas"}),  # towers have a handle of it
    ],
)
def test_nothing_is_imported_that_a_start_has_to_wait_for(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}\nassert not {absent} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
