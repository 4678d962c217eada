"""Damaged input of every kind is named, or read as if whole: no crash, no hang, little memory."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import made
import numpy as np
import pytest

from datasets import DataError
from datasets.drawn import write_drawn
from datasets.fetch import Entry, fetch
from datasets.images import standard
from datasets.rows import Rows
from datasets.scanning import scan
from datasets.shards import open_dataset
from datasets.sources import find_source
from datasets.statistics import Statistics

MEMORY = 512 << 20  # bytes that all of it may take


@pytest.fixture(scope="module", autouse=True)
def bounded() -> Iterator[None]:
    before = peak()
    yield
    assert peak() - before < MEMORY


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mutated(data: bytes, number: int) -> bytes:
    """`data` truncated, with bits flipped, overwritten or cut out, as `number` has it."""
    rng, damaged = np.random.default_rng(number), bytearray(data)
    at, kind = int(rng.integers(len(data))), int(rng.integers(4))
    if kind == 0:
        return data[:at]
    if kind == 1:
        for place in rng.integers(len(data), size=int(rng.integers(1, 9))).tolist():
            damaged[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        damaged[at : at + int(rng.integers(1, 64))] = rng.bytes(int(rng.integers(1, 64)))
    else:
        del damaged[at : at + int(rng.integers(1, 200))]
    return bytes(damaged)


def named(read: Callable[[], object]) -> int:
    """1 if what was wrong was said in a line, 0 if nothing was."""
    try:
        read()
    except DataError as error:
        said = str(error)
    else:
        return 0
    assert 10 < len(said) < 1000
    assert "\n" not in said
    return 1


def read_source(url: str) -> None:
    source = find_source(url)
    for part in source.parts:
        table = scan(source, part)[0].drop_columns(["label", "split"])
        entries = [Entry(**row, label=0) for row in table.to_pylist()]
        for entry, data in zip(
            entries, fetch(entries, source.dataset, part.split or "train"), strict=True
        ):
            if isinstance(data, bytes):
                named(lambda data=data, entry=entry: standard(data, entry.name, 16, 90))


def read_shards(url: str) -> None:
    dataset = open_dataset(url)
    for split in dataset.splits:
        for record in Rows(dataset, split).read(np.arange(dataset.rows(split)), []):
            named(lambda record=record: standard(record.image, record.place, 16, 90))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_images(kind: str) -> None:
    whole = made.encoded(1, kind)
    told = sum(named(lambda n=n: standard(mutated(whole, n), "x", 16, 90)) for n in range(200))
    assert 20 < told <= 200


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("ilsvrc", "train.tar"),
        ("tar", "photos.tar"),
        ("zip", "photos.zip"),
        ("stored zip", "photos.zip"),
        ("webdataset", "photos-000000.tar"),
        ("parquet", "data.parquet"),
        ("csv", "list.csv"),
        ("parquet list", "list.parquet"),
    ],
)
def test_sources(kind: str, file: str, tmp_path: Path) -> None:
    url = made.make(kind, tmp_path)
    whole = (tmp_path / file).read_bytes()
    told = 0
    for number in range(120):
        (tmp_path / file).write_bytes(mutated(whole, number))
        told += named(lambda: read_source(url))
    assert 20 < told <= 120


@pytest.mark.parametrize("file", ["dataset.json", "train-00000-of-00001.parquet"])
def test_shards(file: str, tmp_path: Path) -> None:
    write_drawn(str(tmp_path), train=12, val=4)
    whole = (tmp_path / file).read_bytes()
    told = 0
    for number in range(150):
        (tmp_path / file).write_bytes(mutated(whole, number))
        told += named(lambda: read_shards(str(tmp_path)))
    assert 20 < told <= 150


def test_statistics(tmp_path: Path) -> None:
    write_drawn(str(tmp_path), train=12, val=4)
    file = tmp_path / "statistics.npz"
    whole = file.read_bytes()
    told = 0
    for number in range(100):
        file.write_bytes(mutated(whole, number))
        told += named(lambda: Statistics.load(str(file)))
    assert 20 < told <= 100
