"""What a person sees of a run: a live line on a terminal, plain lines elsewhere; a final table."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from datetime import timedelta
from typing import Any, TextIO
from unicodedata import combining, east_asian_width

PLAIN_SECONDS = 5.0
CLEAR = "\r\x1b[K"


class Progress:
    """Writes to `out`, standard error if it is not given."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self.written = 0.0
        self.total = 0
        self.ending = False  # whoever read what is said may have been ended too

    def say(self, text: str) -> None:
        """A line that stays."""
        self._print(f"{CLEAR if self.live else ''}{text}\n")

    def start(self, job: Any, augmenters: tuple[int, int], step: int) -> None:
        """The run begins, or goes on after `step`, with so many `augmenters`, least and most."""
        where, itinerary = job.placement, job.itinerary
        self.total = itinerary.total_steps
        low, high = augmenters
        self.say(
            f"{job.folder or job.config.network}: {where.mesh.size} tower actor(s) on "
            f"{where.device} ({where.mesh} = replicas x stages x towers, {where.threads} "
            f"thread(s) each), {low} to {high} augmenters, {self.total} steps"
            + (f", from step {step}" if step else "")
        )

    def step(self, report: dict[str, Any]) -> None:
        """A report of training; a plain line only every few seconds."""
        self.line(
            f"step {report['step']}/{self.total}  epoch {report['epoch'] + 1}  "
            f"loss {report['loss']:.3f}  top-1 error {report['top1_error']:.1%}  "
            f"{report['images_per_second']:.0f} images/s  "
            f"waited for data {report['stall_fraction']:.0%}  augmenters {report['augmenters']}",
            last=report["step"] >= self.total,
        )

    def done(self, what: str, count: int, total: int, start: float) -> None:
        """How many of `total` are done since `start` (time.monotonic) and how long it will take."""
        seconds = time.monotonic() - start
        rate = count / seconds if seconds else 0.0
        left = str(timedelta(seconds=round((total - count) / rate))) if rate else "?"
        share = count / total if total else 1.0
        text = f"{what} {count}/{total} ({share:.0%})  {rate:.0f} images/s  {left} left"
        self.line(text, last=count >= total)

    def line(self, line: str, *, last: bool = False) -> None:
        """A line that the next one replaces on a terminal, and elsewhere one every few seconds."""
        now = time.monotonic()
        if not self.live and now - self.written < PLAIN_SECONDS and not last:
            return
        self.written = now
        self._print(f"{CLEAR}{line}" if self.live else f"{line}\n")

    def evaluation(self, report: dict[str, Any]) -> None:
        """A line for an evaluation."""
        self.say(
            f"epoch {report['epoch'] + 1} evaluated on {report['images']} images: "
            f"loss {report['loss']:.3f}  top-1 error {report['top1_error']:.1%}  "
            f"top-5 error {report['top5_error']:.1%}"
        )

    def _print(self, text: str) -> None:
        try:
            print(text, end="", file=self.out, flush=True)
        except OSError as error:
            if error.errno != errno.EIO and not (self.ending and error.errno == errno.EPIPE):
                raise
            # The terminal is gone, not the run.
            self.out, self.live = open(os.devnull, "w"), False  # noqa: SIM115


def table(rows: list[tuple[str, ...]], heads: tuple[str, ...] = ()) -> str:
    """Columns as wide as they need to be, those of numbers to the right."""
    lines = ([heads] if heads else []) + rows
    columns = [[line[i] for line in lines] for i in range(len(lines[0]))]
    shown = []
    for column in columns:
        wide = max(map(width, column))
        right = all(map(NUMBER.fullmatch, column[bool(heads) :]))
        spaces = [" " * (wide - width(cell)) for cell in column]
        padded = [s + c if right else c + s for c, s in zip(column, spaces, strict=True)]
        if heads:
            padded.insert(1, "-" * wide)
        shown.append(padded)
    return "\n".join("  ".join(line).rstrip() for line in zip(*shown, strict=True))


NUMBER = re.compile(r"[-+~<>]?[\d,.]*\d ?(%|x|MB)?|-|")


def megabytes(count: int) -> str:
    """Bytes for a table whose head says MB."""
    return f"{count / 1e6:,.1f}"


def width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in ("W", "F") else 1 for c in text)


BOLD, DIM, CYAN, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[36m", "\x1b[0m"


def styled(text: str, out: TextIO) -> str:
    """A text for `out`: on a terminal its tables' heads and bars stand out, unless NO_COLOR is set
    or the terminal is a dumb one.
    """
    if not out.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    text = re.sub(r"(?m)^(.+)\n(-[- ]*)$", rf"{BOLD}\1{PLAIN}\n{DIM}\2{PLAIN}", text)
    return re.sub("\u2588+", rf"{CYAN}\g<0>{PLAIN}", text)


def result_table(result: dict[str, Any]) -> str:
    """The result of a run for a person."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    loss, of = result["loss"], ", training" if result["split"] == "train" else ""
    return table(
        [
            ("run", result["run"]),
            ("steps", f"{result['steps']} ({result['epochs']:g} epochs)"),
            (f"loss{of}", "-" if loss is None else f"{loss:.4f}"),
            (f"top-1 error{of}", percent(result["top1_error"])),
            (f"top-5 error{of}", percent(result["top5_error"])),
            ("images a second", f"{result['images_per_second']:.0f}"),
            ("waited for data", percent(result["stall_fraction"])),
            ("restarts", str(result["restarts"])),
            ("mesh", f"{result['mesh']} (replicas x stages x towers)"),
            ("weights sha256", result["weights_sha256"]),
        ]
    )
