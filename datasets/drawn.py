"""The built-in data set: ten shapes that only their outline tells apart.

Place, size, angle, stretch, colours and textures vary inside a class, of shape and of background
alike, and either may be the brighter: pixels by themselves say little, outlines all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from datasets.images import Pixels, encode
from datasets.layout import Dataset
from datasets.randomness import stream
from datasets.shards import open_dataset, write_manifest, write_split
from datasets.statistics import STATISTICS, Sums

SIZE = 72
"""Side of the images in pixels."""

BRIGHTER = 0.9
"""Share of images whose shape is brighter than the background."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """An outline around the origin, in units of the shape's radius: points [n, 2]."""

    name: str
    outline: Array
    hole: Array | None = None


def _around(turns: Array, radius: Array | float = 1.0) -> Array:
    angle = 2 * np.pi * turns
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)


def _shapes() -> tuple[Shape, ...]:
    circle = _around(np.arange(48) / 48)
    t = 2 * np.pi * np.arange(48) / 48
    heart = np.stack(
        [
            16 * np.sin(t) ** 3,
            13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t),
        ],
        axis=1,
    )
    outer, inner = _around(np.linspace(0.12, 0.88, 40)), _around(np.linspace(0.82, 0.18, 40), 0.8)
    crescent = np.concatenate([outer, inner + np.array([0.48, 0.0])])
    arm = 0.3
    cross = np.array([[arm, 1], [arm, arm], [1, arm]])
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    cross = np.concatenate([cross @ np.linalg.matrix_power(quarter, k) for k in range(4)])
    arrow = [[1, 0], [0.1, 0.8], [0.1, 0.28], [-1, 0.28], [-1, -0.28], [0.1, -0.28], [0.1, -0.8]]
    hourglass = [[-0.75, 0.9], [0.75, 0.9], [0.12, 0], [0.75, -0.9], [-0.75, -0.9], [-0.12, 0]]
    return (
        Shape("disc", 0.9 * circle),
        Shape("ring", circle, 0.58 * circle),
        Shape("square", _around(np.arange(4) / 4, 1.05)),
        Shape("triangle", _around(np.arange(3) / 3, 1.1)),
        Shape("star", _around(np.arange(10) / 10, np.tile([1.1, 0.45], 5))),
        Shape("cross", cross),
        Shape("crescent", crescent),
        Shape("heart", -heart / 16),
        Shape("arrow", np.array(arrow, dtype=float)),
        Shape("hourglass", np.array(hourglass)),
    )


SHAPES = _shapes()
CLASSES = tuple(shape.name for shape in SHAPES)


def draw(seed: int, split: str, row: int) -> tuple[Pixels, int]:
    """Image `row` of `split`: uint8 [72, 72, 3] and its label, `row` modulo 10."""
    rng = stream("drawn", seed, split, row)
    label = row % len(SHAPES)
    ground, figure = _colours(rng)
    canvas = _textured(ground, rng)
    _scatter(canvas, rng)
    mask = _mask(SHAPES[label], rng)[..., None]
    canvas += mask * (_textured(figure, rng) - canvas)
    canvas += rng.integers(-12, 13, canvas.shape, dtype=np.int8)
    return canvas.clip(0, 255).astype(np.uint8), label


def write_drawn(url: str, *, train: int = 6000, val: int = 1000) -> Dataset:
    """Draw the data set into the folder `url`: shards, statistics and manifest; then open it."""
    sums = Sums(SIZE)

    def records(split: str, rows: int) -> Iterator[tuple[bytes, str, int]]:
        for row in range(rows):
            pixels, label = draw(0, split, row)
            if split == "train":
                sums.add(pixels)
            yield encode(pixels, 92), f"{split}-{row:05d}.jpg", label

    splits = {
        split: write_split(url, split, records(split, rows), CLASSES, rows_per_group=100)
        for split, rows in (("train", train), ("val", val))
    }
    sums.finish().save(f"{url.rstrip('/')}/{STATISTICS}")
    write_manifest(url, splits, CLASSES, size=SIZE)
    return open_dataset(url)


def _colours(rng: np.random.Generator) -> Array:
    """Colours [2, 3] of ground and figure that can be told apart; the figure's is oftener brighter.

    If either were as often the brighter, a network would need epochs to notice shapes at all.
    """
    pairs = rng.uniform(20, 235, (16, 2, 3))
    apart = np.abs(pairs[:, 0] - pairs[:, 1]).sum(axis=1)
    pair = pairs[int(np.argmax(apart > 200))]
    order = np.argsort(pair.sum(axis=1))
    return np.asarray(pair[order if rng.random() < BRIGHTER else order[::-1]])


_ROW, _COLUMN = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def _textured(colour: Array, rng: np.random.Generator) -> NDArray[np.float32]:
    """A surface float32 [72, 72, 3] about `colour`: blotches of it, or stripes."""
    strength = rng.uniform(3, 22)
    if rng.random() < 0.5:
        coarse = rng.integers(0, 256, (int(rng.integers(2, 10)),) * 2 + (3,), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pattern = np.asarray(smooth).astype(np.float32) / 127.5 - 1
    else:
        angle, pitch = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.2)
        phase = np.float32(pitch * np.cos(angle)) * _COLUMN
        phase += np.float32(pitch * np.sin(angle)) * _ROW
        pattern = np.sin(phase)[..., None] * rng.uniform(-1, 1, 3).astype(np.float32)
    return pattern * np.float32(strength) + colour.astype(np.float32)


def _scatter(canvas: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Small dots and dashes on the background, so that not every edge is the shape's."""
    for _ in range(int(rng.integers(0, 5))):
        top, left = rng.integers(0, SIZE - 4, 2)
        height, width = rng.integers(2, 7, 2)
        canvas[top : top + height, left : left + width] = rng.uniform(0, 255, 3)


def _mask(shape: Shape, rng: np.random.Generator) -> NDArray[np.float32]:
    """Where the shape lies: float32 [72, 72], 0 to 1, drawn at twice the size."""
    radius = rng.uniform(18, 27)
    room = min(7.0, 33 - radius)
    centre = SIZE / 2 + rng.uniform(-room, room, 2)
    stretch = np.array([rng.uniform(0.85, 1.15), 1.0])
    angle = rng.uniform(-0.6, 0.6)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    image = Image.new("L", (2 * SIZE, 2 * SIZE))
    pencil = ImageDraw.Draw(image)
    for outline, fill in ((shape.outline, 255), (shape.hole, 0)):
        if outline is not None:
            points = 2 * (outline * stretch * radius @ turn + centre)
            pencil.polygon(points.ravel().tolist(), fill=fill)
    return np.asarray(image.reduce(2), np.float32) / np.float32(255)
