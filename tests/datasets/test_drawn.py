"""The drawn data set: the same wherever it is drawn, and hard for a linear model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datasets.drawn import CLASSES, SIZE, draw, write_drawn
from datasets.images import decode
from datasets.rows import Rows
from datasets.statistics import Statistics


def test_drawing_is_pure() -> None:
    pixels, label = draw(3, "train", 17)
    assert (pixels.shape, pixels.dtype, label) == ((SIZE, SIZE, 3), np.uint8, 7)
    assert draw(3, "train", 17)[0].tobytes() == pixels.tobytes()
    others = [draw(3, "val", 17), draw(4, "train", 17), draw(3, "train", 27)]
    assert all(other[0].tobytes() != pixels.tobytes() for other in others)


def test_the_written_set(tmp_path: Path) -> None:
    dataset = write_drawn(str(tmp_path), train=250, val=30)
    assert (dataset.classes, dataset.size, dataset.held_out) == (CLASSES, SIZE, "val")
    assert dataset.groups("train") == (100, 100, 50)
    records = Rows(dataset, "train").read(np.arange(250))
    assert np.bincount([r.label for r in records]).tolist() == [25] * 10
    pixels = decode(records[9].image, "")
    assert np.abs(pixels.astype(int) - draw(0, "train", 9)[0]).mean() < 12
    statistics = Statistics.load(f"{tmp_path}/statistics.npz")
    assert (statistics.images, statistics.mean_image.shape) == (250, (SIZE, SIZE, 3))
    # A shift of N(0, .1) times an eigenvalue is a few grey levels.
    assert 0.5 < 25.5 * statistics.eigenvalues[0] < 10


def test_a_linear_model_does_not_learn_it() -> None:
    """Softmax regression on pixels, which a small AlexNet beats by 60% and more."""
    torch = pytest.importorskip("torch")
    x, y = (
        torch.tensor(np.stack(a))
        for a in zip(*(draw(0, "train", i) for i in range(2500)), strict=True)
    )
    v, w = (
        torch.tensor(np.stack(a))
        for a in zip(*(draw(0, "val", i) for i in range(600)), strict=True)
    )
    x, v = (a.flatten(1).float() / 64 - 2 for a in (x, v))
    weights = torch.zeros(x.shape[1], 10, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=1e-4)
    order = torch.Generator().manual_seed(0)
    best = 0.0
    for _ in range(8):
        for batch in torch.randperm(len(x), generator=order).split(200):
            loss = torch.nn.functional.cross_entropy(x[batch] @ weights, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best = max(best, float(((v @ weights).argmax(1) == w).float().mean()))
    assert 0.1 < best < 0.55
