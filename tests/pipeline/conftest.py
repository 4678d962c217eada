"""Fixtures: ranks that live as long as the session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks


def started(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    yield from started(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    yield from started(4)


@pytest.fixture(scope="session")
def six() -> Iterator[Ranks]:
    yield from started(6)


@pytest.fixture(scope="session")
def eight() -> Iterator[Ranks]:
    yield from started(8)
