"""The two towers: network, crossings, loss, optimiser, step. Needs torch and NumPy alone."""

from __future__ import annotations


class NotANumber(RuntimeError):
    """The loss, or what a network makes of images, is no finite number; a step that would have
    followed did not change weights.
    """
