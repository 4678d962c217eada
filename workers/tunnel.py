"""The way to the dashboard of a cluster that `ray up` made: `ray dashboard` as a child process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import yaml

from workers.config import UserError

AGAIN = 2.0  # seconds before a tunnel that dropped is opened anew
# Becomes the command. Whatever ends us closes our end of its pipe, which ends all of its session.
LEASH = 'exec 3<&0; (read -r _ <&3; kill 0) & exec "$@" 3<&- </dev/null'


@contextmanager
def tunnel(file: str) -> Iterator[str]:
    """The address at which the dashboard of this cluster file's cluster is reached meanwhile.

    A tunnel that drops is opened anew at the same address. Raises UserError if the file is none or
    there is no way.
    """
    _check(file)
    port, over = _free_port(), threading.Event()
    with tempfile.TemporaryFile("w+") as said:
        process = _open(file, port, said)

        def keep() -> None:
            nonlocal process
            while not over.is_set():
                process.wait()
                if not over.wait(AGAIN):
                    process = _open(file, port, said)

        keeper = threading.Thread(target=keep, daemon=True)
        try:
            while not _answers(port):
                if process.poll() is not None:
                    raise UserError(f"no way to the cluster of {file}: {_reason(said)}")
                over.wait(0.1)
            keeper.start()
            yield f"http://127.0.0.1:{port}"
        finally:
            over.set()
            _end(process)
            if keeper.ident:
                keeper.join()
                _end(process)  # that one, if it was opened meanwhile


def _check(file: str) -> None:
    try:
        found = next(yaml.safe_load_all(Path(file).read_text()), None)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the file of `ray up`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: no YAML: {' '.join(str(error).split())}") from None
    missing = {"cluster_name", "provider", "auth"} - set(found if isinstance(found, dict) else ())
    if missing:
        raise UserError(f"{file}: no cluster file, it lacks {', '.join(sorted(missing))}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _open(file: str, port: int, said: IO[str]) -> subprocess.Popen[str]:
    """In a session of its own: SSH would take the terminal, and Ctrl-C is ours to handle. It ends
    with this process, even if that is killed.
    """
    said.seek(0)
    said.truncate()
    beside = Path(sys.executable).with_name("ray")
    ray = str(beside) if beside.exists() else shutil.which("ray") or "ray"
    return subprocess.Popen(
        ["sh", "-c", LEASH, "sh", ray, "dashboard", f"--port={port}", file],
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=said,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # or what SSH says would come before
        start_new_session=True,
        text=True,
    )


def _answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _reason(said: IO[str]) -> str:
    """What `ray dashboard` said last, in one line."""
    said.seek(0)
    before, _, reason = said.read().rpartition("The exception is:")
    if reason.lstrip().startswith("Command failed"):  # SSH, which said why itself
        reason = before.partition("Error: Failed to forward")[0].strip().rpartition("\n")[2]
    return next(iter(reason.strip().splitlines()), "`ray dashboard` ended without a word")


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)  # SSH too
    process.wait()
