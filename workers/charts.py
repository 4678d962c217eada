"""Line charts over one axis of time or of counts, as SVG in the colours of the page around them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from statistics import fmean

WIDTH, PLOT = 470, 164  # of a chart and of what is inside its axes, in pixels
LEFT, RIGHT, TOP, ROW = 66, 20, 10, 14  # margins, and the height of a row of labels
COLOURS = 10  # of the page

SPACINGS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200)
"""Seconds between two marks of time; longer ones are whole days."""

DAY = 86400

Place = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """What a run reported `seconds` after its start."""

    seconds: float
    value: float
    step: int


@dataclass(frozen=True)
class Curve:
    """Points of the run with this number in time's order: a line, or `dots` that tell what they
    are.
    """

    run: int
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """The time of all charts: its `end` in seconds, the `restarts` of runs (run, seconds, what to
    call it), and for each run whose steps are named below the time (seconds, step), in order. With
    a `unit` it is not time but so many of those.
    """

    end: float
    restarts: Sequence[tuple[int, float, str]] = ()
    steps: Sequence[Sequence[tuple[float, int]]] = ()
    unit: str = ""


def chart(
    title: str, curves: Sequence[Curve], axis: Axis, *, percent: bool = False, whole: bool = False
) -> str:
    """A figure of one quantity of all runs, from 0 on; "" if there is nothing finite to draw.

    `percent`: shares of one, shown in per cent; `whole`: counts, between which there is nothing.
    """
    scale = 100.0 if percent else 1.0
    values = [p.value * scale for c in curves for p in c.points if math.isfinite(p.value)]
    if not values:
        return ""
    ticks = round_ticks(max(values), least=1 if whole else 0)
    end = axis.end or 1.0
    height = TOP + PLOT + ROW * (1 + len(axis.steps)) + 8

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max(seconds / end, 0), 1)

    def y(value: float) -> float:
        return TOP + PLOT * (1 - value * scale / ticks[-1])

    drawn = [*_across(ticks, "%" if percent else ""), *_below(axis, x)]
    for run, seconds, name in axis.restarts:
        drawn.append(
            f'<line x1="{x(seconds):.1f}" x2="{x(seconds):.1f}" y1="{TOP}" y2="{TOP + PLOT}" '
            f'stroke="{colour(run)}" stroke-dasharray="3 3"><title>{name}</title></line>'
        )
    for curve in curves:
        finite = [point for point in curve.points if math.isfinite(point.value)]
        if curve.dots:
            drawn += [
                f'<circle cx="{x(p.seconds):.1f}" cy="{y(p.value):.1f}" r="3.5" '
                f'fill="{colour(curve.run)}"><title>step {p.step:,}: {p.value * scale:.4g}'
                f"{'%' if percent else ''}</title></circle>"
                for p in finite
            ]
        elif finite:
            line, band = thin([(x(p.seconds), y(p.value)) for p in finite])
            if whole:  # what was counted stayed so until the next count
                corners = [(b, a) for (_, a), (b, _) in pairwise(line)]
                line = [p for pair in zip_longest(line, corners) for p in pair if p]
            line = line * 2 if len(line) == 1 else line  # or nothing is drawn
            if band:
                drawn.append(f'<polygon points="{_places(band)}" fill="{colour(curve.run)}"/>')
            drawn.append(f'<polyline points="{_places(line)}" stroke="{colour(curve.run)}"/>')
    return figure(title, height, drawn)


def figure(title: str, height: float, drawn: Iterable[str]) -> str:
    """A picture of these parts, `WIDTH` wide, below its title."""
    return (
        f'<figure><b>{title}</b><br><svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'role="img" aria-label="{title}">{"".join(drawn)}</svg></figure>'
    )


def colour(run: int) -> str:
    """The colour of the run with this number."""
    return f"var(--s{run % COLOURS})"


def round_ticks(most: float, *, least: float = 0) -> list[float]:
    """0 and on to `most` or just past it, in at most five steps of 1, 2 or 5 times a power of ten,
    none shorter than `least`.
    """
    if most <= 0:
        return [0.0, 1.0]
    exponent = math.floor(math.log10(most / 5))
    steps = [m * 10.0**e for e in (exponent, exponent + 1) for m in (1, 2, 5)]
    # A hair less than five, as 0.3 / 0.1 is more than three.
    step = next(s for s in steps if most / s <= 5 + 1e-9 and s >= least)
    return [step * k for k in range(math.ceil(most / step - 1e-9) + 1)]


def time_ticks(end: float) -> tuple[str, int, list[float]]:
    """The unit of marks up to `end` seconds, the seconds in it, and the marks in seconds: seven at
    most, at times that clocks show.
    """
    spacing = next((s for s in SPACINGS if end / s <= 6), 0)
    spacing = spacing or DAY * math.ceil(end / DAY / 6)
    unit, seconds = next(
        (name, size)
        for name, size in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if spacing >= size
    )
    return unit, seconds, [float(spacing * k) for k in range(int(end / spacing) + 1)]


def thin(line: Sequence[Place]) -> tuple[list[Place], list[Place]]:
    """A line with a point a pixel at most, the mean there, and the outline of the band from the
    lowest to the highest, [] if the line is all that there is.
    """
    columns: dict[int, list[Place]] = {}
    for place in line:
        columns.setdefault(round(place[0]), []).append(place)
    if len(columns) == len(line):
        return list(line), []
    means, low, high = [], [], []
    for places in columns.values():
        x, y = (fmean(values) for values in zip(*places, strict=True))
        means.append((x, y))
        low.append((x, min(y for _, y in places)))
        high.append((x, max(y for _, y in places)))
    return means, [*low, *reversed(high)]


def _across(ticks: Sequence[float], sign: str) -> Iterator[str]:
    """The grid and its labels, all with as many digits as the spacing takes."""
    digits = max(0, -math.floor(math.log10(ticks[1]) + 1e-9))
    for tick in ticks:
        y = TOP + PLOT * (1 - tick / ticks[-1])
        label = f"{tick:,.{digits}f}" if digits <= 5 else f"{tick:.0e}"
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield text(LEFT - 6, y + 4, label + sign, "end")


def _below(axis: Axis, x: Callable[[float], float]) -> Iterator[str]:
    """Rows of labels: the time, and the steps of each run that names them."""
    unit, size, ticks = time_ticks(axis.end or 1.0)
    if axis.unit:
        counts = round_ticks(axis.end or 1.0)
        unit, size, ticks = axis.unit, 1, [count for count in counts if count <= axis.end]
    low = TOP + PLOT + ROW
    yield text(LEFT - 14, low + 2, unit, "end")
    for tick in ticks:
        yield (
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" '
            f'y1="{TOP + PLOT}" y2="{TOP + PLOT + 4}"/>'
        )
        yield text(x(tick), low + 2, f"{tick / size:g}")
    for run, steps in enumerate(axis.steps):
        style = f' style="fill:{colour(run)}"' if len(axis.steps) > 1 else ""
        times = [seconds for seconds, _ in steps]
        yield text(LEFT - 14, low + 2 + ROW * (run + 1), "step", "end", style)
        for tick in ticks:
            passed = bisect_right(times, tick)
            step = steps[passed - 1][1] if passed else 0
            if passed < len(times) or times[-1:] == [tick]:  # it was training then
                yield text(x(tick), low + 2 + ROW * (run + 1), f"{step:,}", "middle", style)


def _places(line: Sequence[Place]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in line)


def text(x: float, y: float, said: str, anchor: str = "middle", style: str = "") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{said}</text>'
