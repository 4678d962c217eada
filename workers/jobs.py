"""Jobs on a running cluster, by Ray's job API: submit, follow, list, stop."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import ray
import requests
from packaging.specifiers import SpecifierSet
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from workers.config import UserError
from workers.errors import RunFailed, first_line

# What a job does not need, beside what .gitignore names.
EXCLUDES = [".git", ".venv", "runs", "shards", "data", "**/__pycache__", "**/.*_cache"]
STOP_SECONDS = 120  # that a job has to end by itself, with a checkpoint; Ray's own default is 3
PATIENCE = 300.0  # seconds without a cluster before a log is given up
DROPPED = (OSError, requests.RequestException, aiohttp.ClientError)  # of a connection


class Unwritten(Exception):
    """Our own output cannot be written, by the OSError that it is made of."""


def tell(text: str, stream: TextIO) -> None:
    """Writes to a stream of ours. Raises Unwritten."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        raise Unwritten(error) from None


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`.

    Raises UserError if nobody answers, the token is missing or wrong, or Ray is another version.
    """
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    if "://" not in address:
        address = f"http://{address}"  # or Ray would take it for that of its control store

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)  # which Ray's client would take instead
    try:
        client = JobSubmissionClient(address)
        found = client._server_ray_version
    except AuthenticationError as error:
        raise UserError(
            f"{address}: {first_line(error)}; put the cluster's token into RAY_AUTH_TOKEN or "
            "~/.ray/auth_token"
        ) from None
    except (*DROPPED, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"no Ray cluster at {address}: {reason.rstrip('.')}; "
            "--cluster FILE opens the way to one of `ray up`"
        ) from None
    if found != ray.__version__:
        raise UserError(
            f"{address}: the cluster has Ray {found}, this machine {ray.__version__}: install "
            f"ray=={found} here, or `ray up` the cluster anew"
        )
    return client


def check_python(client: JobSubmissionClient) -> str:
    """What to tell the user of the cluster's Python, if it is another one than here. The job runs
    with the cluster's, whatever it was sent with.

    Raises UserError if it is none that Towers runs with, RuntimeError if the cluster says nothing.
    """
    answer = client._do_request("GET", "/api/v0/cluster_metadata").json()
    found = answer.get("data", {}).get("pythonVersion")
    if not found:
        raise RuntimeError(f"it does not say which Python it has: {answer.get('msg')}")
    needed = metadata("towers")["Requires-Python"]
    if not SpecifierSet(needed).contains(found):
        raise UserError(
            f"the cluster has Python {found}, Towers needs {needed}: name such a one in the "
            "cluster's file and `ray up` it anew"
        )
    here = platform.python_version()
    if _minor(found) == _minor(here):
        return ""
    return (
        f"the cluster has Python {found}, this machine {here}: the job runs with the cluster's; "
        f"`make clean environment PYTHON=python{_minor(found)}` has the same here"
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def submit(client: JobSubmissionClient, folder: str, command: str) -> str:
    """Starts `command` on the cluster with a copy of `folder`; returns the job's name."""
    environment = {
        "working_dir": folder,
        "excludes": EXCLUDES,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
    }
    return client.submit_job(entrypoint=command, runtime_env=environment)


def package_size(folder: str) -> int:
    """Bytes of the package that `submit` sends, as Ray packs it.

    Raises UserError if they are more than Ray takes, or a file cannot be read.
    """
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package

    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "package.zip"
        try:
            create_package(folder, file, include_gitignore=True, excludes=EXCLUDES)
        except OSError as error:
            raise UserError(
                f"{os.path.abspath(folder)} cannot be packed: {first_line(error)}; name what no "
                "job needs in .gitignore"
            ) from None
        size = file.stat().st_size
    if size >= GCS_STORAGE_MAX_SIZE:
        raise UserError(
            f"{os.path.abspath(folder)} makes a package of {size >> 20} MiB, and Ray takes less "
            f"than {GCS_STORAGE_MAX_SIZE >> 20}: name what no job needs in .gitignore"
        )
    return size


def follow(client: JobSubmissionClient, job: str) -> int:
    """Writes the job's log as it comes; returns its exit code once it has ended.

    A connection that drops is made again, and the log goes on where it was. Raises RunFailed if
    the cluster stays away for five minutes, Unwritten if nobody takes what is written.
    """
    written = 0
    lost: float | None = None  # since when nobody answers

    def write(text: str, start: int) -> None:
        """What is new of a text that begins at this character of the log."""
        nonlocal written
        tell(text[max(0, written - start) :], sys.stdout)
        written = max(written, start + len(text))

    async def tail() -> None:
        start = 0  # Ray sends a log from its beginning
        async for text in client.tail_job_logs(job):
            write(text, start)
            start += len(text)

    while True:
        try:
            info = known(client, job)
            lost = None
            if info.status.is_terminal():
                log = client.get_job_logs(job)
                write(log if log.endswith("\n") or not log else f"{log}\n", 0)
                return _code(info)
            asyncio.run(tail())
        except (*DROPPED, RuntimeError):
            lost = lost or time.monotonic()
            if time.monotonic() - lost > PATIENCE:
                raise RunFailed(f"{job}: the cluster does not answer; the job may go on") from None
            time.sleep(1)


def _code(info: Any) -> int:
    """0 done, 2 if the driver ended with the user's mistake, 1 otherwise."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    return 2 if info.driver_exit_code == 2 else 1


def known(client: JobSubmissionClient, job: str) -> Any:
    """Ray's details of a job. Raises UserError if the cluster knows none of this name."""
    unknown = UserError(f"{job}: no such job; `towers jobs` lists them")
    try:
        found = client.get_job_info(job)
    except RuntimeError as error:
        if re.search(r"\b404\b|does not exist", str(error)):
            raise unknown from None
        raise
    if found.submission_id != job:  # Ray knows programs by a number too, and stops none by that
        raise unknown
    return found


def listed(client: JobSubmissionClient) -> list[tuple[str, ...]]:
    """Name, state, start and command of each job, the newest last."""
    found = [job for job in client.list_jobs() if job.submission_id]
    found.sort(key=lambda job: job.start_time or 0)
    return [(j.submission_id, str(j.status), _stamp(j.start_time), j.entrypoint) for j in found]


def _stamp(milliseconds: int | None) -> str:
    moment = time.localtime((milliseconds or 0) / 1000)
    return time.strftime("%Y-%m-%d %H:%M:%S", moment) if milliseconds else "-"
