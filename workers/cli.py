"""The command line `towers`. Imports nothing heavy before it knows what is asked for."""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, NoReturn

from datasets import DataError
from workers.commands import completion, data, jobs, planning, results, search, training, weights
from workers.config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when it takes no more."""

COMMANDS = (training, planning, data, results, search, weights, jobs, completion)


def program() -> int:
    """The program `towers`: `main`, with runs that outlive their own supervisor."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    return main(guard=True)


def main(argv: list[str] | None = None, *, guard: bool = False) -> int:
    """Runs a command; returns 0 done, 1 the work failed, 2 the user's mistake.

    With `guard`, which needs a process in which nothing has begun, `train` works in a child process
    and is started again if that is killed.
    """
    args = parser().parse_args(argv)
    args.guard = guard
    from workers.errors import RunFailed

    try:
        _check_empty(args)
        result: int = args.run_command(args)
        try:
            sys.stdout.flush()
        except OSError as error:  # whoever read our output has seen enough, or is gone
            if error.errno in FULL:
                raise
        _closed()
        return result
    except (UserError, DataError) as error:
        from datasets.storage import StoreFailed

        print(f"towers: {error}", file=sys.stderr)
        return 1 if isinstance(error, StoreFailed) else 2
    except RunFailed as error:
        print(f"towers: {error}", file=sys.stderr)
        return 1
    except OverflowError as error:
        print(f"towers: a number is too large ({error})", file=sys.stderr)
        return 2
    except Exception as error:
        from datasets.storage import passing, refused, said

        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO) and _closed():
            return 1
        if isinstance(error, OSError) and error.errno in FULL:
            print(f"towers: cannot write: {error}", file=sys.stderr)
            try:
                sys.stdout.flush()
            except OSError:
                _drop(sys.stdout.fileno())
            return 1
        if refused(error):
            print(f"towers: {said(error)}: check your rights there", file=sys.stderr)
            return 2
        if not passing(error):
            raise
        print(f"towers: a store failed, again and again: {said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"towers: interrupted{args.again and f'; {args.again}'}", file=sys.stderr)
        return 1


ELSEWHERE = {
    "--lr": "--rate",
    "--learning-rate": "--rate",
    "--batch-size": "--batch",
    "--weight-decay": "--decay",
    "--num-workers": "--augmenters",
    "--gpus": "--towers",
    "--num-gpus": "--towers",
}
"""What other programs call options, and what they are here."""

EMPTY = ("again", "arguments", "address", "cuts", "freeze", "init")
"""Arguments that may be empty: a job's own, and what is to be off though a file sets it."""


def _check_empty(args: argparse.Namespace) -> None:
    """Raises UserError for an argument of nothing, which would else be as if it were not there."""
    for name, value in vars(args).items():
        if name not in EMPTY and (value == "" or (isinstance(value, list) and "" in value)):
            flag = name.replace("_", "-")
            raise UserError(f"{flag} is given, and empty; is a variable of the shell not set?")


def _closed() -> bool:
    """Whether nobody reads our output any more; what is left of it is dropped."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        pipe = select.poll()
        with suppress(OSError, ValueError):  # a test's stream is no file
            pipe.register(stream.fileno(), 0)
        for number, event in pipe.poll(0):
            if event & select.POLLERR:
                _drop(number)
                closed = True
    return closed


def _drop(stream: int) -> None:
    """Has what is written to an open file go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


class _Parser(argparse.ArgumentParser):
    """Says in a line what is wrong, and not all that there is, which for `train` is two screens."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists what there is\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left = super().parse_known_args(args, namespace)
        if left:  # here, as the parser of all commands would not know whose it is
            from difflib import get_close_matches

            known = {flag for flag in self._option_string_actions if flag.startswith("--")}
            other = ELSEWHERE.get(left[0], "")
            # Of short ones any resembles another: --lr is not --lrn.
            close = get_close_matches(left[0], known, 1, 0.75) if len(left[0]) > 6 else []
            near = [other] if other in known else close
            meant = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"no such argument: {left[0]}{meant}")
        return found, left


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = _Parser(
        prog="towers", description="Trains the two-tower AlexNet of 2012 on a Ray cluster."
    )
    made.add_argument("--version", action="version", version=_version())
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for theme in COMMANDS:
        theme.add(commands)
    return made


def _version() -> str:
    from importlib.metadata import version

    return f"towers {version('towers')}"


if __name__ == "__main__":
    sys.exit(program())
