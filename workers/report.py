"""`towers report`: runs as one HTML page that needs no network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.layout import write_whole
from pipeline import checkpoint
from workers.config import UserError
from workers.evaluation_file import read_evaluation
from workers.run import CONFIG, EVENTS, METRICS, checkpoint_url, checkpoints

REPORT = "report.html"
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 200, 52, 22  # of a chart, in pixels
WORST = 15  # classes that are listed
CELLS = 40  # classes up to which the confusion is drawn as a table

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #67707d; --line: #d9dee5; --paper: #fff;
  --s0: #2f6fb3; --s1: #c8641b; --s2: #2a8a57; --s3: #8a4fb0; --s4: #b23a55; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa4b2; --line: #343c47;
  --paper: #14181d; --s0: #6ba6e8; --s1: #f0975a; --s2: #62c08f; --s3: #bd8ce0; --s4: #e8788f; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; font-weight: 600; } h2 { margin-top: 2.2rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
figcaption, .soft, td.soft { color: var(--soft); font-size: 13px; }
svg text { fill: var(--soft); font-size: 11px; } svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.6; }
table { border-collapse: collapse; } td, th { padding: 2px 10px 2px 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.cells td { padding: 2px 5px; text-align: right; font-size: 12px; min-width: 24px; }
.kernels { display: flex; gap: 2rem; flex-wrap: wrap; }
.charts { margin-top: 1.2rem; }
img { image-rendering: pixelated; max-width: 100%; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem; }
.bar { height: 8px; background: var(--s0); } .bar.right { background: var(--s2); }
pre { background: color-mix(in srgb, var(--line) 40%, transparent); padding: 1rem; overflow: auto; }
"""

CHARTS = (
    ("Loss", "loss", "step"),
    ("Top-1 error", "top1_error", "step"),
    ("Top-5 error", "top5_error", "step"),
    ("Learning rate", "rate", "step"),
    ("Images a second", "images_per_second", "time"),
    ("Time waited for data", "stall_fraction", "time"),
    ("Augmenters", "augmenters", "time"),
)

SHARES = ("top1_error", "top5_error", "stall_fraction")  # shown in per cent


def report(runs: Sequence[str], output: str = "") -> dict[str, Any]:
    """Writes the page of runs to `output`, in the first run if unset; returns `file` and `runs`.

    Raises UserError if one is no run.
    """
    told = [_read(run) for run in runs]
    charts = "".join(_chart(told, *chart) for chart in CHARTS)
    parts = [f"<h1>{html.escape(' and '.join(_name(run) for run in runs))}</h1>", _legend(runs)]
    parts += [_result(told), f'<div class="charts">{charts}</div>']
    for one in told:
        parts.append(f"<h2>{html.escape(_name(one['run']))}</h2>")
        parts += [_events(one), _kernels(one["run"]), _evaluation(one["run"])]
        parts.append(f"<h3>Configuration</h3><pre>{html.escape(one['config'])}</pre>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Towers</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    file = output or f"{runs[0]}/{REPORT}"
    fs, path = fsspec.core.url_to_fs(file)
    write_whole(fs, path, page.encode())
    return {"file": file, "runs": list(runs)}


def _read(run: str) -> dict[str, Any]:
    fs, path = fsspec.core.url_to_fs(run)
    if not fs.exists(f"{path}/{CONFIG}"):
        raise UserError(f"{run}: no run there")

    def lines(name: str) -> list[dict[str, Any]]:
        if not fs.exists(f"{path}/{name}"):
            return []
        whole = fs.cat_file(f"{path}/{name}").rpartition(b"\n")[0]  # a run may be writing
        return [json.loads(line) for line in whole.splitlines()]

    config = fs.cat_file(f"{path}/{CONFIG}").decode()
    return {"run": run, "config": config, "metrics": lines(METRICS), "events": lines(EVENTS)}


def _name(run: str) -> str:
    return run.rstrip("/").rpartition("/")[2]


def _legend(runs: Sequence[str]) -> str:
    names = (
        f'<span style="color:var(--s{n % 5})">&#9632;</span> {html.escape(run)} &nbsp; '
        for n, run in enumerate(runs)
    )
    return f'<p>{"".join(names)}<br><span class="soft">Lines are training, dots validation.</span>'


def _result(told: list[dict[str, Any]]) -> str:
    rows = []
    for one in told:
        last = next((m for m in reversed(one["metrics"]) if m["split"] != "train"), None)
        kept = read_evaluation(one["run"])
        for what, line in (("in training", last), ("evaluated", kept)):
            if line:
                rows.append(
                    f"<tr><td>{html.escape(_name(one['run']))}<td class=soft>{what}, step "
                    f"{line['step']}<td class=n>{line['images']:,}<td class=n>{line['loss']:.4f}"
                    f"<td class=n>{line['top1_error']:.2%}<td class=n>{line['top5_error']:.2%}"
                )
    heads = "<tr><th>Run<th><th class=n>Images<th class=n>Loss<th class=n>Top-1<th class=n>Top-5"
    return f"<table>{heads}{''.join(rows)}</table>" if rows else ""


def _chart(told: list[dict[str, Any]], title: str, name: str, axis: str) -> str:
    """One quantity of all runs, over steps or over the minutes since each run's start."""
    lines: list[tuple[int, bool, list[tuple[float, float]]]] = []
    restarts: list[tuple[int, float]] = []
    for n, one in enumerate(told):
        start = min((line["time"] for line in one["metrics"]), default=0.0)

        def at(line: dict[str, Any], start: float = start) -> float:
            return float(line["step"]) if axis == "step" else (line["time"] - start) / 60

        for training in (True, False):
            some = [m for m in one["metrics"] if (m["split"] == "train") == training and name in m]
            if some:
                lines.append((n, training, [(at(m), float(m[name])) for m in some]))
        if axis == "time":
            restarts += [(n, at(e)) for e in one["events"] if e["event"] == "lost"]
    points = [point for *_, line in lines for point in line if np.isfinite(point[1])]
    if not points:
        return ""
    right = max(x for x, _ in points) or 1.0
    top = max(y for _, y in points) or 1.0
    plot = WIDTH - LEFT - 8, HEIGHT - BOTTOM - 10

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + plot[0] * x / right, 10 + plot[1] * (1 - y / top)

    drawn = []
    for k in range(5):
        y = place(0, top * k / 4)[1]
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f"{top * k / 4:.1%}" if name in SHARES else _short(top * k / 4)
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        x = place(right * k / 4, 0)[0]
        label = _short(right * k / 4)
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{label}</text>')
    for n, x in restarts:
        at_x = place(min(max(x, 0), right), 0)[0]
        drawn.append(
            f'<line x1="{at_x:.1f}" x2="{at_x:.1f}" y1="10" y2="{HEIGHT - BOTTOM}" '
            f'stroke="var(--s{n % 5})" stroke-dasharray="3 3"><title>restart</title></line>'
        )
    for n, training, line in lines:
        shown = [place(x, y) for x, y in line if np.isfinite(y)]
        if training:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
            drawn.append(f'<polyline points="{text}" stroke="var(--s{n % 5})"/>')
        else:
            drawn += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--s{n % 5})"/>'
                for x, y in shown
            ]
    over = "steps" if axis == "step" else "minutes since the first report; dashed: a restart"
    return (
        f'<figure><b>{title}</b><br><svg width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{title}">{"".join(drawn)}</svg><figcaption>over {over}</figcaption></figure>'
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _events(one: dict[str, Any]) -> str:
    kinds = {"lost": "restarts", "stall": "stalls of the fleet", "scale": "changes of its size"}
    counts = {
        what: sum(event["event"] == kind for event in one["events"]) for kind, what in kinds.items()
    }
    return f"<p>{', '.join(f'{count} {what}' for what, count in counts.items())}.</p>"


def colourfulness(kernels: NDArray[np.float32]) -> float:
    """How much colour first-layer kernels float32 [n, 3, k, k] use: the share of their energy, the
    mean over kernels, that lies outside of grey. 0 of grey kernels alone.
    """
    grey = kernels.mean(axis=1, keepdims=True)
    energy = (kernels**2).sum(axis=(1, 2, 3))
    beside = ((kernels - grey) ** 2).sum(axis=(1, 2, 3))
    return float((beside / np.maximum(energy, 1e-30)).mean())


def _kernels(run: str) -> str:
    kept = checkpoints(run)
    if not kept:
        return ""
    weights = checkpoint.load_weights(checkpoint_url(run, kept[-1]))
    first = weights["conv1.weight"].float().numpy()
    columns = 2 if weights["conv2.weight"].shape[1] * 2 == len(first) else 1
    shown = []
    for name, own in zip("ab", np.split(first, columns), strict=False):
        what = f"Tower {name}" if columns == 2 else "One column"
        shown.append(
            f"<figure><b>{what}</b><br>{_picture(_grid(own))}<figcaption>"
            f"{colourfulness(own):.0%} of its kernels' energy is colour</figcaption></figure>"
        )
    return f'<h3>First-layer kernels</h3><div class="kernels">{"".join(shown)}</div>'


def _grid(kernels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Kernels [n, 3, k, k] side by side, each stretched to its own greatest weight."""
    n, _, k, _ = kernels.shape
    across = 8
    grid = np.full((-(-n // across) * (k + 1) + 1, across * (k + 1) + 1, 3), 128, np.uint8)
    for i, kernel in enumerate(kernels):
        top, left = (1 + place * (k + 1) for place in divmod(i, across))
        scaled = 127.5 + 127.5 * kernel / max(float(np.abs(kernel).max()), 1e-30)
        grid[top : top + k, left : left + k] = scaled.transpose(1, 2, 0).round().astype(np.uint8)
    return grid


def _picture(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{pixels.shape[1] * 4}" alt="" src="data:image/png;base64,{data}">'


def _evaluation(run: str) -> str:
    kept = read_evaluation(run)
    if not kept:
        return '<p class="soft">No evaluation yet: <code>towers evaluate</code> makes one.</p>'
    titles = [html.escape(one["title"]) for one in kept["classes"]]
    seen = [n for n, one in enumerate(kept["classes"]) if one["images"]]
    worst = sorted(seen, key=lambda n: -kept["classes"][n]["top1_error"])[:WORST]
    rows = "".join(
        f"<tr><td>{titles[n]}<td class=n>{kept['classes'][n]['images']}"
        f"<td class=n>{kept['classes'][n]['top1_error']:.1%}"
        for n in worst
    )
    heads = "<tr><th>Class<th class=n>Images<th class=n>Top-1 error"
    parts = [f"<h3>Worst classes</h3><table>{heads}{rows}</table>", _confusion(kept, titles)]
    for name, text in (("examples", "Examples"), ("mistakes", "Worst mistakes")):
        shown = "".join(_example(one, titles) for one in kept[name])
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
        f'<div><img width="128" alt="" src="data:image/jpeg;base64,{one["image"]}">'
        f"<div><b>{titles[one['label']]}</b></div>{bars}</div>"
    )
