"""Training crops, mirror images and colour shifts, and the batches made of them.

Everything random about a sample comes from `generator(seed, epoch, row)`, in this order whatever
is turned on: the crop's row, its column, the mirror, three draws for the colour (`draws`).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datasets import DataError
from datasets.cache import PixelCache
from datasets.images import Pixels, decode
from datasets.layout import Dataset
from datasets.randomness import stream
from datasets.rows import Record, Rows


@dataclass(frozen=True)
class Augmentation:
    """How images become crops. Raises ValueError, naming field, value and what is allowed.

    `size`: side in pixels that images are fitted to; `crop`: side of the crops; `pad`: pixels of
    reflected border before a random crop; `mirror`: mirror every other training crop;
    `random_crop`: crop anywhere, else the centre; `colour`: standard deviation of the draws that
    shift colours, 0 for none.
    """

    size: int
    crop: int
    pad: int = 0
    mirror: bool = True
    random_crop: bool = True
    colour: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("crop", 1), ("pad", 0), ("colour", 0)):
            value = getattr(self, name)
            if not value >= least or value == float("inf"):
                raise ValueError(f"{name} is {value}: {least} or more")
        if self.pad >= self.size:
            raise ValueError(f"pad is {self.pad}: less than size, {self.size}, which it reflects")
        if self.pad and not self.random_crop:
            raise ValueError(f"pad is {self.pad}: 0, as it has no effect without random_crop")
        if self.crop > self.size:
            raise ValueError(f"crop is {self.crop}: size, {self.size}, at most")

    def mirrored(self, drawn: Sequence[float]) -> bool:
        """Whether a crop is a mirror image by the three numbers of `draws` for it."""
        return self.mirror and drawn[2] < 0.5


def generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    """The source of all that is random about one sample, keyed by exactly these three."""
    return stream("sample", seed, epoch, row)


def draws(
    seed: int, epoch: int, rows: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What is random about each of `rows`: float64 [n, 3], from 0 to below 1, for the row, column
    and mirror of its crop, and float64 [n, 3] of N(0, 1) for its colour.
    """
    crops, colours = np.empty((2, len(rows), 3))
    for row, crop, colour in zip(rows, crops, colours, strict=True):
        rng = generator(seed, epoch, row)
        rng.random(out=crop)
        rng.standard_normal(out=colour)
    return crops, colours


def train_crop(pixels: Pixels, aug: Augmentation, drawn: Sequence[float]) -> Pixels:
    """A crop of `pixels` uint8 [H, W, 3] as `aug` has it: uint8 [crop, crop, 3].

    `drawn` are the three numbers of `draws` for it. Raises ValueError if the image is smaller than
    the crop.
    """
    height, width = (side + 2 * aug.pad for side in pixels.shape[:2])
    _check(pixels, aug.crop)
    if aug.random_crop:
        top = int(drawn[0] * (height - aug.crop + 1))
        left = int(drawn[1] * (width - aug.crop + 1))
        if aug.pad:
            rows, columns = (_reflected(n, aug.pad) for n in pixels.shape[:2])
            pixels = pixels[rows[top : top + aug.crop]][:, columns[left : left + aug.crop]]
        else:
            pixels = pixels[top : top + aug.crop, left : left + aug.crop]
    else:
        pixels = centre_crop(pixels, aug.crop)
    return pixels[:, ::-1] if aug.mirrored(drawn) else pixels


def centre_crop(pixels: Pixels, crop: int) -> Pixels:
    """The middle of `pixels` uint8 [H, W, 3]: uint8 [crop, crop, 3].

    Raises ValueError if the image is smaller.
    """
    _check(pixels, crop)
    top, left = ((side - crop) // 2 for side in pixels.shape[:2])
    return pixels[top : top + crop, left : left + crop]


def ten_crops(pixels: Pixels, crop: int) -> Pixels:
    """The paper's test crops of uint8 [H, W, 3]: four corners and the centre, then their mirror
    images, uint8 [10, crop, crop, 3]. Raises ValueError if the image is smaller.
    """
    _check(pixels, crop)
    low, right = (side - crop for side in pixels.shape[:2])
    places = ((0, 0), (0, right), (low, 0), (low, right), (low // 2, right // 2))
    ten = np.empty((10, crop, crop, 3), np.uint8)
    for number, (top, left) in enumerate(places):
        ten[number] = pixels[top : top + crop, left : left + crop]
        put(ten[number, :, ::-1], ten[number + 5])
    return ten


def put(pixels: Pixels, out: Pixels) -> None:
    """Copies `pixels` uint8 [H, W, 3] to `out`, of the same shape and contiguous.

    NumPy goes through a mirrored image byte by byte. One colour at a time is five times as fast;
    memory in reverse, eight bytes at a time, four times as fast as that.
    """
    height, width, _ = pixels.shape
    if pixels.strides[1] > 0:
        out[:] = pixels
    elif pixels.strides[1:] == (-3, -1) and width % 8 == 0:
        memory = pixels[:, ::-1, ::-1].reshape(height, -1).view("<u8")
        out.reshape(height, -1).view(">u8")[:] = memory[:, ::-1]
    else:
        for colour in range(3):
            out[..., colour] = pixels[..., colour]


def evaluation_views(pixels: Pixels, crop: int, views: Literal[1, 10]) -> Pixels:
    """What is seen of an image in evaluation: uint8 [1, crop, crop, 3], its centre, or
    [10, crop, crop, 3], `ten_crops`. Raises ValueError if the image is smaller.
    """
    return ten_crops(pixels, crop) if views == 10 else centre_crop(pixels, crop)[None]


def colour_shifts(
    colour: NDArray[np.float64], std: float, drawn: NDArray[np.float64]
) -> NDArray[np.float32]:
    """What to add to every pixel's RGB (in grey levels, 0 to 255) of n images: float32 [n, 3].

    `colour` float64 [3, 3] is `Statistics.colour()`: scaled eigenvectors of pixels in 0..1, mixed
    by `drawn` float64 [n, 3], `draws` of N(0, 1), times `std`.
    """
    mixed = np.matmul(colour, (std * drawn)[..., None])[..., 0]
    return (255 * mixed).astype(np.float32)


@dataclass
class Batch:
    """Samples ready for the device, in the order asked for.

    `crops` uint8 [n, crop, crop, 3], `labels` int64 [n], `shifts` float32 [n, 3] in grey levels,
    `rows` int64 [n]; `skipped` rows are missing, of which `faults` say why.
    """

    crops: Pixels
    labels: NDArray[np.int64]
    shifts: NDArray[np.float32]
    rows: NDArray[np.int64]
    skipped: int
    faults: list[str]


class Loader:
    """Rows to batches. `colour` is `Statistics.colour()`, None for no colour shifts.

    A bad row raises DataError, or with `on_error="skip"` is left out of the batch and named in
    it. Unless rows have to be `labelled`, labels are -1. The machine keeps `cache` bytes at most:
    decoded images, if they are seen `again`, and row groups of a store far away; of row groups this
    process keeps `memory` bytes. Raises ValueError for another `on_error`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        aug: Augmentation,
        colour: NDArray[np.float64] | None,
        *,
        seed: int,
        on_error: Literal["fail", "skip"] = "fail",
        labelled: bool = True,
        cache: float = 0,
        again: bool = True,
        memory: int = Rows.cache_bytes,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error is {on_error!r}: fail or skip")
        if dataset.size is not None and dataset.size < aug.crop:
            raise DataError(
                f"{dataset.root}: images of {dataset.size} pixels are smaller than the crop of "
                f"{aug.crop}; prepare them with a greater size"
            )
        self.aug, self.seed, self.on_error = aug, seed, on_error
        self.colour = colour if aug.colour else None
        whole = PixelCache.whole(dataset, split, aug.size) if again else 0
        decoded = min(cache, whole)
        if dataset.far(split) and decoded < whole:
            decoded /= 2  # encoded, ten times as many find room
        self._source = Rows(
            dataset, split, cache_bytes=memory, labelled=labelled, disk_bytes=cache - decoded
        )
        self._cache = PixelCache(dataset, split, aug.size, decoded, least=aug.crop)

    def load(
        self,
        rows: NDArray[np.int64],
        epoch: int,
        train: bool,
        then: NDArray[np.int64] | None = None,
    ) -> Batch:
        """The samples of `rows` (int64 [n], within the split): augmented for training in `epoch`,
        else their centres without shifts. `then` are the rows that are likely next; they begin to
        come from a store far away.

        Raises DataError, naming file and row, unless bad rows are skipped.
        """
        batch, aug = self._empty(len(rows)), self.aug
        mirrored, shifts = set[int](), batch.shifts
        if train:
            crops, colours = draws(self.seed, epoch, rows.tolist())
            drawn = crops.tolist()
            each = zip(rows.tolist(), drawn, strict=True)
            mirrored.update(row for row, numbers in each if aug.mirrored(numbers))
            if self.colour is not None:
                shifts = colour_shifts(self.colour, aug.colour, colours)
        samples = self._samples(rows, batch.faults, then, mirrored)
        for kept, (at, label, pixels) in enumerate(samples):
            if train:
                put(train_crop(pixels, aug, drawn[at]), batch.crops[kept])
            else:
                batch.crops[kept] = centre_crop(pixels, aug.crop)
            batch.shifts[kept] = shifts[at]
            batch.labels[kept], batch.rows[kept] = label, rows[at]
        return _without(batch, len(batch.faults))

    def _samples(
        self,
        rows: NDArray[np.int64],
        faults: list[str],
        then: NDArray[np.int64] | None,
        mirrored: set[int],
    ) -> Iterator[tuple[int, int, Pixels]]:
        """Place in `rows`, label and pixels of each that is good, as `images` has them; those that
        are to be `mirrored` come as `put` likes them.
        """
        labels = self._cache.labels(rows)
        if then is not None:
            then = then[self._cache.labels(then) < 0]
        blue_first = {row for row in mirrored if not (self.aug.pad or self._cache.has_room(row))}
        others = self.images(rows[labels < 0], faults, then, blue_first)
        other = next(others, None)
        for at, (row, label) in enumerate(zip(rows.tolist(), labels.tolist(), strict=True)):
            if label >= 0:
                yield at, label, self._cache.pixels(row)
            elif other and other[0].row == row:
                record, pixels = other
                self._cache.keep(row, record.label, pixels)
                yield at, record.label, pixels
                other = next(others, None)

    def load_views(self, rows: NDArray[np.int64], views: Literal[1, 10]) -> Batch:
        """The samples of `rows` as they are evaluated: the centre alone or the ten test crops of
        each, `crops` uint8 [n, views, crop, crop, 3]. Raises DataError as `load` does.
        """
        batch = self._empty(len(rows), views)
        for kept, (record, pixels) in enumerate(self.images(rows, batch.faults)):
            batch.crops[kept] = evaluation_views(pixels, self.aug.crop, views)
            batch.labels[kept], batch.rows[kept] = record.label, record.row
        return _without(batch, len(batch.faults))

    def images(
        self,
        rows: NDArray[np.int64],
        faults: list[str],
        then: NDArray[np.int64] | None = None,
        blue_first: Container[int] = (),
    ) -> Iterator[tuple[Record, Pixels]]:
        """The rows numbered `rows` and their pixels, uint8 [size, size, 3], in that order; bad ones
        raise DataError, or are left out and told in `faults`. `then` is as `load` has it,
        `blue_first` names rows that `decode` is to lay out so.
        """
        skip, aug = self.on_error == "skip", self.aug
        for record in self._source.read(rows, faults if skip else None, then):
            try:
                pixels = decode(
                    record.image,
                    record.place,
                    aug.size,
                    least=aug.crop,
                    blue_first=record.row in blue_first,
                )
            except DataError as error:
                if not skip:
                    raise
                faults.append(str(error))
                continue
            yield record, pixels

    def _empty(self, n: int, *views: int) -> Batch:
        """A batch with room for n samples."""
        crop = self.aug.crop
        return Batch(
            np.empty((n, *views, crop, crop, 3), np.uint8),
            np.empty(n, np.int64),
            np.zeros((n, 3), np.float32),
            np.empty(n, np.int64),
            0,
            [],
        )


def _without(batch: Batch, skipped: int) -> Batch:
    """A batch without the room of so many samples that were skipped."""
    if skipped:
        kept = len(batch.rows) - skipped
        for name in ("crops", "labels", "shifts", "rows"):
            setattr(batch, name, getattr(batch, name)[:kept])
    batch.skipped = skipped
    return batch


def _check(pixels: Pixels, crop: int) -> None:
    if min(pixels.shape[:2]) < crop:
        raise ValueError(f"image is {pixels.shape[:2]}: {crop} pixels or more each way")


def _reflected(side: int, pad: int) -> NDArray[np.int64]:
    """Where the rows of an image come from once it is padded, the border itself not repeated."""
    return np.pad(np.arange(side), pad, mode="reflect")
