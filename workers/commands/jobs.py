"""`towers submit`, `jobs`, `logs` and `stop`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from workers.commands import command, show

ADDRESS = "http://127.0.0.1:8265"  # where `ray dashboard cluster.yaml` brings it


def add(commands: Any) -> None:
    submit = command(
        commands,
        "submit",
        "run a command of towers as a job on a cluster",
        "towers submit -- train s3://bucket/imagenet --run s3://bucket/run",
        _submit,
    )
    submit.add_argument("arguments", nargs="+", metavar="-- COMMAND", help="Such as train ...")
    _address(submit)
    jobs = command(commands, "jobs", "list a cluster's jobs", "towers jobs", _jobs)
    _address(jobs)
    logs = command(commands, "logs", "print a job's log", "towers logs JOB --follow", _logs)
    logs.add_argument("job", metavar="JOB", help="As `towers jobs` names it.")
    logs.add_argument("--follow", action="store_true", help="Until the job ends.")
    _address(logs)
    stop = command(commands, "stop", "end a job", "towers stop JOB", _stop)
    stop.add_argument("job", metavar="JOB", help="As `towers jobs` names it.")
    _address(stop)


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS),
        metavar="URL",
        help=f"Of the cluster's dashboard. [RAY_API_SERVER_ADDRESS, or {ADDRESS}]",
    )


def _submit(args: argparse.Namespace) -> int:
    from workers import jobs

    client = jobs.connect(args.address)
    size = jobs.package_size(".") / 2**20
    job = jobs.submit(client, ".", shlex.join(["towers", *args.arguments]))
    print(f"{job}: a package of {size:.2f} MiB; `towers logs {job}` shows it", file=sys.stderr)
    return jobs.follow(client, job)


def _jobs(args: argparse.Namespace) -> int:
    from workers import jobs
    from workers.progress import table

    heads = ("job", "state", "started", "command")
    rows = jobs.listed(jobs.connect(args.address))
    text = table(rows, heads) if rows else "no jobs"
    return show(args, text, {"jobs": [dict(zip(heads, row, strict=True)) for row in rows]})


def _logs(args: argparse.Namespace) -> int:
    from workers import jobs

    client = jobs.connect(args.address)
    jobs.known(client, args.job)
    if getattr(args, "follow", False):
        return jobs.follow(client, args.job)
    print(client.get_job_logs(args.job), end="")
    return 0


def _stop(args: argparse.Namespace) -> int:
    from workers import jobs

    client = jobs.connect(args.address)
    jobs.known(client, args.job)
    stopping = client.stop_job(args.job)
    print(f"{args.job}: {'told to stop' if stopping else 'had ended already'}")
    return 0
