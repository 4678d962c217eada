"""What an augmenter makes of an item: the crops that the options ask for, kept as they allow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.augmentation import Augmentation, Batch, Loader
from datasets.drawn import write_drawn
from datasets.layout import Dataset
from datasets.plan import Itinerary
from datasets.statistics import Statistics
from workers.config import configure
from workers.fleet import Fleet
from workers.placement import decide

SIZE, CROP = 72, 64  # of the drawn images, and of alexnet-mini


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_drawn(str(tmp_path_factory.mktemp("drawn")), train=40, val=10)


@pytest.fixture(scope="module")
def statistics(data: Dataset) -> Statistics:
    return Statistics.load(f"{data.root}/statistics.npz")


def fleet(data: Dataset, statistics: Statistics, **options: Any) -> Fleet:
    given = {"network": "alexnet-mini", "batch": 16, "shards": data.root, "run": "r", "cache": 0.0}
    config = configure({**given, **options})
    held_out = ("val", data.groups("val"))
    itinerary = Itinerary(
        data.groups("train"), held_out, batch=16, seed=config.seed, epochs=config.epochs
    )
    return Fleet(data, itinerary, config, decide([{"CPU": 4}], config), statistics)


def same(a: Batch, b: Batch) -> bool:
    return np.array_equal(a.crops, b.crops) and np.array_equal(a.shifts, b.shifts)


@pytest.mark.parametrize(
    ("options", "augmentation"),
    [
        ({"mirror": False}, {"mirror": False}),
        ({"crops": False}, {"random_crop": False}),
        ({"pad": 4}, {"pad": 4}),
        ({"image": 80}, {"size": 80}),
        ({"colour": 0.2}, {"colour": 0.2}),
        ({"colour": 0.0}, {"colour": 0.0}),
        ({"colour_scale": "deviations"}, {}),
        ({"seed": 3}, {}),
    ],
    ids=str,
)
def test_each_option_changes_what_it_names(
    options: dict[str, Any], augmentation: dict[str, Any], data: Dataset, statistics: Statistics
) -> None:
    made = fleet(data, statistics, **options).load(0, 0, {}).batch
    colour = statistics.colour(options.get("colour_scale", "eigenvalues"))
    aug = Augmentation(**{"size": SIZE, "crop": CROP} | augmentation)
    seed = options.get("seed", 0)
    want = Loader(data, "train", aug, colour, seed=seed).load(made.rows, 0, True)
    assert same(made, want)
    plain = Loader(data, "train", Augmentation(SIZE, CROP), statistics.colour(), seed=0)
    assert not same(made, plain.load(made.rows, 0, True))


def test_a_node_keeps_as_many_bytes_as_it_may_shared_out_by_the_splits_rows(
    data: Dataset, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, loaders = fleet(data, statistics, cache=1e-4, epochs=2), dict[str, Loader]()
    for item in range(len(made.itinerary)):
        made.load(item, 0, loaders)
    each = SIZE * SIZE * 3 + 8
    files = tmp_path.rglob("*.pixels")
    assert sorted(file.stat().st_size for file in files) == [
        share // each * each
        for share in (20_000, 80_000)  # of 10 and of 40 rows
    ]
