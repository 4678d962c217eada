"""A small data set that many tests train on, and one Ray for those that need no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from datasets.drawn import draw, write_drawn
from datasets.images import encode
from datasets.shards import write_manifest, write_split


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """150 training and 50 validation images of 72 pixels: three batches of 64, one short."""
    folder: Path = tmp_path_factory.mktemp("shards")
    write_drawn(str(folder), train=150, val=50)
    return str(folder)


@pytest.fixture(scope="session")
def large_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 photographs so large that one augmenter decodes fewer than two small towers train on."""
    folder, names = str(tmp_path_factory.mktemp("large")), [str(label) for label in range(10)]
    drawn = (draw(0, "train", number) for number in range(40))
    records = [
        (encode(pixels.repeat(24, 0).repeat(24, 1)), str(number), label)
        for number, (pixels, label) in enumerate(drawn)
    ]
    written = write_split(folder, "train", records, names, rows_per_group=4)
    write_manifest(folder, {"train": written}, names)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def processes() -> Callable[[str], list[int]]:
    """Tells the ids of this machine's processes that have a title, such as "ray::TowerActor"."""

    def find(title: str) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if folder.joinpath("cmdline").read_bytes().startswith(title.encode()):
                    found.append(int(folder.name))
            except OSError:  # it ended meanwhile
                continue
        return sorted(found)

    return find
