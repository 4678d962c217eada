"""`towers neighbours`: the images whose features are nearest to those of an image (paper, 6.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datasets import DataError
from datasets.augmentation import evaluation_views
from datasets.images import Pixels, decode
from datasets.layout import Dataset
from datasets.rows import Rows
from datasets.shards import open_dataset
from workers.config import UserError
from workers.data import training_data
from workers.feature_index import FeatureIndex, Near
from workers.output import check_output, write_output
from workers.predict import BATCH, image_files, open_known, read_image
from workers.progress import Progress
from workers.sweep import Device, OnError
from workers.trained import Step, Trained

SIDE, LINE = 144, 18  # pixels of the contact sheet's images and of a line below them


def neighbours(
    run: str,
    images: Sequence[str],
    *,
    data: str = "",
    split: str = "train",
    k: int = 5,
    step: Step = None,
    output: str = "",
    on_error: OnError = "fail",
    workers: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The `k` rows of a split whose features, what the last layer reads, have the least Euclidean
    distance to those of each image; and a contact sheet of them, a PNG, at `output` if it is given.

    `data`: shards, those of the run's training if unset. The features of all rows are computed by
    the workers of the cluster and kept as Parquet in the run until its checkpoint or the rows are
    others. Returns the keys of `towers neighbours --json`. Raises UserError and DataError for what
    the user can mend, RunFailed if rows were lost.
    """
    progress, network = progress or Progress(), open_known(run, step)
    if k < 1:
        raise UserError(f"k is {k}: at least 1")
    dataset = _dataset(network, data, split)
    files = [file for place in images for file in image_files(place)]
    if output:
        check_output(output, ".png", files)
    files, features = _features(network, files, on_error, progress)
    index = FeatureIndex(network, dataset, split, on_error, workers, device, progress)
    found = zip(files, index.nearest(features, k), strict=True)
    shown = [
        {"image": file, "neighbours": [_told(near, network, dataset, split) for near in nearest]}
        for file, nearest in found
    ]
    if output:
        write_output(output, contact_sheet(shown, dataset, split, network.config.image))
    about = {"run": run, "step": network.step, "data": dataset.root, "split": split}
    return {**about, "images": shown, **({"file": output} if output else {})}


def _dataset(network: Trained, data: str, split: str) -> Dataset:
    """The rows to look among."""
    dataset = open_dataset(data) if data else training_data(network.run, network.config)
    if not dataset:
        raise UserError(f"{network.run}: its training data is gone; name shards by --data")
    if split == "train" and network.config.images and not data:
        dataset = dataset.first(split, network.config.images)
    dataset.shards(split)
    return dataset


def _features(
    network: Trained, files: Sequence[str], on_error: OnError, progress: Progress
) -> tuple[list[str], Tensor]:
    """The images that can be read, and their features, float32 [images, units]."""
    classifier, features, kept = network.classifier(), [], []
    size, crop = network.shape
    for first in range(0, len(files), BATCH):
        views = []
        for file in files[first : first + BATCH]:
            try:
                views.append(evaluation_views(read_image(file, size), crop, 1)[0])
            except DataError as error:
                if on_error == "fail":
                    raise
                progress.say(f"skipped: {error}")
            else:
                kept.append(file)
        if views:
            features.append(classifier.features(torch.from_numpy(np.stack(views))))
    if not kept:
        raise UserError("no image is left to look for")
    return kept, torch.cat(features)


def _told(near: Near, network: Trained, dataset: Dataset, split: str) -> dict[str, Any]:
    name, known = dataset.classes[near.label], network.classes
    return {
        "row": near.row,
        "place": dataset.place(split, near.row),
        "class": name,
        "title": known.title(known.names.index(name)) if known and name in known.names else name,
        "distance": near.distance,
    }


def _font(size: int) -> Any:
    """One with more than English letters, if there is any."""
    for name in ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def contact_sheet(
    shown: Sequence[dict[str, Any]], dataset: Dataset, split: str, size: int
) -> bytes:
    """A PNG of a line for each image: itself, and what is near it by falling likeness."""
    across = 1 + max(len(one["neighbours"]) for one in shown)
    gap, high = 8, SIDE + 2 * LINE + 8
    sheet = Image.new("RGB", (across * (SIDE + gap) + 3 * gap, len(shown) * high + gap), "white")
    draw, font = ImageDraw.Draw(sheet), _font(12)

    def put(line: int, place: int, image: Pixels, *said: str) -> None:
        left, top = gap + place * (SIDE + gap) + (2 * gap if place else 0), gap + line * high
        sheet.paste(Image.fromarray(image).resize((SIDE, SIDE)), (left, top))
        for n, text in enumerate(" ".join(line.split()) for line in said):
            while draw.textlength(text, font) > SIDE:
                text = text[:-2].rstrip() + "\u2026"
            draw.text((left, top + SIDE + 1 + n * LINE), text, "black", font)

    reader = Rows(dataset, split)
    for line, one in enumerate(shown):
        put(line, 0, read_image(one["image"], size), one["image"].rpartition("/")[2])
        near = one["neighbours"]
        records = reader.read(np.array([n["row"] for n in near], np.int64))
        for place, (n, record) in enumerate(zip(near, records, strict=True), 1):
            found = decode(record.image, record.place, size)
            put(line, place, found, n["title"], f"{n['distance']:.4g}")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
