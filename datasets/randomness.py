"""Counter-based random numbers: a stream for every name, none of which depends on another."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def stream(*name: str | int) -> np.random.Generator:
    """The generator that belongs to exactly this `name`, on every machine, in any order."""
    # NumPy's integers have another repr than Python's.
    parts = tuple(part if isinstance(part, str) else int(part) for part in name)
    digest = blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))
