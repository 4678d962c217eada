"""`towers submit`, `jobs`, `logs` and `stop`."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from workers.commands import command, show

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"  # where `ray dashboard cluster.yaml` brings it


def add(commands: Any) -> None:
    submit = command(
        commands,
        "submit",
        "run a command of towers as a job on a cluster",
        "towers submit --cluster cluster.yaml -- train s3://bucket/imagenet --run s3://bucket/run",
        _submit,
        again="a job that was submitted goes on, and `towers stop JOB` ends it",
    )
    submit.add_argument("arguments", nargs="+", metavar="-- COMMAND", help="Such as train ...")
    _address(submit)
    jobs = command(commands, "jobs", "list a cluster's jobs", "towers jobs", _jobs)
    _address(jobs)
    logs = command(commands, "logs", "print a job's log", "towers logs JOB --follow", _logs)
    logs.add_argument("job", metavar="JOB", help="As `towers jobs` names it.")
    logs.add_argument("-f", "--follow", action="store_true", help="Until the job ends.")
    _address(logs)
    stop = command(commands, "stop", "end a job", "towers stop JOB", _stop)
    stop.add_argument("job", metavar="JOB", help="As `towers jobs` names it.")
    _address(stop)


def _address(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS),
        metavar="URL",
        help=f"Of the cluster's dashboard. [RAY_API_SERVER_ADDRESS, or {ADDRESS}]",
    )
    where.add_argument(
        "--cluster",
        metavar="FILE",
        help="Of `ray up`, such as cluster.yaml: opens the way to its dashboard meanwhile.",
    )


@contextmanager
def _client(args: argparse.Namespace) -> Iterator[JobSubmissionClient]:
    """A client of the cluster that the options name. Raises RunFailed once that stops answering."""
    from ray.exceptions import AuthenticationError

    from workers.errors import RunFailed, first_line
    from workers.jobs import DROPPED, Unwritten, connect
    from workers.tunnel import tunnel

    logging.disable(logging.WARNING)  # what Ray tells of itself, by loggers that it sets itself
    file = getattr(args, "cluster", None)
    with tunnel(file) if file else nullcontext(args.address) as address:
        client = connect(address)
        try:
            yield client
        except RunFailed:
            raise
        except Unwritten as error:
            raise error.args[0] from None
        except (*DROPPED, RuntimeError, AuthenticationError) as error:
            raise RunFailed(f"{address}: the cluster failed: {first_line(error)}") from None


def _submit(args: argparse.Namespace) -> int:
    from workers import jobs

    with _client(args) as client:
        if note := jobs.check_python(client):
            jobs.tell(f"{note}\n", sys.stderr)
        size = jobs.package_size(".") / 2**20
        job = jobs.submit(client, ".", shlex.join(["towers", *args.arguments]))
        sent = f"{job}: a package of {size:.2f} MiB; `towers logs {job}` shows it\n"
        jobs.tell(sent, sys.stderr)
        code = jobs.follow(client, job)
    return show(args, "", {"job": job, "exit_code": code}) or code


def _jobs(args: argparse.Namespace) -> int:
    from workers import jobs
    from workers.progress import table

    heads = ("job", "state", "started", "command")
    with _client(args) as client:
        rows = jobs.listed(client)
    text = table(rows, heads) if rows else "no jobs"
    return show(args, text, {"jobs": [dict(zip(heads, row, strict=True)) for row in rows]})


def _logs(args: argparse.Namespace) -> int:
    from workers import jobs

    code, log = 0, ""
    with _client(args) as client:
        state = jobs.known(client, args.job).status
        if getattr(args, "follow", False):
            code = jobs.follow(client, args.job)
            state = jobs.known(client, args.job).status
        else:
            log = client.get_job_logs(args.job)
    print(log, end="" if log.endswith("\n") or not log else "\n")
    return show(args, "", {"job": args.job, "state": str(state)}) or code


def _stop(args: argparse.Namespace) -> int:
    from workers import jobs

    with _client(args) as client:
        jobs.known(client, args.job)
        stopping = client.stop_job(args.job)
    text = f"{args.job}: {'told to stop' if stopping else 'had ended already'}"
    return show(args, text, {"job": args.job, "stopping": stopping})
