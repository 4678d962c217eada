"""How a run can end other than well."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """The run could not go on; its one line says why and what is kept. Exit code 1."""
