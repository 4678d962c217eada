"""Mean image and RGB covariance of the training images, summed exactly, in any order."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datasets import DataError
from datasets.images import Pixels, decode
from datasets.layout import Dataset
from datasets.rows import Rows
from datasets.storage import storage, write_whole

STATISTICS = "statistics.npz"
"""Name of their file, beside shards and in a run."""

Scale = Literal["eigenvalues", "deviations"]


@dataclass(frozen=True)
class Statistics:
    """What training subtracts from images and how far their colours are shifted.

    `mean_image` float32 [S, S, 3] and `rgb_mean` float64 [3] are in grey levels, 0 to 255.
    `covariance` float64 [3, 3], its `eigenvalues` [3] (falling) and `eigenvectors` [3, 3] (columns)
    are of pixels scaled to 0..1: the paper's unit is not given, and a shift of N(0, .1) times an
    eigenvalue is a few grey levels in this one, and hundreds if pixels count 0 to 255.
    """

    mean_image: NDArray[np.float32]
    rgb_mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    eigenvectors: NDArray[np.float64]
    images: int

    def colour(self, scale: Scale = "eigenvalues") -> NDArray[np.float64]:
        """Eigenvectors, each times its scale: float64 [3, 3], which `colour_shifts` takes.

        The paper scales by eigenvalues, the source of 2012 by "deviations", their square roots.
        Raises ValueError for another `scale`.
        """
        if scale not in ("eigenvalues", "deviations"):
            raise ValueError(f"scale is {scale!r}: eigenvalues or deviations")
        lengths = self.eigenvalues if scale == "eigenvalues" else np.sqrt(self.eigenvalues)
        return self.eigenvectors * lengths

    def centre(self, crop: int) -> NDArray[np.float32]:
        """What is subtracted from crops: the middle of the mean image, float32 [crop, crop, 3]."""
        margin = (len(self.mean_image) - crop) // 2
        mean = self.mean_image[margin : margin + crop, margin : margin + crop]
        return np.ascontiguousarray(mean, np.float32)

    def save(self, url: str) -> None:
        """Write a NumPy .npz to any fsspec URL, complete or not at all."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        np.savez(buffer, **arrays)
        fs, path = storage(url)
        fs.makedirs(fs._parent(path), exist_ok=True)
        write_whole(fs, path, buffer.getvalue())

    @staticmethod
    def load(url: str) -> Statistics:
        """Read what `save` wrote. Raises DataError if it is missing or is something else."""
        fs, path = storage(url)
        try:
            with np.load(io.BytesIO(fs.cat_file(path))) as file:
                arrays = {f.name: file[f.name] for f in fields(Statistics)}
            side = len(arrays["mean_image"])
            shapes = ((side, side, 3), (3,), (3, 3), (3,), (3, 3), ())
            for (name, array), shape in zip(arrays.items(), shapes, strict=True):
                if array.shape != shape:
                    raise ValueError(f"{name} is {array.shape}, {shape} is wanted")
        except FileNotFoundError:
            raise DataError(f"{url}: no such file; prepare the data set again") from None
        except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
            raise DataError(
                f"{url}: not a statistics file ({error}); delete it and prepare the data set again"
            ) from error
        return Statistics(**{**arrays, "images": int(arrays["images"])})


@dataclass
class Sums:
    """Integer sums over images of side `size`: equal for any order and any number of workers."""

    size: int
    images: int = 0
    pixels: NDArray[np.int64] = field(init=False)
    moments: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.pixels = np.zeros((self.size, self.size, 3), np.int64)
        self.moments = np.zeros((3, 3), np.int64)

    def add(self, image: Pixels) -> None:
        """Count one image, uint8 [size, size, 3]. Raises ValueError for another shape."""
        if image.shape != self.pixels.shape:
            raise ValueError(f"image is {image.shape}: {self.pixels.shape} is wanted")
        self.pixels += image
        self.moments += _moments(image)
        self.images += 1

    def merge(self, other: Sums) -> None:
        """Count what `other` counted. Raises ValueError if its images have another size."""
        if other.size != self.size:
            raise ValueError(f"sums over images of side {other.size}: {self.size} is wanted")
        self.pixels += other.pixels
        self.moments += other.moments
        self.images += other.images

    def finish(self) -> Statistics:
        """The statistics of all images counted. Raises DataError if there are none."""
        if not self.images:
            raise DataError("no image to take the mean of; the training split is empty")
        count = self.images * self.size**2
        total = self.pixels.sum(axis=(0, 1))
        # Python integers: the products of two sums outgrow 64 bits over ImageNet.
        exact = [
            [count * int(self.moments[i, j]) - int(total[i]) * int(total[j]) for j in range(3)]
            for i in range(3)
        ]
        covariance = np.array([[e / (count * 255) ** 2 for e in row] for row in exact])
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1].clip(0), vectors[:, ::-1]
        # An eigenvector's sign is arbitrary: its largest component is made positive.
        largest = np.abs(vectors).argmax(axis=0)
        vectors = vectors * np.sign(vectors[largest, range(3)])
        return Statistics(
            mean_image=(self.pixels / self.images).astype(np.float32),
            rgb_mean=total / count,
            covariance=covariance,
            eigenvalues=values,
            eigenvectors=vectors,
            images=self.images,
        )


def _moments(image: Pixels) -> NDArray[np.int64]:
    """Sums of products of each two channels of uint8 [H, W, 3]: int64 [3, 3], exact."""
    count = image.shape[0] * image.shape[1]
    # 256 products of 255 * 255 still fit in the 24 bits that float32 is exact to.
    planes = np.zeros((3, -(-count // 256), 256), np.float32)
    planes.reshape(3, -1)[:, :count] = image.reshape(-1, 3).T
    moments = np.empty((3, 3), np.int64)
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)):
        parts = np.einsum("ab,ab->a", planes[i], planes[j])
        moments[i, j] = moments[j, i] = parts.sum(dtype=np.float64)
    return moments


def sums_of_groups(
    dataset: Dataset, split: str, size: int, groups: range, *, on_error: str = "fail"
) -> Sums:
    """The sums over the images, fitted to `size`, of some of the row groups of `split`.

    Raises DataError at a row that is bad; with `on_error="skip"` such rows are left out.
    """
    bounds = np.cumsum((0, *dataset.groups(split)))
    rows = Rows(dataset, split)
    sums = Sums(size)
    faults: list[str] | None = None if on_error == "fail" else []
    for group in groups:
        for record in rows.read(np.arange(bounds[group], bounds[group + 1]), faults):
            try:
                sums.add(decode(record.image, record.place, size))
            except DataError:
                if faults is None:
                    raise
    return sums
