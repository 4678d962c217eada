"""The forms that operations of `native` have: a processor's, a GPU's and torch's own.

Without a GPU its kernels run on the CPU, by Triton's interpreter, if there is Triton.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from pipeline import native

CUDA = torch.cuda.is_available()
if CUDA:  # read at the first product of matrices
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Form:
    """`kernels` stands for that of `native`; `rounding` is the most for 16 bits, in epsilons."""

    name: str
    device: str
    kernels: Callable[..., native.Kernels | None]
    rounding: float = 0.505

    @contextmanager
    def used(self) -> Iterator[None]:
        """Operations take this form."""
        before = torch.are_deterministic_algorithms_enabled()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "kernels", self.kernels)
            torch.use_deterministic_algorithms(True)  # or torch's own pooling is the fallback
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(before)


def _gpu() -> Form:
    if CUDA or not find_spec("triton"):
        return Form("gpu", "cuda", native.kernels)
    os.environ["TRITON_INTERPRET"] = "1"  # heard when kernels are defined, and when they run
    kernels: native.Kernels = import_module("pipeline.kernels")  # type: ignore[assignment]

    def of(x: torch.Tensor, maps: int, size: int = 1) -> native.Kernels | None:
        return kernels if x.dtype != torch.float64 and size <= 17 else None

    return Form("interpreter", "cpu", of, 1.01)  # which cuts bits off instead of rounding


EXAMPLES = 10 if CUDA else 60  # a GPU's kernels are compiled for each, which takes a second
PROCESSOR = Form("processor", "cpu", native.kernels)
TORCH = Form("torch", "cuda" if CUDA else "cpu", lambda *_: None)
GPU = _gpu()

WHY_NOT = native.missing("cuda") if CUDA else "" if GPU.device == "cpu" else "no GPU, no Triton"
COMPILED = [
    pytest.param(
        PROCESSOR,
        marks=pytest.mark.skipif(bool(native.missing()), reason=native.missing()),
        id=PROCESSOR.name,
    ),
    pytest.param(GPU, marks=pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), id=GPU.name),
]
FORMS = [*COMPILED, pytest.param(TORCH, id=TORCH.name)]
