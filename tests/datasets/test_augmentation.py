"""Augmentations equal slow references, and depend on (seed, epoch, row) alone."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets import DataError
from datasets.augmentation import (
    Augmentation,
    Batch,
    Loader,
    centre_crop,
    colour_shifts,
    draws,
    generator,
    put,
    ten_crops,
    train_crop,
)
from datasets.images import decode, encode
from datasets.layout import Dataset
from datasets.shards import open_dataset, write_manifest, write_split


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(4, 12), st.integers(1, 4), st.integers(0, 3), st.booleans(), st.integers(0, 999))
def test_train_crop_equals_pad_then_crop_then_mirror(
    side: int, crop: int, pad: int, mirror: bool, seed: int
) -> None:
    pixels = picture(side, side, seed)
    (drawn,), _ = draws(seed, 0, [0])
    a, b, c = drawn
    got = train_crop(pixels, Augmentation(side, crop, pad=pad, mirror=mirror), drawn)
    padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    top, left = (int(d * (side + 2 * pad - crop + 1)) for d in (a, b))
    want = padded[top : top + crop, left : left + crop]
    if mirror and c < 0.5:
        want = want[:, ::-1]
    assert got.tolist() == want.tolist()


@given(st.integers(1, 4), st.integers(1, 33), st.integers(0, 9), *[st.booleans()] * 2)
def test_put_copies_whatever_the_memory_is_like(
    height: int, width: int, left: int, mirror: bool, blue_first: bool
) -> None:
    pixels = picture(height, width + left)
    if blue_first:
        pixels = pixels[..., ::-1].copy()[..., ::-1]
    pixels = pixels[:, left:]
    if mirror:
        pixels = pixels[:, ::-1]
    out = np.zeros((height, width, 3), np.uint8)
    put(pixels, out)
    assert out.tolist() == pixels.tolist()


def test_all_positions_and_both_sides_occur_equally_often() -> None:
    pixels = np.arange(9, dtype=np.uint8).reshape(3, 3, 1).repeat(3, axis=2)
    aug = Augmentation(3, 2)
    drawn, _ = draws(0, 0, range(4000))
    crops = [tuple(train_crop(pixels, aug, each)[..., 0].flat) for each in drawn]
    counts = np.array([crops.count(c) for c in set(crops)])
    assert len(counts) == 2 * 2 * 2
    assert counts.min() > 420
    assert counts.max() < 580


def test_turning_one_off_leaves_the_others_draws(tmp_path: Path) -> None:
    data = dataset(tmp_path, [encode(picture(20, 20, i)) for i in range(8)], 20)

    def drawn(**changes: object) -> Batch:
        aug = Augmentation(20, 12, **changes)  # type: ignore[arg-type]
        return Loader(data, "train", aug, COLOUR, seed=1).load(np.arange(8), 2, True)

    batch, unmirrored, centred = drawn(), drawn(mirror=False), drawn(random_crop=False)
    for crop, same_place in zip(batch.crops, unmirrored.crops, strict=True):
        assert crop.tolist() in (same_place.tolist(), same_place[:, ::-1].tolist())
    assert batch.crops.tolist() != unmirrored.crops.tolist()
    assert batch.shifts.tolist() == unmirrored.shifts.tolist() == centred.shifts.tolist()


def test_centre_and_ten_crops() -> None:
    pixels = picture(9, 11)
    ten = ten_crops(pixels, 5)
    assert ten.shape == (10, 5, 5, 3)
    corners = [pixels[:5, :5], pixels[:5, 6:], pixels[4:, :5], pixels[4:, 6:]]
    five = [*corners, pixels[2:7, 3:8]]
    assert centre_crop(pixels, 5).tolist() == five[4].tolist()
    for got, want in zip(ten, five + [np.fliplr(view) for view in five], strict=True):
        assert got.tolist() == want.tolist()


def test_colour_shifts_are_the_papers_formula() -> None:
    vectors, values = (
        np.linalg.qr(picture(3, 3)[..., 0].astype(float))[0],
        np.array([0.2, 0.03, 0.01]),
    )
    drawn = draws(0, 0, range(4))[1]
    got = colour_shifts(vectors * values, 0.1, drawn)
    assert got.dtype == np.float32
    for shift, a in zip(got, 0.1 * drawn, strict=True):
        want = 255 * sum(vectors[:, i] * a[i] * values[i] for i in range(3))
        np.testing.assert_allclose(shift, want, rtol=1e-5)


@given(st.tuples(*[st.integers(0, 2**40)] * 3), st.tuples(*[st.integers(0, 2**40)] * 3))
def test_streams_differ_unless_seed_epoch_and_row_are_equal(
    a: tuple[int, int, int], b: tuple[int, int, int]
) -> None:
    same = generator(*a).random(4).tolist() == generator(*b).random(4).tolist()
    assert same == (a == b)


def test_the_draws_of_a_sample_are_the_same_for_ever() -> None:
    """A promise: a run that one version checkpointed sees the same crops when a later version
    resumes it.
    """
    assert generator(3, 2, 1).random() == 0.42434656960793515
    ours, rng = draws(3, 2, [0, 1]), generator(3, 2, 1)
    assert ours[0][1].tolist() == rng.random(3).tolist()
    assert ours[1][1].tolist() == rng.standard_normal(3).tolist()


def test_numpys_integers_name_the_same_stream() -> None:
    a, b = generator(1, 2, 3), generator(1, np.int64(2), np.int64(3))  # type: ignore[arg-type]
    assert a.random() == b.random()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size is 0: 1 or more"),
        ({"crop": 9}, "crop is 9: size, 8, at most"),
        ({"pad": -1}, "pad is -1: 0 or more"),
        ({"pad": 8}, "pad is 8: less than size, 8, which it reflects"),
        ({"pad": 1, "random_crop": False}, "pad is 1: 0, as it has no effect without random_crop"),
        ({"colour": -0.1}, "colour is -0.1: 0 or more"),
        ({"colour": float("nan")}, "colour is nan: 0 or more"),
    ],
)
def test_augmentation_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**({"size": 8, "crop": 6} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [centre_crop, ten_crops])
def test_no_crop_of_a_smaller_image(cut) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"image is \(4, 9\): 5 pixels or more"):
        cut(picture(4, 9), 5)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


COLOUR = np.diag([0.2, 0.03, 0.01])


def dataset(folder: Path, images: list[bytes], size: int | None) -> Dataset:
    records = [(data, f"{i}.jpg", i % 2) for i, data in enumerate(images)]
    shards = write_split(str(folder), "train", records, ("a", "b"), rows_per_group=3)
    write_manifest(str(folder), {"train": shards}, ("a", "b"), size=size)
    return open_dataset(str(folder))


def test_a_sample_is_the_same_in_any_batch(tmp_path: Path) -> None:
    data = dataset(tmp_path, [encode(picture(20, 20, i)) for i in range(8)], 20)
    aug = Augmentation(20, 12)
    rows = np.array([5, 0, 7, 2])
    batch = Loader(data, "train", aug, COLOUR, seed=3).load(rows, 4, True)
    assert batch.crops.shape == (4, 12, 12, 3)
    assert batch.rows.tolist() == rows.tolist()
    assert batch.labels.tolist() == [1, 0, 1, 0]
    assert (batch.shifts != 0).all()
    for k, row in enumerate(rows):
        one = Loader(data, "train", aug, COLOUR, seed=3).load(np.array([row]), 4, True)
        assert one.crops[0].tobytes() == batch.crops[k].tobytes()
        assert one.shifts[0].tobytes() == batch.shifts[k].tobytes()
    other = Loader(data, "train", aug, COLOUR, seed=3).load(rows, 5, True)
    assert other.crops.tobytes() != batch.crops.tobytes()


@pytest.mark.parametrize(("size", "pad"), [(None, 0), (20, 0), (20, 2)])
def test_samples_are_what_is_decoded_cropped_and_mirrored(
    tmp_path: Path, size: int | None, pad: int
) -> None:
    """JPEGs, of which mirrored ones are decoded otherwise, and other formats; of whatever size."""
    sides = [(20, 20) if size else (20 + i % 3, 24) for i in range(12)]
    images = [encode(picture(*side, i)) for i, side in enumerate(sides)]
    images += [png(picture(*side, i)) for i, side in enumerate(sides)]
    data, aug = dataset(tmp_path, images, size), Augmentation(20, 16, pad=pad)
    batch = Loader(data, "train", aug, None, seed=3).load(np.arange(24), 4, True)
    drawn, _ = draws(3, 4, range(24))
    assert 6 < sum(drawn[:, 2] < 0.5) < 18
    for image, each, crop in zip(images, drawn, batch.crops, strict=True):
        assert crop.tolist() == train_crop(decode(image, "", 20), aug, each).tolist()


def test_evaluation_takes_centres_without_shifts(tmp_path: Path) -> None:
    image = picture(40, 30)
    loader = Loader(
        dataset(tmp_path, [encode(image)], None), "train", Augmentation(20, 12), COLOUR, seed=0
    )
    batch = loader.load(np.array([0]), 0, False)
    assert batch.shifts.tolist() == [[0, 0, 0]]
    assert loader.load(np.array([0]), 9, False).crops.tobytes() == batch.crops.tobytes()


def test_views_are_the_centre_or_ten_crops(tmp_path: Path) -> None:
    data = dataset(tmp_path, [encode(picture(20, 20, i)) for i in range(5)], 20)
    loader = Loader(data, "train", Augmentation(20, 12), COLOUR, seed=0)
    rows = np.array([4, 1])
    one, ten = loader.load_views(rows, 1), loader.load_views(rows, 10)
    assert one.crops[:, 0].tobytes() == loader.load(rows, 0, False).crops.tobytes()
    assert ten.crops.shape == (2, 10, 12, 12, 3)
    assert ten.crops[:, 4].tobytes() == one.crops[:, 0].tobytes()
    assert ten.labels.tolist() == one.labels.tolist() == [0, 1]


def test_bad_images_are_named_or_skipped(tmp_path: Path) -> None:
    good = encode(picture(20, 20))
    data = dataset(tmp_path, [good, b"no image", good, encode(picture(9, 30)), good], None)
    loader = Loader(data, "train", Augmentation(16, 12), None, seed=0)
    name = "train-00000-of-00001.parquet"
    with pytest.raises(DataError, match=rf"^{name} row 1: the image \(8 bytes\) does not decode"):
        loader.load(np.arange(3), 0, True)
    with pytest.raises(DataError, match=f"{name} row 3: the image of 30x9 pixels is smaller than"):
        loader.load(np.array([4, 3]), 0, True)
    loader = Loader(data, "train", Augmentation(16, 12), None, seed=0, on_error="skip")
    batch = loader.load(np.arange(5), 0, True)
    assert batch.rows.tolist() == [0, 2, 4]
    assert batch.skipped == 2
    assert [fault.partition(":")[0] for fault in batch.faults] == [f"{name} row 1", f"{name} row 3"]
    assert len(batch.crops) == len(batch.labels) == len(batch.shifts) == 3
    views = loader.load_views(np.arange(5), 10)
    assert (views.rows.tolist(), views.skipped, len(views.crops)) == ([0, 2, 4], 2, 3)


def test_a_crop_beyond_the_prepared_size_is_refused_at_once(tmp_path: Path) -> None:
    data = dataset(tmp_path, [encode(picture(20, 20))], 20)
    with pytest.raises(DataError, match="images of 20 pixels are smaller than the crop of 24"):
        Loader(data, "train", Augmentation(32, 24), None, seed=0)
    with pytest.raises(ValueError, match="on_error is 'ignore': fail or skip"):
        Loader(data, "train", Augmentation(16, 12), None, seed=0, on_error="ignore")  # type: ignore[arg-type]
