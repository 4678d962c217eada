"""`towers predict`: what a trained network sees in images, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from datasets import DataError
from datasets.augmentation import evaluation_views
from datasets.images import MAX_BYTES, Pixels, decode, is_image
from datasets.storage import address, files_below, opened, passing, persistent, refused, storage
from pipeline.evaluation import best
from workers.config import UserError
from workers.data import Classes
from workers.sweep import Views, checked_views
from workers.trained import Step, Trained, open_trained

BATCH = 32  # images that are computed together


def predict(
    run: str,
    images: Sequence[str],
    *,
    crops: int = 1,
    step: Step = None,
    on_error: str = "fail",
) -> Iterator[dict[str, Any]]:
    """The likeliest classes of each image, at most five, falling: `image` and `classes`, each with
    its `class` (name), `title` and `probability`.

    `images`: files, folders or URLs of any image format that shards may hold, of any size; `crops`:
    1, the centre, or 10. Raises UserError for a run without checkpoint or whose data is not known,
    and for a folder without images, before the first image. For a file that is no image it raises
    DataError, after what the images before it have shown, or with `on_error` "skip" gives its
    `image` and why it was `skipped`.
    """
    views, network = checked_views(crops), open_known(run, step)
    found = [file for place in images for file in image_files(place)]
    return _predict(network, found, views, on_error == "skip")


def open_known(run: str, step: Step) -> Trained:
    """The network of a run. Raises UserError if its classes or statistics are not known."""
    network = open_trained(run, step)
    if not network.classes or not network.statistics:
        raise UserError(
            f"{run} does not know the classes and the mean of its training images; "
            "`towers evaluate RUN --data SHARDS` finds and keeps them"
        )
    return network


def image_files(place: str) -> list[str]:
    """The files of a folder, and of those in it, that are images by their names; a file itself.

    Raises DataError if nothing is there, UserError if a folder holds no image.
    """
    if is_image(place) and place.startswith(("http://", "https://")):
        return [place]  # or a server that does not answer would be asked before all else
    fs, path = storage(place)
    try:
        folder = persistent(place, lambda: fs.isdir(path))
    except Exception as error:
        if not refused(error):
            raise
        folder = False
    if not folder:
        return [place]  # which `opened` names if it is missing, or may not be read
    if not (files := [address(fs, name) for name in files_below(fs, path) if is_image(name)]):
        raise UserError(f"{place}: no image in this folder; name files, or a folder of them")
    return files


def read_image(place: str, size: int) -> Pixels:
    """The image at a path or URL, fitted to `size`: uint8 [size, size, 3].

    Raises DataError if it is missing or no image.
    """
    with opened(place) as file:
        data: bytes = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"{place}: more than {MAX_BYTES >> 20} MiB; is it an image?")
    return decode(data, place, size)


def _predict(
    network: Trained, files: list[str], views: Views, skip: bool
) -> Iterator[dict[str, Any]]:
    assert network.classes
    classifier, (image, crop) = network.classifier(), network.shape
    left = iter(files)
    while some := list(islice(left, BATCH)):
        read: list[str] = []
        seen: list[Any] = []
        fault: DataError | None = None
        for file in some:
            try:
                seen.append(evaluation_views(read_image(file, image), crop, views))
                read.append(file)
            except DataError as error:
                if not skip or (error.__cause__ and passing(error.__cause__)):
                    fault = error
                    break
                yield {"image": file, "skipped": str(error)}
        if seen:
            probabilities = classifier.probabilities(torch.from_numpy(np.stack(seen)))
            classes, values = (found.tolist() for found in best(probabilities))
            for file, *likeliest in zip(read, classes, values, strict=True):
                yield {"image": file, "classes": _named(network.classes, *likeliest)}
        if fault:
            raise fault


def _named(
    classes: Classes, numbers: Sequence[int], chances: Sequence[float]
) -> list[dict[str, Any]]:
    return [
        {
            "class": classes.names[number],
            "title": classes.title(number),
            "probability": chance,
        }
        for number, chance in zip(numbers, chances, strict=True)
    ]
