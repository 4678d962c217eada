"""How a run can end other than well."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """The run could not go on; its one line says why and what is kept. Exit code 1."""


class ClusterLost(RunFailed):
    """The Ray that this process belongs to is gone; another process can go on with the run."""
