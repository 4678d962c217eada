"""A search as one page: its trials in parallel coordinates and in a table, and the best recipe."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from workers.charts import text
from workers.page import page
from workers.space import Domain, Space

# Pixels: of the figure, between its axes, and margins.
WIDTH, PLOT, TOP, SIDE = 1000, 260, 30, 70
MARKS = 5  # on an axis without choices

ABOUT = (
    "A line is a trial: where it crosses an axis is what it had there. Thick is the best trial, "
    "dashed the recipe as it was; pale ones ended early, those that failed are left out."
)


def search_page(
    result: dict[str, Any], lines: Sequence[dict[str, Any]], space: Space, config: str
) -> str:
    """The page of a search's result, its trials as trials.jsonl has them, and best.toml."""
    name = result["run"].rstrip("/").rpartition("/")[2]
    counts = f"{result['trials']} trials, {result['finished']} of them to their end"
    if result["failed"]:
        counts += f", {result['failed']} failed"
    shown = [line for line in lines if line["state"] != "failed"]
    minutes = sum(line["seconds"] for line in lines) / 60
    again = ""
    if (confirmed := result["confirmed"]) and "lower" in confirmed:
        count = len(confirmed["seeds"])
        told = "; in brackets 95% of what the spread between seeds allows"
        again = (
            f"<p>From {count} other seed{'s' * (count > 1)} the best recipe's top-1 error is lower "
            f"than that of the recipe as it was by {lower(confirmed)}"
            f"{told * ('at_least' in confirmed)}.</p>"
        )
    parts = [
        f"<h1>{html.escape(name)}</h1><p>{counts}; {minutes:.1f} minutes of trials.</p>",
        again,
        coordinates(shown, space, result["best"], result["recipe"]),
        f"<h2>Trials</h2>{_table(lines, space)}",
        f"<h2>The best recipe</h2><pre>{html.escape(config)}</pre>",
    ]
    return page("".join(parts))


def lower(confirmed: dict[str, Any]) -> str:
    """By how much the best recipe's error is lower from other seeds, for a person."""
    points = f"{100 * confirmed['lower']:.1f} points"
    if "at_least" not in confirmed:
        return points
    return f"{points} ({100 * confirmed['at_least']:.1f} to {100 * confirmed['at_most']:.1f})"


def coordinates(
    lines: Sequence[dict[str, Any]],
    space: Space,
    best: dict[str, Any],
    recipe: dict[str, Any] | None,
) -> str:
    """Parallel coordinates: an axis a setting, the last for the error; a line a trial."""
    errors = [line["top1_error"] for line in lines]
    low, high = min(errors), max(errors)
    axes: list[tuple[str, Domain]] = [*space.items()]
    axes.append(("top1_error", Domain((), low, high if high > low else low + 1e-3)))
    step = (WIDTH - 2 * SIDE) / (len(axes) - 1)
    drawn = []
    for n, (name, domain) in enumerate(axes):
        drawn.append(_axis(SIDE + n * step, name, domain, error=n == len(axes) - 1, row=n % 2))
    for line in sorted(lines, key=lambda line: -line["top1_error"]):  # the best on top
        values = {**line["settings"], "top1_error": line["top1_error"]}
        places = [
            f"{SIDE + n * step:.1f},{TOP + PLOT * (1 - _place(domain, values[name])):.1f}"
            for n, (name, domain) in enumerate(axes)
        ]
        share = (line["top1_error"] - low) / (high - low) if high > low else 0.0
        stroke = f"color-mix(in srgb, var(--s1) {100 * share:.0f}%, var(--s0))"
        style = f"stroke:{stroke};opacity:{0.35 if line['state'] == 'ended early' else 0.9}"
        if line == best:
            style += ";stroke-width:4;opacity:1"
        dashes = ' stroke-dasharray="6 4"' if recipe and line == recipe else ""
        told = html.escape(f"{line['trial']}: {line['top1_error']:.2%}, {_told(line['settings'])}")
        drawn.append(
            f'<polyline points="{" ".join(places)}" style="{style}"{dashes}>'
            f"<title>{told}</title></polyline>"
        )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {TOP + PLOT + 34}" width="{WIDTH}" role="img" '
        f'aria-label="Parallel coordinates">{"".join(drawn)}</svg>'
        f"<figcaption>{ABOUT}</figcaption></figure>"
    )


def _place(domain: Domain, value: Any) -> float:
    """How far up its axis a value stands, 0 to 1; one outside the domain at the nearer end."""
    if domain.choices:
        choices = list(map(_as_tuple, domain.choices))
        value = _as_tuple(value)
        return (choices.index(value) + 0.5) / len(choices) if value in choices else 0.0
    low, high = domain.low, domain.high
    if domain.log:
        low, high, value = math.log(low), math.log(high), math.log(max(value, low))
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _axis(x: float, name: str, domain: Domain, *, error: bool, row: int) -> str:
    parts = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + PLOT}"/>',
        # Names in two rows, or long ones run into each other.
        text(x, TOP + PLOT + 16 + 14 * row, "top-1 error" if error else name),
    ]
    for value in domain.choices or _marks(domain):
        y = TOP + PLOT * (1 - _place(domain, value)) + 4
        parts.append(text(x - 5, y, f"{value:.1%}" if error else _shown(value), "end"))
    return "".join(parts)


def _marks(domain: Domain) -> list[float]:
    shares = [n / (MARKS - 1) for n in range(MARKS)]
    if domain.log:
        ratio = domain.high / domain.low
        marks = [domain.low * ratio**share for share in shares]
    else:
        marks = [domain.low + (domain.high - domain.low) * share for share in shares]
    return sorted({round(mark) for mark in marks}) if domain.whole else marks


def _table(lines: Sequence[dict[str, Any]], space: Space) -> str:
    heads = "<th>Trial<th class=n>Top-1<th class=n>Top-5<th class=n>Epochs"
    heads += "".join(f"<th class=n>{name}" for name in space)
    rows = []
    for line in sorted(lines, key=_rank):
        if line["state"] == "failed":
            figures = f'<td class=soft colspan="3">{html.escape(line["why"])}'
        else:
            figures = (
                f"<td class=n>{line['top1_error']:.2%}<td class=n>{line['top5_error']:.2%}"
                f"<td class=n>{line['epoch']}"
            )
        settings = "".join(f"<td class=n>{_shown(line['settings'][name])}" for name in space)
        rows.append(f"<tr><td>{html.escape(line['trial'])}{figures}{settings}")
    return f'<div style="overflow-x:auto"><table><tr>{heads}{"".join(rows)}</table></div>'


def _rank(line: dict[str, Any]) -> tuple[bool, float]:
    """The best first; those that failed last, with an error or without."""
    failed = line["state"] == "failed"
    return failed, 0.0 if failed else line["top1_error"]


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in settings.items())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else html.escape(str(value))
