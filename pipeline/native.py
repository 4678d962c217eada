"""The compiled code of this folder: for a processor C++ (`kernels.cpp`), compiled once a machine by
its own compiler and kept in a cache; for a GPU Triton (`kernels.py`, `gpu.py`), which has its own.

Where it cannot be had callers do the same mathematics in torch, slower; `missing()` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.network import Norm

_SOURCE = Path(__file__).with_name("kernels.cpp")
# Square roots that set no errno are vectors; nothing else of -ffast-math, which loses NaNs.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-fPIC", "-shared", "-fopenmp"]
_SECONDS = 120  # a compiler that needs more is stuck

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_FUNCTIONS = {
    "lrn": [_POINTER] * 3 + [_LONG] + [_INT] * 2 + [_FLOAT] * 2 + [_INT] * 4,
    "pool_forward": [_POINTER] * 3 + [_LONG, _POINTER, _INT, _INT],
    "pool_backward": [_POINTER] * 3 + [_LONG, _POINTER, _INT, _INT],
}
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


Form = tuple[int, ...]
"""Of a pooling: maps, height and width of what it reads, size and stride of its windows, rows and
columns of what it makes."""


class Kernels(Protocol):
    """Functions of channels-last tensors on one device, all of one dtype, computed in float32."""

    def lrn(
        self, x: Tensor, grad: Tensor | None, out: Tensor, maps: int, norm: Norm, rectify: bool
    ) -> None:
        """Normalises rows of `maps` elements that lie end to end: `out` is the normalised x, or
        with `grad` the gradient of x. Beta is 1/2, 3/4 or 1.
        """

    def pool_forward(self, x: Tensor, y: Tensor, place: Tensor, form: Form) -> None:
        """The maxima of x, and the place in its window of each (uint8); ties go to the first, and
        not-a-number wins.
        """

    def pool_backward(self, grad: Tensor, place: Tensor, out: Tensor, form: Form) -> None:
        """The gradient of x of that `form`: sums are in the order of their windows."""


class GpuKernels(Protocol):
    """Those of a GPU alone, where torch would launch several for each, or slow ones."""

    def keep_mask(
        self, rows: Tensor, start: int, units: int, width: int, draw: Tensor, bar: int
    ) -> Tensor:
        """`randomness.keep_mask` with the key in the GPU's memory (int64 []), where a recorded step
        finds another one each time; of draws not under `bar` of 2^24.
        """

    def pixels(
        self, crops: Tensor, shifts: Tensor, mean: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        """(crops + shifts - mean) * scale in float32, [n, height, width, 3] of `dtype`."""

    def fold(self, x: Tensor, out: Tensor, side: int, before: int) -> None:
        """`convolution.fold` of a channels-last x into such an `out`."""

    def sum_rows(self, x: Tensor, maps: int) -> Tensor:
        """Of rows of `maps` elements that lie end to end, in float32 and always the same order."""


def kernels(x: Tensor, maps: int, size: int = 1) -> Kernels | None:
    """The functions for tensors like x, with rows of so many maps and windows over `size` of them;
    None where there are none, or none that can.
    """
    kind = x.device.type
    # What a row's part in the first-level cache, or a thread's registers, can hold.
    fits = maps <= 512 and size <= 33 if kind == "cpu" else size <= 17
    return _load(kind)[0] if fits and x.dtype in _DTYPES.get(kind, ()) else None


def gpu_kernels() -> GpuKernels | None:
    """Those of a GPU alone, None where there are none."""
    return import_module("pipeline.gpu") if _load("cuda")[0] else None


def missing(kind: str = "cpu") -> str:
    """Why there is no compiled code for a kind of device, in half a line; "" where there is."""
    return _load(kind)[1]


@cache
def _load(kind: str) -> tuple[Kernels | None, str]:
    if os.environ.get("TOWERS_NATIVE") == "0":
        return None, "TOWERS_NATIVE is 0"
    return _load_library() if kind == "cpu" else _load_triton(kind)


def _load_triton(kind: str) -> tuple[Kernels | None, str]:
    try:
        found: Kernels = import_module("pipeline.kernels")
        x = torch.ones(1, 8, 1, 1, device=kind)
        found.lrn(x, None, torch.empty_like(x), 8, Norm(), False)
    except Exception as error:  # of the import, a compiler or a driver: whatever it is
        said = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"Triton failed: {said[0]}"
    return found, ""


class _Library:
    """The functions of kernels.cpp."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, types in _FUNCTIONS.items():
            getattr(self._library, name).argtypes = types
            getattr(self._library, name).restype = None

    def lrn(
        self, x: Tensor, grad: Tensor | None, out: Tensor, maps: int, norm: Norm, rectify: bool
    ) -> None:
        places = (x.data_ptr(), None if grad is None else grad.data_ptr(), out.data_ptr())
        window, quarters = norm.size // 2 * 2 + 1, round(4 * norm.beta)
        how = (maps, window, norm.k, norm.alpha, quarters, rectify, x.dtype == torch.bfloat16)
        self._library.lrn(*places, x.numel() // maps, *how, torch.get_num_threads())

    def pool_forward(self, x: Tensor, y: Tensor, place: Tensor, form: Form) -> None:
        self._pool("pool_forward", (x, y, place), form)

    def pool_backward(self, grad: Tensor, place: Tensor, out: Tensor, form: Form) -> None:
        self._pool("pool_backward", (grad, place, out), form)

    def _pool(self, name: str, tensors: tuple[Tensor, ...], form: Form) -> None:
        places = (x.data_ptr() for x in tensors)
        shape = (ctypes.c_int * len(form))(*form)
        half = tensors[0].dtype == torch.bfloat16
        run = getattr(self._library, name)
        run(*places, len(tensors[0]), shape, half, torch.get_num_threads())


def _load_library() -> tuple[Kernels | None, str]:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not compiler:
        return None, "no C++ compiler (c++, g++, clang++ or $CXX)"
    try:
        return _Library(_built(compiler)), ""
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} failed: {said.strip().splitlines()[0] if said.strip() else error}"


def _built(compiler: str) -> Path:
    """The library for this source, compiler and processor, compiled if it is not in the cache."""
    command = [*compiler.split(), *_FLAGS, *_openmp()]
    # A home directory may be shared by machines whose processors differ.
    parts = [_SOURCE.read_text(), *command, _processor()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = _cache() / f"kernels-{name}.so"
    if not library.exists():
        handle, fresh = tempfile.mkstemp(suffix=".so", dir=library.parent)
        os.close(handle)
        try:
            subprocess.run(
                [*command, str(_SOURCE), "-o", fresh],
                check=True,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            os.replace(fresh, library)  # whole or not at all, whoever else compiles it now
        finally:
            Path(fresh).unlink(missing_ok=True)
    return library


def _openmp() -> list[str]:
    """Links the OpenMP that torch has loaded: a second one would fight it for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    loaded = {line.split()[-1] for line in maps.read_text().splitlines()}
    return sorted(path for path in loaded if "/libgomp" in path)[:1]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    about = ("model name", "flags", "Features")
    return "\n".join(sorted({x for x in cpuinfo.read_text().splitlines() if x.startswith(about)}))


def _cache() -> Path:
    """The user's own folder for compiled code. Raises OSError if it is somebody else's."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(home) if home else Path.home() / ".cache"
        writable = os.access(folder if folder.exists() else folder.parent, os.W_OK)
    except RuntimeError:  # a user without a home
        writable = False
    if not writable:
        folder = Path(tempfile.gettempdir())
    # In a folder for all nothing is between it and what is ours: who has that can swap it.
    folder /= "towers" if writable else f"towers-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user")
    return folder
