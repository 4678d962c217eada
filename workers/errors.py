"""How a run can end other than well, in a line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an error says in its first line; the name of its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class RunFailed(RuntimeError):
    """The run could not go on; its one line says why and what is kept. Exit code 1."""


class Diverged(RunFailed):
    """The loss is no number, and would be none again."""


class ClusterLost(RunFailed):
    """The Ray that this process belongs to is gone; another process can go on with the run."""
