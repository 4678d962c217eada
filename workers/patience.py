"""What a run cannot go on without, asked of a store that fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from datasets.storage import passing

PAUSES = 0, 1, 5, 25, 125
"""Seconds before each attempt at what a run cannot go on without, while a store fails."""

T = TypeVar("T")


def patiently(call: Callable[[], T], check: Callable[[], object] = lambda: None) -> T:
    """What `call` returns, tried again for two and a half minutes while a store fails. `check` is
    called meanwhile, and may raise.
    """
    for pause in PAUSES:
        for _ in range(pause):
            time.sleep(1)
            check()
        try:
            return call()
        except Exception as error:
            if pause == PAUSES[-1] or not passing(error):
                raise
    raise AssertionError
