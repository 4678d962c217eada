"""The claims as a Markdown table, and as one page with plots."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from workers.charts import WIDTH, Axis, Curve, Point, chart, colour, figure, round_ticks, text
from workers.claims import CLAIMS, Claim, Finding
from workers.page import page

HEADS = ("claim", "paper", "ours", "on", "verdict")
FIGURES = {
    "ReLU and tanh (figure 1)": {"relu": "ReLU", "tanh": "tanh"},
    "ReLU and tanh, pixels and weights scaled": {"relu-scaled": "ReLU", "tanh-scaled": "tanh"},
    "Dropout": {"dropout-to-goal": "with it", "no-dropout-to-goal": "without"},
}
"""Training error over epochs, of arms by what they are called there."""
LEFT, ROW = 130, 22  # of a figure of dots, in pixels

RULE = (
    "The figure of a trained claim is the difference, or with x the ratio, of its two arms' means "
    "over the seeds; in brackets where it lies with 95% certainty, by the spread between seeds, "
    "runs of one seed taken in pairs. "
    "Supported: all of that lies on the claim's side. Supported, but weaker: the same, and the "
    "paper's factor lies beyond it. Not supported: all of it lies on the other side. Else it "
    "cannot be shown at this scale."
)

MEASURES = {
    "iterations": "Iterations to 25% training error",
    "gap": "Validation error less training error",
    "step_seconds": "Seconds a step, beside other runs",
}

Curves = Mapping[str, Sequence[tuple[int, list[tuple[int, float]]]]]
"""Of each arm's runs the steps of an epoch, and its errors in training as (step, error)."""


def told(claim: Claim, finding: Finding) -> str:
    """The figure of a claim for a person."""
    if math.isnan(finding.figure):
        return "-"
    low, high, least = finding.low, finding.high, "at least " if finding.bound else ""
    if claim.ratio:
        spread = "" if math.isnan(low) else f" ({low:.2f} to {high:.2f})"
        return f"{least}{finding.figure:.2f} x{spread}"
    spread = "" if math.isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{least}{100 * finding.figure:.1f} points{spread}"


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table, and the rule of its verdicts."""
    rows = [HEADS, tuple("---" for _ in HEADS), *map(_cells, lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{RULE}\n"


def claims_page(result: dict[str, Any], curves: Curves) -> str:
    """The page of a result of `towers claims`."""
    lines = result["claims"]
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in _cells(line)) for line in lines
    )
    heads = "".join(f"<th>{head}" for head in HEADS)
    parts = [
        "<h1>The claims, measured</h1>",
        f"<table><tr>{heads}{cells}</table><p class=soft>{RULE}</p>",
        *(_figure(title, arms, curves) for title, arms in FIGURES.items()),
    ]
    drawn = [_dots(line) for line in lines if "arms" in line]
    parts.append(f'<h2>Arms</h2><div class="charts">{"".join(drawn)}</div>' if drawn else "")
    return page("".join(parts))


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    return (line["says"], line["paper"], line["ours"], line["on"], line["verdict"])


def _figure(title: str, arms: dict[str, str], curves: Curves) -> str:
    """Training error over epochs of some arms; "" if none of them was trained."""
    drawn, end = [], 0.0
    for number, arm in enumerate(arms):
        for steps, curve in curves.get(arm, ()):
            points = [Point(step / steps, error, step) for step, error in curve]
            end = max(end, points[-1].seconds if points else 0.0)
            drawn.append(Curve(number, points))
    if not drawn:
        return ""
    names = " &nbsp; ".join(
        f'<span style="color:{colour(number)}">&#9632;</span> {name}'
        for number, name in enumerate(arms.values())
    )
    drawing = chart("Training error", drawn, Axis(end, unit="epochs"), percent=True)
    return f"<h2>{title}</h2><p>{names}; a line a seed</p>{drawing}"


def _dots(line: dict[str, Any]) -> str:
    """A row an arm, a dot a seed, a bar at the mean."""
    arms = {name: values for name, values in line["arms"].items() if values}
    if not arms:
        return ""
    measure = CLAIMS[line["claim"]].measure
    percent = measure not in ("iterations", "step_seconds")
    scale = 100 if percent else 1
    shown = [scale * value for values in arms.values() for value in values]
    step = round_ticks(max(shown) - min(shown))[1]
    first = math.floor(min(shown) / step)
    count = max(1, math.ceil(max(shown) / step) - first)
    ticks = [step * (first + n) for n in range(count + 1)]

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    low = ROW * len(arms)
    drawn = []
    for tick in ticks:
        drawn.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{low}"/>'
        )
        drawn.append(text(x(tick), low + 14, f"{tick:g}{'%' if percent else ''}"))
    for row, (name, values) in enumerate(arms.items()):
        y = ROW * (row + 0.5)
        drawn.append(text(LEFT - 8, y + 4, name, "end"))
        mean = x(scale * fmean(values))
        drawn.append(
            f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 8}" y2="{y + 8}" '
            f'stroke="{colour(row)}" stroke-width="2"/>'
        )
        drawn += [
            f'<circle cx="{x(scale * v):.1f}" cy="{y}" r="3.5" fill="{colour(row)}" '
            f'opacity=".7"><title>{scale * v:.4g}</title></circle>'
            for v in values
        ]
    title = f"{line['claim']}: {MEASURES.get(measure, 'Top-1 error')}"
    return figure(title, low + 20, drawn)
