"""The C++ of this folder: compiled once a machine with its own compiler, kept in a cache.

Without a compiler callers do the same mathematics in torch, slower; `missing()` says why.
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
from pathlib import Path

import torch
from torch import Tensor

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
MOST = 512  # maps of a row: what the functions hold of it at a time


def kernels(x: Tensor) -> ctypes.CDLL | None:
    """The functions of kernels.cpp if they can take tensors like x here, else None.

    They take channels-last float32 or bfloat16, all of one dtype, in a processor's memory.
    """
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return _load()[0] if fits else None


def missing() -> str:
    """Why there is no compiled code, in half a line; "" where there is."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("TOWERS_NATIVE") == "0":
        return None, "TOWERS_NATIVE is 0"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not compiler:
        return None, "no C++ compiler (c++, g++, clang++ or $CXX)"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} failed: {said.strip().splitlines()[0] if said.strip() else error}"
    for name, types in _FUNCTIONS.items():
        getattr(library, name).argtypes = types
        getattr(library, name).restype = None
    return library, ""


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
        folder = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    folder = folder / "towers"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user")
    return folder
