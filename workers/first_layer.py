"""What first-layer kernels look like, and how much colour they use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ACROSS = 8  # kernels in a row of a picture


def colourfulness(kernels: NDArray[np.float32]) -> float:
    """How much colour first-layer kernels float32 [n, 3, k, k] use: the share of their energy, the
    mean over kernels, that lies outside of grey. 0 of grey kernels alone.
    """
    grey = kernels.mean(axis=1, keepdims=True)
    energy = (kernels**2).sum(axis=(1, 2, 3))
    beside = ((kernels - grey) ** 2).sum(axis=(1, 2, 3))
    return float((beside / np.maximum(energy, 1e-30)).mean())


def grid(kernels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Kernels float32 [n, 3, k, k] side by side as a picture uint8 [H, W, 3], each stretched to its
    own greatest weight.
    """
    n, _, k, _ = kernels.shape
    picture = np.full((-(-n // ACROSS) * (k + 1) + 1, ACROSS * (k + 1) + 1, 3), 128, np.uint8)
    for i, kernel in enumerate(kernels):
        top, left = (1 + place * (k + 1) for place in divmod(i, ACROSS))
        scaled = 127.5 + 127.5 * kernel / max(float(np.abs(kernel).max()), 1e-30)
        picture[top : top + k, left : left + k] = scaled.transpose(1, 2, 0).round()
    return picture
