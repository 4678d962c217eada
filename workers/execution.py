"""A fleet's execution by Ray Data: which actors make its blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data._internal.execution.interfaces import TaskContext
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import FromBlocks
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockMetadataWithSchema
from ray.data.dataset import MaterializedDataset

from datasets.augmentation import Loader
from workers.fleet import Fleet, blocks_ahead, store_bytes
from workers.parts import Packed, pack
from workers.watch import Watch

FAULT_BYTES = 4096  # more than a fault takes, and next to nothing
FORESIGHT = 3  # items that an augmenter expects, whose images begin to come from far away


def execute(fleet: Fleet, blocks: range, watch: Watch) -> Iterator[Packed]:
    """The packed parts of a fleet's blocks, in order. Closing the iterator ends the execution."""
    low, high = fleet.config.fleet
    resources = dict(fleet.where.augmenter)
    running = _set_context(fleet, watch, high)
    parts = _alike(len(blocks)).map_batches(
        Augmenter,
        fn_constructor_args=(fleet, blocks),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=resources.pop("CPU"),
        resources=resources or None,
        compute=ActorPoolStrategy(
            min_size=low,
            max_size=high,
            initial_size=low,
            max_tasks_in_flight_per_actor=running,
        ),
    )
    bundles = parts.iter_internal_ref_bundles()
    made = (block for bundle in bundles for block in bundle.blocks)
    for pixels in made:
        rest = next(made) if fleet.apart else pixels
        yield Packed(pixels.ref, rest.ref, pixels.metadata.exec_stats.node_id, _away(pixels))


def _away(block: Any) -> str:
    """How a store failed, if a block is a fault for that: only a small one is looked into."""
    if block.metadata.size_bytes > FAULT_BYTES:
        return ""
    table = ray.get(block.ref)
    return table["error"][0].as_py() if table["away"][0].as_py() else ""


def _set_context(fleet: Fleet, watch: Watch, high: int) -> int:
    """Ray Data's settings of this process: order kept, memory bounded, silence.

    Returns how many blocks each augmenter is to have at a time.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    size = fleet.part_bytes
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Each half of a part is to be a block of its own, where there are halves.
    context.target_max_block_size = 1 if fleet.apart else size
    context.custom_execution_callback_classes = [watch.callback()]
    options = context.execution_options
    options.preserve_order = True
    memory = store_bytes(fleet.config, fleet.crop, high)
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=memory)
    return blocks_ahead(size)


class Augmenter:
    """One actor of the fleet."""

    def __init__(self, fleet: Fleet, blocks: range) -> None:
        self.fleet, self.blocks = fleet, blocks
        self.loaders: dict[str, Loader] = {}
        self.last = blocks.start // fleet.replicas  # item that it made
        self.node = ray.get_runtime_context().get_node_id()

    def __call__(self, _: pa.Table) -> Iterator[pa.Table]:
        task = TaskContext.get_current()
        assert task
        index, replica = self.fleet.named(self.blocks[task.task_idx])
        # It gets every so many-th item, about as many as there are augmenters.
        step = max(1, index - self.last)
        self.last = index
        then = range(index + step, index + step * FORESIGHT + 1, step)
        part = self.fleet.load(index, replica, self.loaders, then)
        yield from pack(replace(part, node=self.node), self.fleet.apart)


def _alike(n: int) -> Any:
    """A Ray Data set of `n` blocks, all of them the same empty one: a task knows by its number what
    to make. `ray.data.from_blocks` would take a millisecond to store each.
    """
    block = pa.table({"none": [None]})
    named = [BlockMetadataWithSchema.from_block(block)] * n
    source = FromBlocks([ray.put(block)] * n, named)
    context = DataContext.get_current().copy()
    stats = DatasetStats(metadata={"FromBlocks": named[:1]}, parent=None)
    return MaterializedDataset(LogicalPlan(source, context), context, stats)
