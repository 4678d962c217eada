"""Statistics equal NumPy's, in any order and any parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets import DataError
from datasets.images import decode, encode
from datasets.shards import open_dataset, write_manifest, write_split
from datasets.statistics import Statistics, Sums, sums_of_groups


def images(n: int, size: int = 5) -> np.ndarray:
    rng = np.random.default_rng(n)
    return rng.integers(0, rng.integers(2, 256, 3), (n, size, size, 3)).astype(np.uint8)


def total(pictures: np.ndarray) -> Sums:
    sums = Sums(pictures.shape[1])
    for picture in pictures:
        sums.add(picture)
    return sums


def same(a: Statistics, b: Statistics) -> bool:
    return all(
        np.asarray(getattr(a, name)).tobytes() == np.asarray(getattr(b, name)).tobytes()
        for name in a.__dataclass_fields__
    )


@pytest.mark.parametrize("n", [1, 2, 50])
def test_statistics_equal_numpys(n: int) -> None:
    pictures = images(n)
    found = total(pictures).finish()
    flat = pictures.reshape(-1, 3) / 255.0
    covariance = np.cov(flat, rowvar=False, bias=True)
    np.testing.assert_allclose(found.mean_image, pictures.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.rgb_mean, flat.mean(axis=0) * 255, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-11, atol=1e-15)
    assert (found.mean_image.dtype, found.images) == (np.float32, n)
    assert (np.diff(found.eigenvalues) <= 0).all()
    vectors, values = found.eigenvectors, found.eigenvalues
    np.testing.assert_allclose(vectors * values @ vectors.T, covariance, atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    assert (vectors[np.abs(vectors).argmax(axis=0), range(3)] > 0).all()


def test_sums_over_large_bright_images_are_exact() -> None:
    picture = np.random.default_rng(0).integers(200, 256, (256, 256, 3), dtype=np.uint8)
    flat = picture.reshape(-1, 3).astype(np.int64)
    assert total(picture[None]).moments.tolist() == (flat.T @ flat).tolist()


def test_the_centre_is_the_middle_of_the_mean_image() -> None:
    (picture,) = images(1, 6)
    assert total(picture[None]).finish().centre(4).tolist() == picture[1:5, 1:5].tolist()


@given(st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=4))
def test_order_and_parts_change_no_bit(order: list[int], cuts: list[int]) -> None:
    pictures = images(12)
    merged = Sums(5)
    for part in np.split(pictures[order], sorted(cuts)):
        merged.merge(total(part))
    assert same(merged.finish(), total(pictures).finish())


def test_colour_by_eigenvalues_and_by_deviations() -> None:
    found = total(images(9)).finish()
    assert found.colour().tolist() == (found.eigenvectors * found.eigenvalues).tolist()
    deviations = found.colour("deviations")
    np.testing.assert_allclose(deviations @ deviations.T, found.covariance, atol=1e-12)
    with pytest.raises(ValueError, match="scale is 'both': eigenvalues or deviations"):
        found.colour("both")  # type: ignore[arg-type]


def test_save_and_load(tmp_path: Path) -> None:
    found = total(images(4)).finish()
    for url in (f"{tmp_path}/new/statistics.npz", "memory://statistics/statistics.npz"):
        found.save(url)
        found.save(url)
        assert same(Statistics.load(url), found)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["statistics.npz"]


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(DataError, match=r"statistics.npz: no such file"):
        Statistics.load(str(path))
    total(images(4)).finish().save(str(path))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"statistics.npz: not a statistics file \(.*\); delete it"):
        Statistics.load(str(path))


def test_sums_refuse_other_sizes_and_nothing() -> None:
    with pytest.raises(ValueError, match=r"image is \(4, 4, 3\): \(5, 5, 3\) is wanted"):
        Sums(5).add(images(1, 4)[0])
    with pytest.raises(ValueError, match="sums over images of side 4: 5 is wanted"):
        Sums(5).merge(Sums(4))
    with pytest.raises(DataError, match="no image to take the mean of"):
        Sums(5).finish()


def test_sums_of_groups_add_up(tmp_path: Path) -> None:
    url = str(tmp_path)
    data = [encode(picture) for picture in images(7, 12)]
    records = [(d, "", 0) for d in (*data, b"no image")]
    shards = write_split(url, "train", records, ["a"], rows_per_group=3, shard_bytes=1500)
    write_manifest(url, {"train": shards}, ["a"])
    dataset = open_dataset(url)
    with pytest.raises(DataError, match="does not decode"):
        sums_of_groups(dataset, "train", 8, range(3))
    merged = Sums(8)
    for group in range(3):
        part = sums_of_groups(dataset, "train", 8, range(group, group + 1), on_error="skip")
        merged.merge(part)
    assert merged.images == 7
    want = total(np.stack([decode(d, "", 8) for d in data]))
    assert same(merged.finish(), want.finish())
