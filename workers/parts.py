"""A replica's part of a batch, and the table that it travels in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets.augmentation import Batch

READ_AHEAD = 8  # finished batches that wait for the towers
IN_HAND = 3  # that a rank has, as views of the object store: in its step, next, on its way


@dataclass(frozen=True)
class Packed:
    """References to a part's pixels and to the rest of it, the same if they are not apart; the id
    of the Ray node that made it and holds it; how a store failed, if it is a fault for that.
    """

    pixels: Any
    rest: Any
    node: str
    away: str = ""


@dataclass(frozen=True)
class Part:
    """A replica's part of a batch.

    `places` int64 [n]: each image's place in the global batch. A fault that ends the run stands in
    `error`, and then there are no images; it may pass if a store is `away`. `node` is the Ray node
    it was made on.
    """

    batch: Batch
    places: NDArray[np.int64]
    error: str = ""
    node: str = ""
    away: bool = False


def pack(part: Part, apart: bool) -> tuple[pa.Table, ...]:
    """A part as a table of one row; if `apart`, as two of one schema, so that stages without pixels
    receive none: crops and shifts, and all the rest. The crops are not copied.
    """
    batch, none = part.batch, np.zeros(0, np.uint8)

    def table(pixels: bool, rest: bool) -> pa.Table:
        return pa.table(
            {
                "crops": _binary(batch.crops if pixels else none),
                "shifts": _binary(batch.shifts if pixels else none),
                "labels": _binary(batch.labels if rest else none),
                "rows": _binary(batch.rows if rest else none),
                "places": _binary(part.places if rest else none),
                "skipped": [batch.skipped],
                "faults": pa.array([batch.faults if rest else []], pa.list_(pa.string())),
                "error": [part.error],
                "node": [part.node],
                "away": [part.away],
            }
        )

    return (table(True, False), table(False, True)) if apart else (table(True, True),)


def unpack(pixels: pa.Table | None, rest: pa.Table) -> Part:
    """What `pack` packed, as read-only views of the tables' memory; no crops without `pixels`."""
    labels = _array(rest, "labels", np.int64)
    crops, shifts = np.zeros((0, 0, 0, 3), np.uint8), np.zeros((0, 3), np.float32)
    if pixels is not None:
        flat = _array(pixels, "crops", np.uint8)
        side = round((flat.size / 3 / max(1, len(labels))) ** 0.5)
        crops = flat.reshape(len(labels), side, side, 3)
        shifts = _array(pixels, "shifts", np.float32).reshape(-1, 3)
    skipped, faults = rest["skipped"][0].as_py(), rest["faults"][0].as_py()
    batch = Batch(crops, labels, shifts, _array(rest, "rows", np.int64), skipped, faults)
    others = (rest[name][0].as_py() for name in ("error", "node", "away"))
    return Part(batch, _array(rest, "places", np.int64), *others)


def _binary(values: NDArray[Any]) -> pa.Array:
    values = np.ascontiguousarray(values)
    ends = pa.py_buffer(np.array([0, values.nbytes], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(values)])


def _array(table: pa.Table, name: str, dtype: Any) -> NDArray[Any]:
    column = table[name].chunk(0)  # a scalar taken of it would be a copy
    _, ends, values = column.buffers()
    start, end = np.frombuffer(ends, np.int64)[column.offset : column.offset + 2]
    return np.frombuffer(values[start:end], dtype)
