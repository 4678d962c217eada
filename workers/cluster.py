"""Ray itself: connect to the cluster that is there, or start one on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from workers.config import UserError


@contextmanager
def connected() -> Iterator[None]:
    """Within it Ray is up: the cluster of RAY_ADDRESS, one that runs on this machine, or a new one.

    What was started here is ended here. Raises UserError if a named cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # When a tower dies its peers fail too; one line says so, not a traceback of each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        address = os.environ.get("RAY_ADDRESS", "this machine")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"no Ray cluster at {address}: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()
