"""The data of a run: opened and checked, drawn where none is named, its statistics measured."""

from __future__ import annotations

import fsspec

from datasets import DataError
from datasets.drawn import write_drawn
from datasets.layout import Dataset
from datasets.shards import open_dataset
from datasets.statistics import Statistics
from workers.config import Config
from workers.fleet import measure
from workers.placement import Placement
from workers.progress import Progress
from workers.run import RunFolder


def check_classes(dataset: Dataset) -> None:
    """Raises DataError for a data set that a network cannot tell classes of."""
    if (count := len(dataset.classes)) < 2:
        raise DataError(f"{dataset.root}: labels of {count} class; a network tells 2 or more apart")


def drawn(folder: RunFolder, progress: Progress) -> Dataset:
    """The built-in data set beside the run, so that all nodes that see the one see the other."""
    url = f"{folder.url}/shards"
    if not folder.fs.exists(f"{folder.path}/shards/dataset.json"):
        progress.say("drawing the built-in data set")
        write_drawn(url)
    return open_dataset(url)


def statistics_of(
    dataset: Dataset, config: Config, folder: RunFolder, where: Placement, progress: Progress
) -> Statistics:
    """Those of the shards if they were made for this image size, else measured and kept."""
    kept = f"{folder.url}/statistics.npz"
    for url in (f"{dataset.root.rstrip('/')}/statistics.npz", kept):
        fs, path = fsspec.core.url_to_fs(url)
        if fs.exists(path):
            statistics = Statistics.load(url)
            if statistics.mean_image.shape[0] == config.image:
                return statistics
    progress.say(f"measuring mean and colours of {dataset.rows('train')} images")
    statistics = measure(dataset, config.image, config.on_error, where.augmenter)
    statistics.save(kept)
    return statistics
