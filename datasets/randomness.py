"""Counter-based random numbers: a stream for every name, none of which depends on another."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike, NDArray


def stream(*name: str | int) -> np.random.Generator:
    """The generator that belongs to exactly this `name`, on every machine, in any order."""
    # NumPy's integers have another repr than Python's.
    parts = tuple(part if isinstance(part, str) else int(part) for part in name)
    digest = blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(_Key(digest)))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """Philox's key as it is. Given as `key=` it would cost a question to the system for entropy."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> NDArray[Any]:
        """The key's first `n_words` words."""
        return np.frombuffer(self.digest, np.dtype(dtype).newbyteorder("<"))[:n_words]
