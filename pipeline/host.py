"""Settings of a process that computes: allocator and threads, made before the first tensor."""

from __future__ import annotations

import ctypes
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


def prepare(threads: int) -> None:
    """Makes this process ready to compute with so many threads."""
    keep_memory()
    torch.set_num_threads(threads)
