"""Fixtures: ranks that live as long as tests of this folder go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks

STARTED: list[Ranks] = []


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Ends them before other folders' tests: gloo looks a hundred times a second for news."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        for ranks in STARTED:
            ranks.stop()


def started(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    STARTED.append(ranks)
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
