"""`towers report`: runs as one HTML page that needs no network."""

from __future__ import annotations

import base64
import html
import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.storage import storage
from pipeline import checkpoint
from workers.charts import Axis, Curve, Point, chart, colour
from workers.config import UserError
from workers.evaluation_file import EVALUATION, damaged, read_evaluation
from workers.first_layer import colourfulness, grid
from workers.output import check_output, write_output
from workers.page import page
from workers.run import (
    CONFIG,
    EVENTS,
    METRICS,
    checkpoint_url,
    checkpoints,
    is_run,
    read_lines,
)

REPORT = "report.html"
WORST = 15  # classes that are listed
CELLS = 40  # classes up to which the confusion is drawn as a table
NAMED = 3  # runs up to which the charts name the steps of each

CHARTS: tuple[tuple[str, str, dict[str, bool]], ...] = (
    ("Loss", "loss", {}),
    ("Top-1 error", "top1_error", {"percent": True}),
    ("Top-5 error", "top5_error", {"percent": True}),
    ("Learning rate", "rate", {}),
    ("Images a second", "images_per_second", {}),
    ("Time waited for data", "stall_fraction", {"percent": True}),
    ("Augmenters", "augmenters", {"whole": True}),
)

EVENTS_TOLD = {
    "lost": ("restart", "restarts"),
    "stall": ("stall of the fleet", "stalls of the fleet"),
    "scale": ("change of its size", "changes of its size"),
}


@dataclass(frozen=True)
class Told:
    """What a run's files say. `name` tells it from the others of the page."""

    run: str
    name: str
    config: str
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    evaluation: dict[str, Any] | None

    @cached_property
    def start(self) -> float:
        """When it began."""
        return min((line["time"] for line in [*self.events, *self.metrics]), default=0.0)

    def seconds(self, line: dict[str, Any]) -> float:
        """When a line was written, after the start."""
        return float(line["time"] - self.start)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event for event in self.events if event["event"] == kind]


def report(runs: Sequence[str], output: str = "") -> dict[str, Any]:
    """Writes the page of runs to `output`, in the first run if unset; returns `file` and `runs`.

    Raises UserError if one is no run or the page cannot be written, DataError if a file of a run
    is damaged.
    """
    if output:
        names = (CONFIG, METRICS, EVENTS, EVALUATION)
        check_output(output, reads=[f"{run}/{name}" for run in runs for name in names])
    told = [_read(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    parts = [f"<h1>{html.escape(' and '.join(one.name for one in told))}</h1>", _legend(told)]
    parts += [_result(told), f'<div class="charts">{_charts(told)}</div>']
    for one in told:
        parts.append(f"<h2>{html.escape(one.name)}</h2>")
        parts += [_events(one), _kernels(one.run)]
        try:
            parts.append(_evaluation(one))
        except (KeyError, TypeError, ValueError, IndexError):
            raise damaged(one.run) from None
        parts.append(f"<h3>Configuration</h3><pre>{html.escape(one.config)}</pre>")
    file = output or f"{runs[0]}/{REPORT}"
    write_output(file, page("".join(parts)).encode())
    return {"file": file, "runs": list(runs)}


def _read(run: str, name: str) -> Told:
    if not is_run(run):
        raise UserError(f"{run}: no run there")
    fs, path = storage(run)
    config = fs.cat_file(f"{path}/{CONFIG}").decode(errors="replace")
    metrics, events = (read_lines(run, file) for file in (METRICS, EVENTS))
    return Told(run, name, config, metrics, events, read_evaluation(run))


def _names(runs: Sequence[str]) -> list[str]:
    """The folders' names, or all of their paths where two have the same."""
    short = [run.rstrip("/").rpartition("/")[2] for run in runs]
    return short if len(set(short)) == len(short) else list(runs)


def _legend(told: Sequence[Told]) -> str:
    names = (
        f'<span style="color:{colour(n)}">&#9632;</span> {html.escape(one.run)} &nbsp; '
        for n, one in enumerate(told)
    )
    text = (
        "Lines are training (where reports are many their mean, in a band from the least to the "
        "greatest), dots validation; a dashed line is a restart."
    )
    return f'<p>{"".join(names)}<br><span class="soft">{text}</span></p>'


def _result(told: Sequence[Told]) -> str:
    rows, averages = [], []
    for one in told:
        last = next((m for m in reversed(one.metrics) if m["split"] != "train"), None)
        kept = one.evaluation
        for what, line in (("in training", last), ("evaluated", kept)):
            if line:
                views = "" if line is last else _views(line)
                rows.append(_row(one.name, f"{what}, step {line['step']}{views}", line))
        if kept and (average := kept.get("average")) and average not in averages:
            averages.append(average)
    for average in averages:
        names = ", ".join(_names([line["run"] for line in average["runs"]]))
        weights = average["weights"]
        shares = "" if len(set(weights)) == 1 else f", weights {', '.join(map(str, weights))}"
        what = f"{len(weights)} runs averaged{_views(average)}{shares}"
        rows.append(_row(names, what, average))
    heads = "<tr><th>Run<th><th class=n>Images<th class=n>Loss<th class=n>Top-1<th class=n>Top-5"
    return f"<table>{heads}{''.join(rows)}</table>" if rows else ""


def _views(line: dict[str, Any]) -> str:
    crops = "1 crop" if line["crops"] == 1 else f"{line['crops']} crops"
    return html.escape(f", {line['split']}, {crops}")


def _row(name: str, what: str, line: dict[str, Any]) -> str:
    images = line.get("images", 0)
    return (
        f"<tr><td>{html.escape(name)}<td class=soft>{what}<td class=n>{images:,}"
        f"<td class=n>{line['loss']:.4f}<td class=n>{line['top1_error']:.2%}"
        f"<td class=n>{line['top5_error']:.2%}"
    )


def _charts(told: Sequence[Told]) -> str:
    """All charts, over the time since each run's start."""
    axis = Axis(
        max((one.seconds(line) for one in told for line in one.metrics), default=0.0),
        [
            (
                n,
                one.seconds(event),
                html.escape(f"restart: {', '.join(event.get('processes', []))} died"),
            )
            for n, one in enumerate(told)
            for event in one.of("lost")
        ],
        [
            [(one.seconds(m), m["step"]) for m in one.metrics if m["split"] == "train"]
            for one in told
        ]
        if len(told) <= NAMED
        else [],
    )
    drawn = []
    for title, name, options in CHARTS:
        curves = [c for n, one in enumerate(told) for c in _curves(n, one, name)]
        drawn.append(chart(title, curves, axis, **options))
    return "".join(drawn)


def _curves(number: int, one: Told, name: str) -> list[Curve]:
    """A quantity of a run: a line for each time that it trained without a stop, and dots."""
    starts = [one.seconds(event) for event in one.of("start")]
    pieces: dict[int, list[Point]] = {}
    dots = []
    for line in one.metrics:
        if name not in line:
            continue
        point = Point(one.seconds(line), float(line[name]), line["step"])
        if line["split"] == "train":
            pieces.setdefault(bisect_right(starts, point.seconds), []).append(point)
        else:
            dots.append(point)
    return [*(Curve(number, piece) for piece in pieces.values()), Curve(number, dots, dots=True)]


def _events(one: Told) -> str:
    if not one.events:
        return ""
    counts = [(len(one.of(kind)), words) for kind, words in EVENTS_TOLD.items()]
    return f"<p>{', '.join(f'{n} {words[n != 1]}' for n, words in counts)}.</p>"


def _kernels(run: str) -> str:
    kept = checkpoints(run)
    if not kept:
        return ""
    try:
        weights = checkpoint.load_weights(checkpoint_url(run, kept[-1]))
    except checkpoint.Damaged as error:
        return f"<p>No kernels: {html.escape(str(error))}.</p>"
    first = weights["conv1.weight"].float().numpy()
    columns = 2 if weights["conv2.weight"].shape[1] * 2 == len(first) else 1
    shown = []
    for name, own in zip("ab", np.split(first, columns), strict=False):
        what = f"Tower {name}" if columns == 2 else "One column"
        shown.append(
            f"<figure><b>{what}</b><br>{_picture(grid(own))}<figcaption>"
            f"{colourfulness(own):.0%} of its kernels' energy is colour</figcaption></figure>"
        )
    return f'<h3>First-layer kernels</h3><div class="kernels">{"".join(shown)}</div>'


def _picture(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{pixels.shape[1] * 4}" alt="" src="data:image/png;base64,{data}">'


def _evaluation(one: Told) -> str:
    kept = one.evaluation
    if not kept:
        return '<p class="soft">No evaluation yet: <code>towers evaluate</code> makes one.</p>'
    titles = [html.escape(known["title"]) for known in kept["classes"]]
    seen = [n for n, known in enumerate(kept["classes"]) if known["images"]]
    worst = sorted(seen, key=lambda n: -kept["classes"][n]["top1_error"])[:WORST]
    rows = "".join(
        f"<tr><td>{titles[n]}<td class=n>{kept['classes'][n]['images']}"
        f"<td class=n>{kept['classes'][n]['top1_error']:.1%}"
        for n in worst
    )
    heads = "<tr><th>Class<th class=n>Images<th class=n>Top-1 error"
    parts = [f"<h3>Worst classes</h3><table>{heads}{rows}</table>", _confusion(kept, titles)]
    for name, text in (("examples", "Examples"), ("mistakes", "Worst mistakes")):
        shown = "".join(_example(example, titles) for example in kept[name])
        parts.append(f'<h3>{text}</h3><div class="images">{shown}</div>' if shown else "")
    return "".join(parts)


def _confusion(kept: dict[str, Any], titles: list[str]) -> str:
    """A table of all classes if they are few, else the pairs that are taken for one another."""
    if len(titles) > CELLS:
        wrong = [cell for cell in kept["confusion"] if cell[0] != cell[1]]
        pairs = sorted(wrong, key=lambda cell: -cell[2])
        rows = "".join(
            f"<tr><td>{titles[true]}<td>{titles[taken]}<td class=n>{count}"
            for true, taken, count in pairs[:WORST]
        )
        return f"<h3>Confusion</h3><table><tr><th>Is<th>Taken for<th class=n>Images{rows}</table>"
    counts = {(true, taken): count for true, taken, count in kept["confusion"]}
    rows = ""
    for true, title in enumerate(titles):
        images = max(kept["classes"][true]["images"], 1)
        cells = (counts.get((true, taken), 0) for taken in range(len(titles)))
        shown = "".join(
            f'<td style="background:color-mix(in srgb, var(--s{2 if true == taken else 1}) '
            f'{60 * count / images:.0f}%, transparent)">{count or ""}'
            for taken, count in enumerate(cells)
        )
        rows += f"<tr><th>{true} {title}{shown}"
    heads = "".join(f"<td>{n}" for n in range(len(titles)))
    return f"<h3>Confusion: true by predicted</h3><table class=cells><tr><th>{heads}{rows}</table>"


def _example(one: dict[str, Any], titles: list[str]) -> str:
    bars = "".join(
        f"<div>{titles[number]} <span class=soft>{chance:.1%}</span></div>"
        f'<div class="bar{" right" if number == one["label"] else ""}" '
        f'style="width:{max(chance * 100, 0.5):.1f}%"></div>'
        for number, chance in one["best"]
    )
    return (
        f'<div><img width="128" alt="" src="data:image/jpeg;base64,{html.escape(one["image"])}">'
        f"<div><b>{titles[one['label']]}</b></div>{bars}</div>"
    )
