"""A profile: what every rank did in some steps, for a browser, and the picture of one step."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from pipeline.mesh import Mesh
from pipeline.tracing import Span, chrome, idle_fraction

WIDTH, ROW, LEFT, TOP = 1600, 64, 260, 84
COLOURS = {
    "forward": "#4c78a8",
    "backward": "#f58518",
    "optimizer": "#8d8d8d",
    "exchange": "#54a24b",
    "wait": "#e45756",
    "data": "#b279a2",
}
MEANING = {
    "exchange": "exchange under way",
    "wait": "waiting for another rank",
    "data": "waiting for data",
}


def write_profile(folder: str, traces: Mapping[int, Sequence[Span]], mesh: Mesh) -> list[int]:
    """trace.json for Chrome or Perfetto, and schedule.png of one step, of the spans of each rank.
    Returns the steps that they are of; nothing is written if there are none.
    """
    ranks, names = [traces[rank] for rank in range(mesh.size)], []
    for rank in range(mesh.size):
        replica, stage, tower = mesh.place(rank)
        place = [f"replica {replica}"] if mesh.replicas > 1 else []
        place += [f"stage {stage}"] if mesh.stages > 1 else []
        place += [f"tower {'ab'[tower]}"] if mesh.towers > 1 else []
        names.append(f"rank {rank}: {', '.join(place) or 'both towers'}")
    steps = sorted({span.step for spans in ranks for span in spans})
    if steps:
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/trace.json", "w") as f:
            json.dump(chrome(ranks, names), f)
        with open(f"{folder}/schedule.png", "wb") as f:
            f.write(picture(ranks, names, steps[len(steps) // 2]))
    return steps


def picture(ranks: Sequence[Sequence[Span]], names: Sequence[str], step: int) -> bytes:
    """A PNG of what each rank did in `step`: computation in wide bars with the number of the
    micro-batch, waiting inside them, exchanges in a narrow bar below. White is a bubble.
    """
    shown = [[s for s in spans if s.step == step] for spans in ranks]
    everything = [s for spans in shown for s in spans]
    start = min(s.start for s in everything)
    seconds = max(s.start + s.seconds for s in everything) - start
    image = Image.new("RGB", (WIDTH, TOP + ROW * len(ranks) + 44), "white")
    draw = ImageDraw.Draw(image)
    small, normal, large = (ImageFont.load_default(size) for size in (12, 15, 20))

    def x(t: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * (t - start) / seconds

    idle = idle_fraction(ranks, step)
    draw.text((16, 12), f"step {step}: {seconds * 1e3:.0f} ms, idle {idle:.0%}", "black", large)
    place = float(LEFT)
    for kind, colour in COLOURS.items():
        draw.rectangle((place, 48, place + 16, 64), colour)
        text = MEANING.get(kind, kind)
        draw.text((place + 22, 48), text, "black", normal)
        place += 52 + draw.textlength(text, normal)
    for row, (spans, name) in enumerate(zip(shown, names, strict=True)):
        top = TOP + ROW * row
        draw.line((LEFT, top + ROW - 6, WIDTH - 20, top + ROW - 6), "#e0e0e0")
        draw.text((16, top + 10), name, "black", normal)
        # Waiting lies inside of computation, so it is drawn after it.
        for kind in ("forward", "backward", "optimizer", "data", "wait", "exchange"):
            low, high = (42, 52) if kind == "exchange" else (4, 38)
            low = 26 if kind == "wait" else low
            for s in spans:
                if s.kind != kind:
                    continue
                box = (
                    x(s.start),
                    top + low,
                    max(x(s.start) + 1, x(s.start + s.seconds)),
                    top + high,
                )
                edge = "white" if kind in ("forward", "backward") else None
                draw.rectangle(box, COLOURS[kind], edge)
                if kind in ("forward", "backward") and box[2] - box[0] > 14:
                    draw.text((box[0] + 4, top + 7), s.name, "white", small)
    axis = TOP + ROW * len(ranks)
    for tick in range(6):
        at = start + seconds * tick / 5
        text = f"{(at - start) * 1e3:.0f} ms"
        draw.text((x(at) - draw.textlength(text, small) / 2 - 4, axis + 8), text, "black", small)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
