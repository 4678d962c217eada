"""The augmentation fleet: what each block of its execution holds of an itinerary's batches.

A block of its input names one item of the itinerary and one replica, the block of its output is
that replica's part of the batch: read, decoded, cropped, packed. The plan is pure, so which actor
makes a block, how many actors there are and which of them die changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from datasets import DataError
from datasets.augmentation import Augmentation, Batch, Loader
from datasets.layout import Dataset
from datasets.plan import Itinerary, RowNumbers
from datasets.rows import Rows
from datasets.statistics import Statistics
from datasets.storage import StoreFailed
from workers.config import Config
from workers.parts import IN_HAND, READ_AHEAD, Packed, Part
from workers.placement import Placement
from workers.pool import Pool
from workers.watch import Watch

SEGMENT = 16384  # blocks of one execution; Ray Data wants to know all of its input at the start
AHEAD = 4, 8  # blocks that an augmenter works on or has next, for large and for small ones
AHEAD_BYTES = 16 << 20  # of crops, if that is between the two


class Fleet:
    """Makes batches of the items of `itinerary` by augmenters placed as `where` says, or by those
    of a `pool`.
    """

    def __init__(
        self,
        dataset: Dataset,
        itinerary: Itinerary,
        config: Config,
        where: Placement,
        statistics: Statistics,
        pool: Pool | None = None,
    ) -> None:
        self.dataset, self.itinerary, self.config, self.where = dataset, itinerary, config, where
        self.pool, self.name = pool, pool.name if pool else ""
        self.replicas = where.mesh.replicas
        self.apart = where.mesh.stages > 1  # two blocks a part cost the fleet a quarter of its rate
        self.crop = config.build(len(dataset.classes)).crop
        self.part_bytes = part_bytes(config, self.crop)
        self.aug = Augmentation(
            config.image,
            self.crop,
            pad=config.pad,
            mirror=config.mirror,
            random_crop=config.crops,
            colour=config.colour,
        )
        self.colour = statistics.colour(config.colour_scale)  # type: ignore[arg-type]

    def load(
        self, index: int, replica: int, loaders: dict[str, Loader], then: Iterable[int] = ()
    ) -> Part:
        """The part of item `index` that belongs to `replica`; `loaders` keeps those made so far.
        `then` are items that are likely next here.
        """
        item, (start, rows) = self.itinerary.item(index), self._rows(index, replica)
        later = [
            self._rows(i, replica)[1]
            for i in then
            if i < len(self.itinerary) and self.itinerary.item(i).split == item.split
        ]
        try:
            if item.split not in loaders:
                loaders[item.split] = Loader(
                    self.dataset,
                    item.split,
                    self.aug,
                    self.colour,
                    seed=self.config.seed,
                    on_error=self.config.on_error,  # type: ignore[arg-type]
                    cache=self._cache_bytes(item.split),
                    again=bool(self.pool)
                    or self.itinerary.total_steps > self.itinerary.steps_per_epoch,
                    memory=Rows.cache_bytes // (self.pool.runs if self.pool else 1),
                )
            batch = loaders[item.split].load(
                rows, item.epoch, item.training, np.concatenate(later) if later else None
            )
        except DataError as error:
            return _fault(self.crop, error)
        # Rows of a batch are distinct; those that were skipped leave their places empty.
        return Part(batch, start + np.flatnonzero(np.isin(rows, batch.rows)))

    def _rows(self, index: int, replica: int) -> tuple[int, RowNumbers]:
        """Where a replica's part of an item begins, and its rows."""
        rows = self.itinerary.rows(index)
        start, end = (len(rows) * r // self.replicas for r in (replica, replica + 1))
        return start, rows[start:end]

    def _cache_bytes(self, split: str) -> float:
        """A split's share of what a node keeps."""
        all_rows = sum(
            self.dataset.rows(name) for name in ("train", self.itinerary.held_out) if name
        )
        return self.config.cache * 1e9 * self.dataset.rows(split) / all_rows

    def stream(self, start: int, watch: Watch) -> Iterator[tuple[int, int, Packed]]:
        """Item, replica and packed part of each item from `start` on, in order, without end until
        the itinerary's. Closing the iterator ends the execution behind it.
        """
        blocks = range(start * self.replicas, len(self.itinerary) * self.replicas)
        for first in range(0, len(blocks), SEGMENT):
            segment = blocks[first : first + SEGMENT]
            for block, part in zip(segment, self._execute(segment, watch), strict=True):
                yield *self.named(block), part

    def named(self, block: int) -> tuple[int, int]:
        """Item and replica of a block, counted from the run's start."""
        return divmod(block, self.replicas)

    def _execute(self, blocks: range, watch: Watch) -> Iterator[Packed]:
        if self.pool:
            watch.pooled = len(self.pool.augmenters)
            return self.pool.parts(self, map(self.named, blocks))
        from workers.execution import execute  # Ray Data, which a supervisor does without

        return execute(self, blocks, watch)


def part_bytes(config: Config, crop: int) -> int:
    """Of one replica's part of a batch."""
    return -(-config.batch // config.replicas) * (crop * crop * 3 + 32) + 4096


def store_bytes(config: Config, crop: int, augmenters: int) -> int:
    """Of the object store for so many augmenters: what lives, from a task's start until the towers
    let go of the block.
    """
    size = part_bytes(config, crop)
    living = config.replicas * (READ_AHEAD + IN_HAND) + augmenters * (blocks_ahead(size) + 1)
    return living * size


def blocks_ahead(size: int) -> int:
    """How many blocks of so many bytes an augmenter has at a time.

    Ray Data looks after its actors ten times a second: what they have must last till then.
    """
    return min(max(AHEAD_BYTES // size, AHEAD[0]), AHEAD[1])


def _fault(crop: int, error: DataError) -> Part:
    none, crops = np.zeros(0, np.int64), np.zeros((0, crop, crop, 3), np.uint8)
    batch = Batch(crops, none, np.zeros((0, 3), np.float32), none, 0, [])
    return Part(batch, none, str(error), away=isinstance(error, StoreFailed))
