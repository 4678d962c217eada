"""Ray itself: connect to the cluster that is there, or start one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import services, worker

from workers.config import UserError
from workers.errors import ClusterLost, first_line


@contextmanager
def connected(unless: bool = False) -> Iterator[None]:
    """Within it Ray is up, `unless` it needs none: the cluster of RAY_ADDRESS, one that runs on
    this machine, or a new one.

    What was started here is ended here. Raises UserError if a named cluster does not answer,
    ClusterLost instead of whatever follows if Ray goes away meanwhile.
    """
    if unless:
        yield
        return
    if ray.is_initialized():
        with _kept():
            yield
        return
    before = signal.getsignal(signal.SIGTERM)  # which Ray replaces, and resets at its end
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # When a tower dies its peers fail too; one line says so, not a traceback of each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        ray.init(
            _address(), logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False
        )
    except Exception as error:  # Ray has no kind of its own for a start that takes too long
        address = os.environ.get("RAY_ADDRESS", "this machine")
        reason = first_line(error)
        raise UserError(f"no Ray cluster at {address}: {reason}") from None
    try:
        with _interruptible(), _kept():
            yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within it SIGTERM is a KeyboardInterrupt. Ray would end the process with a stack trace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _kept() -> Iterator[None]:
    """Tells errors that follow from the loss of Ray as what they are."""
    try:
        yield
    except Exception:
        check()
        raise


def check() -> None:
    """Raises ClusterLost if this process has lost its Ray."""
    if lost():
        raise ClusterLost("Ray is gone from this node") from None


def lost() -> bool:
    """Whether the Ray that this process belongs to is gone: its own, or its node's."""
    node = worker._global_node
    if node and any(kind in ("raylet", "gcs_server") for kind, _ in node.dead_processes()):
        return True
    own = ray.get_runtime_context().get_node_id()
    try:
        return not any(n["NodeID"] == own and n["Alive"] for n in ray.nodes())
    except (ray.exceptions.RayError, RuntimeError):
        return True


def _address() -> str | None:
    """What `ray.init` is to connect to; "local" if the cluster that last ran here is gone.

    Raises ConnectionError at once where Ray would ask a dead address for minutes, or take one by
    which it gives no streams.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return None
    if "://" in named:
        raise ConnectionError("HOST:6379 is wanted; `towers submit` takes http://HOST:8265")
    found = services.canonicalize_bootstrap_address(None)
    if found is None:
        return None
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        if named:
            raise ConnectionError(error.strerror or str(error)) from None
        return "local"  # that cluster was killed, and its address stayed in a file
    return found if named else "auto"  # by which Ray takes the machine's token
