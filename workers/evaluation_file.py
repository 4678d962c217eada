"""What an evaluation leaves: `evaluation.json` in each run, and the figures that are printed."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from datasets import DataError
from datasets.augmentation import evaluation_views
from datasets.images import decode, encode, fit
from datasets.rows import Rows
from datasets.storage import storage, write_whole
from pipeline.evaluation import Verdicts, best
from workers.output import attempted
from workers.progress import Progress
from workers.sweep import Work
from workers.trained import Trained

EVALUATION = "evaluation.json"
EXAMPLES = 8  # images from all over the split, and as many of the worst mistakes
THUMBNAIL = 128  # pixels
FIGURES: tuple[tuple[str, Any], ...] = (
    *(("split", str), ("crops", int), ("images", int)),
    *((name, (int, float)) for name in ("loss", "top1_error", "top5_error")),
)
DETAILS = ("classes", "confusion", "examples", "mistakes")


def write_evaluation(
    work: Work,
    rows: NDArray[np.int64],
    verdicts: Sequence[Verdicts],
    skipped: int,
    progress: Progress,
) -> dict[str, Any]:
    """Keeps each network's evaluation in its run, and returns the figures of all.

    `rows` in order, with the verdicts of each network and, of several, of their average. A run that
    cannot be written to is said.
    """
    about = {
        "data": work.dataset.root,
        "split": work.split,
        "crops": work.views,
        "skipped": skipped,
    }
    of_runs = [
        {"run": network.run, "step": network.step, **verdict.means()}
        for network, verdict in zip(work.networks, verdicts, strict=False)
    ]
    overall: dict[str, Any] = {**about, **verdicts[-1].means()}
    if len(work.networks) > 1:
        overall["weights"] = list(work.shares or [1.0] * len(work.networks))
    result = {**overall, "runs": of_runs}
    for network, verdict, figures in zip(work.networks, verdicts, of_runs, strict=False):
        kept = {**about, **figures, **details(network, work, rows, verdict)}
        if len(work.networks) > 1:
            kept["average"] = result
        fs, path = storage(network.run)
        lost = f"{network.run}: the evaluation cannot be kept there"
        with attempted(lambda why, lost=lost: progress.say(f"{lost}: {why}")):  # type: ignore[misc]
            write_whole(fs, f"{path}/{EVALUATION}", (json.dumps(kept) + "\n").encode())
    return result


def read_evaluation(run: str) -> dict[str, Any] | None:
    """What `write_evaluation` kept last in a run; None if nothing.

    Raises DataError if it is something else.
    """
    fs, path = storage(run)
    if not fs.exists(f"{path}/{EVALUATION}"):
        return None
    try:
        kept: dict[str, Any] = dict(json.loads(fs.cat_file(f"{path}/{EVALUATION}")))
    except (ValueError, TypeError):
        kept = {}
    average = kept.get("average", {"runs": [], "weights": [], **kept})
    if not (
        all(isinstance(kept.get(name), list) for name in DETAILS)
        and isinstance(average, dict)
        and all(isinstance(average.get(name), list) for name in ("runs", "weights"))
        and all(isinstance(one, dict) and "run" in one for one in average["runs"])
        and type(kept.get("step")) is int
        and all(isinstance(of.get(n), kind) for of in (kept, average) for n, kind in FIGURES)
    ):
        raise damaged(run)
    return kept


def damaged(run: str) -> DataError:
    """What to raise for an evaluation that is none."""
    again = "`towers evaluate` writes it anew"
    return DataError(f"{run}/{EVALUATION}: no evaluation, or damaged; {again}")


def details(
    network: Trained, work: Work, rows: NDArray[np.int64], verdict: Verdicts
) -> dict[str, Any]:
    """`classes` with their errors, `confusion` as [true, predicted, images] where there are
    images, `examples` from all over the split and `mistakes`, those with the greatest loss.
    """
    classes = network.classes
    assert classes
    count = network.network.classes
    by_class = [
        {"name": classes.names[n], "title": classes.title(n), **figures}
        for n, figures in enumerate(verdict.by_class(count))
    ]
    wrong = (verdict.ranks > 0).nonzero()[:, 0]
    worst = wrong[verdict.losses[wrong].argsort(descending=True, stable=True)][:EXAMPLES]
    spaced = np.unique(np.linspace(0, len(rows) - 1, EXAMPLES).astype(np.int64))
    return {
        "classes": by_class,
        "confusion": verdict.confusion(count).tolist(),
        "examples": _examples(network, work, rows[spaced]),
        "mistakes": _examples(network, work, rows[worst.numpy()]),
    }


def _examples(network: Trained, work: Work, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Rows with a small picture (JPEG in base64), the true class, and the likeliest classes with
    their probabilities.
    """
    if not len(rows):
        return []
    image, crop = network.shape
    records = Rows(work.dataset, work.split).read(rows)
    pixels = [decode(record.image, record.place, image) for record in records]
    views = np.stack([evaluation_views(one, crop, work.views) for one in pixels])
    probabilities = network.classifier().probabilities(torch.from_numpy(views))
    classes, values = (found.tolist() for found in best(probabilities))
    return [
        {
            "row": record.row,
            "place": record.place,
            "label": record.label,
            "best": [list(pair) for pair in zip(*found, strict=True)],
            "image": base64.b64encode(_thumbnail(one)).decode(),
        }
        for record, one, *found in zip(records, pixels, classes, values, strict=True)
    ]


def _thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    small = min(THUMBNAIL, len(pixels))
    return encode(np.asarray(fit(Image.fromarray(pixels), small)), 85)
