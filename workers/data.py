"""The data of a run: opened and checked, drawn where none is named, its statistics measured.

A run keeps what its network needs to know of the data, so that it can be used where that is not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from datasets import DataError
from datasets.drawn import write_drawn
from datasets.layout import Dataset
from datasets.shards import open_dataset, read_manifest
from datasets.statistics import STATISTICS, Statistics
from datasets.storage import storage, write_whole
from workers.config import Config
from workers.measure import measure
from workers.progress import Progress

CLASSES = "classes.json"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set in order, and what their names mean where the names don't say."""

    names: tuple[str, ...]
    words: dict[str, str]

    def title(self, number: int) -> str:
        """What to call a class before a person."""
        name = self.names[number]
        return self.words.get(name, name).partition(",")[0]

    @property
    def numbered(self) -> bool:
        """Whether nothing named the classes."""
        return self.names == tuple(map(str, range(len(self.names))))


def numbered(classes: Classes, count: int) -> Classes:
    """These classes, or if nothing names them as many as `count`."""
    return Classes(tuple(map(str, range(count))), {}) if classes.numbered else classes


def check_classes(dataset: Dataset) -> None:
    """Raises DataError for a data set that a network cannot tell classes of."""
    if (count := len(dataset.classes)) < 2:
        raise DataError(f"{dataset.root}: labels of {count} class; a network tells 2 or more apart")


def drawn(folder: str, progress: Progress) -> Dataset:
    """The built-in data set beside a run, so that all nodes that see the one see the other."""
    url = f"{folder}/shards"
    fs, path = storage(url)
    if not fs.exists(f"{path}/dataset.json"):
        progress.say("drawing the built-in data set")
        try:
            write_drawn(url)
        except OSError as error:
            raise DataError(f"{url} cannot be written: {error}") from None
    return open_dataset(url)


def measured(
    dataset: Dataset, config: Config, resources: dict[str, float], progress: Progress
) -> Statistics:
    """The statistics of the training images, by tasks with these resources."""
    progress.say(f"measuring mean and colours of {dataset.rows('train')} images")
    return measure(dataset, config.image, config.on_error, resources, progress)


def known_statistics(image: int, *folders: str) -> Statistics | None:
    """The first statistics of images of this size that lie in one of the folders."""
    for folder in folders:
        url = f"{folder.rstrip('/')}/{STATISTICS}"
        fs, path = storage(url)
        if fs.exists(path):
            statistics = Statistics.load(url)
            if statistics.mean_image.shape[0] == image:
                return statistics
    return None


def classes_of(dataset: Dataset) -> Classes:
    """The classes of a data set."""
    return Classes(dataset.classes, dict((read_manifest(dataset.root) or {}).get("words") or {}))


def keep(run: str, classes: Classes, statistics: Statistics | None) -> None:
    """Writes what a run's network needs to know of the data into the run."""
    text = json.dumps({"classes": classes.names, "words": classes.words}, indent=1) + "\n"
    fs, path = storage(run)
    write_whole(fs, f"{path}/{CLASSES}", text.encode())
    if statistics:
        statistics.save(f"{run}/{STATISTICS}")


def kept_classes(run: str) -> Classes | None:
    """What `keep` wrote; None if it did not. Raises DataError if it is something else."""
    fs, path = storage(run)
    if not fs.exists(f"{path}/{CLASSES}"):
        return None
    try:
        found: dict[str, Any] = json.loads(fs.cat_file(f"{path}/{CLASSES}"))
        names, words = found["classes"], dict(found["words"])
        if not isinstance(names, list) or not all(
            isinstance(name, str) for name in (*names, *words.values())
        ):
            raise TypeError("classes and words are no names")
        return Classes(tuple(names), words)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{run}/{CLASSES}: not readable ({error!r}); remove it") from None


def training_data(run: str, config: Config) -> Dataset | None:
    """The data set that a run was trained on, if it is still there."""
    try:
        return open_dataset(config.shards or f"{run}/shards")
    except DataError:
        return None
