"""Work on many items, spread over the cluster by Ray Data."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from datasets import DataError
from workers.config import UserError
from workers.room import await_room, settle


def spread(
    function: Callable[[Any, Any], Iterator[Any]],
    shared: Any,
    items: Sequence[Any],
    *,
    workers: int | None = None,
    here: bool = False,
    gpus: int = 0,
) -> Iterator[tuple[int, Any]]:
    """The values that `function(shared, item)` yields for each item, as they come, each with the
    item's number; by as many tasks of one CPU as the cluster has room for, or `workers`; with
    `gpus`, by as many processes at most of one GPU each; in this process if `here`.

    A lost task's item is done again: its values come once. Raises the DataError or UserError that
    a task did, and UserError if the cluster has no room.
    """
    if here or not items:
        yield from ((n, value) for n, item in enumerate(items) for value in function(shared, item))
        return
    await_room("a worker", {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0})
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    tables = [pa.table({"item": [i], "value": [pickle.dumps(v)]}) for i, v in enumerate(items)]
    most = min(workers or gpus or len(items), len(items))
    given = ray.data.from_blocks(tables)
    context = given.context  # not the caller's own
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # so that each value comes when it is there
    context.execution_options.preserve_order = False
    found = given.map_batches(
        _Caller if gpus else _call,
        fn_kwargs={"function": function, "shared": ray.put(shared)},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=1 if gpus else None,
        # Ray ends a task's process if it had a GPU; actors keep theirs.
        compute=ActorPoolStrategy(min_size=1, max_size=min(most, gpus), initial_size=1)
        if gpus
        else TaskPoolStrategy(size=most if workers else None),
    )
    for bundle in found.iter_internal_ref_bundles():
        for table in ray.get(bundle.block_refs):
            for row in table.to_pylist():
                value = pickle.loads(row["value"])
                if row["failed"]:
                    raise value
                yield row["item"], value
    settle()


def _call(block: pa.Table, function: Any, shared: Any) -> Iterator[pa.Table]:
    yield from _values(block, function, ray.get(shared))


def _values(block: pa.Table, function: Any, shared: Any) -> Iterator[pa.Table]:
    row = block.to_pylist()[0]

    def table(value: Any, failed: bool) -> pa.Table:
        return pa.table({"item": [row["item"]], "value": [pickle.dumps(value)], "failed": [failed]})

    fault: Exception | None = None
    try:
        for value in function(shared, pickle.loads(row["value"])):
            yield table(value, False)
    except (DataError, UserError) as error:
        fault = error
    if fault:
        yield table(fault, True)


class _Caller:
    """`_call` as an actor, where what is shared stays: networks on a GPU."""

    shared: Any = None

    def __call__(self, block: pa.Table, function: Any, shared: Any) -> Iterator[pa.Table]:
        self.shared = self.shared or ray.get(shared)
        yield from _values(block, function, self.shared)


def only_here(*urls: str) -> bool:
    """Whether some of these fsspec URLs mean something in this process alone."""
    return any("memory://" in url for url in urls)
