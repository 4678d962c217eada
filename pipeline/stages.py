"""Where a network is cut into the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from pipeline.network import Network


def cut(network: Network, stages: int, names: Sequence[str] = ()) -> tuple[range, ...]:
    """The layers of each stage: cut before the layers called `names`, else balanced.

    Balanced means that the stage with the most multiply-adds has as few as can be. Raises
    ValueError, with the numbers, for more stages than layers and for a name that is no cut.
    """
    layers = [layer.name for layer in network.layers]
    if names:
        for name in names:
            if name not in layers[1:]:
                raise ValueError(f"cuts has {name!r}: one of {', '.join(layers[1:])}")
        starts = [0, *sorted({layers.index(name) for name in names})]
        if len(starts) != stages:
            raise ValueError(f"stages is {stages}: {len(starts)} by cuts {','.join(names)}")
    else:
        if stages > len(layers):
            raise ValueError(f"stages is {stages}: {network.name} has {len(layers)} layers")
        costs = tuple(network.multiply_adds(index) for index in range(len(layers)))
        starts = list(_balanced(costs, 0, stages)[1])
    ends = [*starts[1:], len(layers)]
    return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))


@cache
def _balanced(costs: tuple[int, ...], start: int, stages: int) -> tuple[int, tuple[int, ...]]:
    """The least cost of the dearest of so many stages from `start` on, and their starts."""
    if stages == 1:
        return sum(costs[start:]), (start,)
    best: tuple[int, tuple[int, ...]] | None = None
    for end in range(start + 1, len(costs) - stages + 2):
        rest, starts = _balanced(costs, end, stages - 1)
        found = max(sum(costs[start:end]), rest), (start, *starts)
        best = min(best, found) if best else found
    assert best
    return best
