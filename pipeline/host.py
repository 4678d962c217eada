"""Settings of a process that computes: allocator, threads and a GPU's algorithms, made before the
first tensor.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Lets glibc keep freed memory: giving every large tensor back costs a third of a step in page
    faults. Returns whether the allocator took the settings (it is another one on macOS or musl).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 256 << 20))
    return all(mallopt(name, value) for name, value in settings)


def same_bits() -> None:
    """Has a GPU do the same work in the same order each time, and torch refuse what it cannot."""
    # cuBLAS may share its workspace out differently each time unless this is set before its start.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # a switch adds in the order of arrival
    torch.use_deterministic_algorithms(True)
    # A pass over every tensor that is made empty.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # or the fastest algorithm of the day is taken


def prepare(threads: int, device: str = "cpu") -> None:
    """Makes this process ready to compute on a kind of device, with so many threads."""
    keep_memory()
    torch.set_num_threads(threads)
    if device == "cuda":
        same_bits()
