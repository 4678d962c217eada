"""Fixtures: ranks that live as long as the session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def eight() -> Iterator[Ranks]:
    """Eight ranks."""
    ranks = Ranks(8)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def six() -> Iterator[Ranks]:
    """Six ranks."""
    ranks = Ranks(6)
    yield ranks
    ranks.stop()
