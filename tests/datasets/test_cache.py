"""A cache gives what decoding gives, to all processes, and nothing where it cannot."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import DataError, augmentation, cache
from datasets.augmentation import Augmentation, Batch, Loader
from datasets.cache import PixelCache
from datasets.images import encode
from datasets.layout import Dataset
from datasets.shards import open_dataset, write_manifest, write_split

pytestmark = pytest.mark.usefixtures("place")

AUG, EACH = Augmentation(20, 12), 20 * 20 * 3 + 8  # bytes that a kept image takes
ALL = 1e6


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def write(folder: Path, images: list[bytes]) -> Dataset:
    records = [(data, f"{i}.jpg", i % 2) for i, data in enumerate(images)]
    shards = write_split(str(folder), "train", records, ("a", "b"), rows_per_group=3)
    write_manifest(str(folder), {"train": shards}, ("a", "b"), size=20)
    return open_dataset(str(folder))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return write(tmp_path / "shards", [encode(picture(i)) for i in range(8)])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the images stand that are decoded."""
    places: list[str] = []
    decode = augmentation.decode

    def noted(data: bytes, place: str, *args: int, **more: int) -> np.ndarray:
        places.append(place)
        return decode(data, place, *args, **more)

    monkeypatch.setattr(augmentation, "decode", noted)
    return places


def loader(data: Dataset, most: float = ALL, **more: str) -> Loader:
    return Loader(data, "train", AUG, np.eye(3), seed=3, cache=most, **more)  # type: ignore[arg-type]


def equal(a: Batch, b: Batch) -> bool:
    arrays = ("crops", "labels", "shifts", "rows")
    same = all(getattr(a, n).tobytes() == getattr(b, n).tobytes() for n in arrays)
    return same and (a.skipped, a.faults) == (b.skipped, b.faults)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(st.integers(0, 7), unique=True), min_size=1, max_size=4),
    room=st.integers(0, 9),
)
def test_batches_are_those_that_decoding_makes(
    data: Dataset, batches: list[list[int]], room: int
) -> None:
    keeps, decodes = loader(data, room * EACH), loader(data, 0)
    for epoch, batch in enumerate(batches):
        rows = np.array(batch, np.int64)
        for train in (True, False):
            assert equal(keeps.load(rows, epoch, train), decodes.load(rows, epoch, train))


def test_an_image_is_decoded_once_by_all_that_read_it(data: Dataset, decoded: list[str]) -> None:
    first, second = loader(data), loader(data)
    first.load(np.array([5, 2]), 0, True)
    second.load(np.array([2, 7, 5]), 1, True)
    first.load(np.arange(8), 1, True)
    assert len(decoded) == len(set(decoded)) == 8


def test_another_process_finds_what_is_kept(data: Dataset, place: Path) -> None:
    made = loader(data).load(np.array([4, 1]), 0, False)
    program = f"""
import tempfile
tempfile.tempdir = {str(place.parent)!r}
from datasets.cache import PixelCache
from datasets.shards import open_dataset
import numpy as np
kept = PixelCache(open_dataset({data.root!r}), "train", 20, {ALL}, least=12)
print(kept.labels(np.arange(8)).tolist(), kept.pixels(4)[4:16, 4:16].tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == f"[-1, 1, -1, -1, 0, -1, -1, -1] {made.crops[0].tobytes().hex()}\n"


def test_only_so_many_bytes_are_kept(data: Dataset, place: Path, decoded: list[str]) -> None:
    keeps = loader(data, 3 * EACH + EACH // 2)
    for epoch in range(2):
        keeps.load(np.arange(8), epoch, True)
    assert len(decoded) == 8 + 5
    (file,) = place.iterdir()
    assert file.stat().st_size == 3 * EACH


@pytest.mark.parametrize(
    "change", ["pixels", "size", "crop", "classes", "Pillow", "simplejpeg", "start"]
)
def test_other_images_are_not_mistaken_for_these(
    change: str, data: Dataset, place: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader(data).load(np.arange(8), 0, True)
    aug = AUG
    match change:
        case "pixels":
            data = write(Path(data.root), [encode(picture(i)) for i in range(8, 16)])
        case "size":
            aug = Augmentation(16, 12)
        case "crop":
            aug = Augmentation(20, 16)
        case "classes":
            data = Dataset(data.root, "image", "label", ("a", "b", "c"), 20, data.splits)
        case "Pillow":
            monkeypatch.setattr(PIL, "__version__", "0")
        case "simplejpeg":
            monkeypatch.setattr(simplejpeg, "__version__", "0")
        case "start":
            (place.parent / "boot").write_text("of another start")
            monkeypatch.setattr(cache, "BOOT", str(place.parent / "boot"))
    seen = [Loader(data, "train", aug, None, seed=0, cache=most) for most in (ALL, 0)]
    assert equal(*(made.load(np.arange(8), 0, True) for made in seen))
    assert len(decoded) == 3 * 8


def test_bad_images_are_told_each_time(tmp_path: Path) -> None:
    good = encode(picture(0))
    data = write(tmp_path / "bad", [good, b"no image", good, good, b"neither", good])
    keeps, decodes = loader(data, on_error="skip"), loader(data, 0, on_error="skip")
    for rows in ([2, 1, 0], [4, 3, 1, 5, 0], [1, 4]):
        batch = keeps.load(np.array(rows), 0, True)
        assert equal(batch, decodes.load(np.array(rows), 0, True))
        assert batch.skipped == len({1, 4} & set(rows))
    with pytest.raises(DataError, match="row 1: the image"):
        loader(data).load(np.array([0, 1]), 0, True)


def _full(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(cache, "FREE", 1.1)


def _refused(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    place.write_text("not a folder")


def _foreign(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    place.symlink_to(place.parent, target_is_directory=True)


def _elsewhere(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(cache, "BOOT", str(place / "none"))


@pytest.mark.parametrize("hinder", [_full, _refused, _foreign, _elsewhere])
def test_without_a_place_all_is_decoded_each_time(
    hinder: Callable[[pytest.MonkeyPatch, Path], None],
    data: Dataset,
    place: Path,
    decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hinder(monkeypatch, place)
    keeps = loader(data)
    first = keeps.load(np.arange(8), 0, True)
    assert equal(keeps.load(np.arange(8), 0, True), first)
    assert len(decoded) == 16


def test_a_disk_that_fills_up_ends_the_keeping(data: Dataset, decoded: list[str]) -> None:
    keeps, decodes = loader(data), loader(data, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 8 + 2 * 20 * 20 * 3 + 500, limits[1]))
    try:
        for epoch in range(2):
            rows = np.arange(8)
            assert equal(keeps.load(rows, epoch, True), decodes.load(rows, epoch, True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(decoded) == 8 + 6 + 2 * 8  # two are kept


def test_what_nobody_uses_goes_with_the_next(tmp_path: Path, data: Dataset, place: Path) -> None:
    used = loader(data)
    gone = loader(write(tmp_path / "gone", [encode(picture(0))]))
    assert len(list(place.iterdir())) == 2
    del gone
    loader(write(tmp_path / "next", [encode(picture(1))])).load(np.array([0]), 0, True)
    assert len(list(place.iterdir())) == 2
    batch = used.load(np.arange(8), 0, True)
    assert PixelCache(data, "train", 20, ALL, least=12).labels(batch.rows).tolist() == [0, 1] * 4
