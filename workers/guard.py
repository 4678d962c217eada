"""A run that outlives its own supervisor: killed, or left by its Ray, it is started again."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

AGAIN = 75  # exit code of a child that asks to be started again (EX_TEMPFAIL)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
PROGRESS, ENDED = b"p", b"e"  # what a child notes in its pipe; the exit code follows the latter


def guarded(work: Callable[[int, Callable[[], object]], int], limit: int) -> int:
    """The exit code of `work`, which runs in a child process, and in another one if that is killed,
    is ended from outside Python or ends with `AGAIN`; in a row, without progress, `limit` times at
    most. A child that is killed once `work` has returned or raised is not followed by another.

    `work` is called with the number of children before it and with what it is to call at each
    progress. Signals that end a program are passed on to the child, and it ends in order if this
    process is killed. Nothing heavy may be imported yet: the child is a fork.
    """
    deaths = row = 0
    while True:
        read, write = os.pipe()
        own, child = os.getpid(), os.fork()
        if not child:
            os.close(read)
            _end_with(own)
            os.set_blocking(write, False)
            note = lru_cache(partial(_note, write))  # each note once is enough
            try:
                code = work(deaths, partial(note, PROGRESS))
            except BaseException:
                note(ENDED)
                raise
            with suppress(OSError, ValueError):  # of which `main` hears again
                sys.stdout.flush()  # nobody says it again
            note(ENDED + bytes([code]))
            return code
        os.close(write)
        status = _wait(child)
        progress, ended, returned = os.read(read, len(PROGRESS + ENDED) + 1).partition(ENDED)
        os.close(read)
        row = 0 if progress else row
        name = "lost its Ray" if os.WIFEXITED(status) else _signal(os.WTERMSIG(status))
        code = AGAIN  # Ray ends a process that has lost it, without a word to Python
        if ended and os.WIFEXITED(status):
            code = os.WEXITSTATUS(status)
        elif ended:  # libraries may crash in the exit that follows
            code = returned[0] if returned else 1
        if code != AGAIN:
            return code
        if _told or row >= limit:
            print(f"towers: the run's supervisor {name}; --resume goes on", file=sys.stderr)
            return 1
        deaths, row = deaths + 1, row + 1
        with suppress(OSError):  # the terminal may be gone
            print(f"the run's supervisor {name}: started again", file=sys.stderr, flush=True)


def _note(pipe: int, text: bytes) -> None:
    with suppress(OSError):  # nobody reads it any more: the parent was killed
        os.write(pipe, text)


@contextmanager
def in_order(tell: Callable[[str], object]) -> Iterator[None]:
    """Within it the name of a signal that is to end this process's work is told: SIGTERM, such as
    of a spot machine or `ray job stop`, SIGHUP, of a terminal that closes, and Ctrl-C, which ends
    it at once when it comes again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def note(number: int, _: Any) -> None:
        if heard and number == signal.SIGINT:
            raise KeyboardInterrupt
        heard.append(number)
        tell(signal.Signals(number).name)

    ending = {signal.SIGTERM, signal.SIGINT, *_passed_on()}
    before = {number: signal.signal(number, note) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _passed_on() -> list[signal.Signals]:
    """What is ignored, as by nohup, stays so."""
    return [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]


_told: list[int] = []  # signals that were passed on


def _wait(child: int) -> int:
    """The child's status, once it has ended."""

    def pass_on(number: int, _: Any) -> None:
        _told.append(number)
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(child, number)

    before = {number: signal.signal(number, pass_on) for number in _passed_on()}
    try:
        return os.waitpid(child, 0)[1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with(parent: int) -> None:
    """Has this process terminated when its parent is gone, and away from the terminal's signals,
    which the parent passes on.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # writing there, it is stopped by `stty tostop`
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _signal(number: int) -> str:
    return f"was killed by {signal.Signals(number).name}"
