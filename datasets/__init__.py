"""Images in, batches out: shards, statistics, the plan of a run and its augmentation."""

from __future__ import annotations


class DataError(ValueError):
    """The data is wrong; its one line says what, where (file, row, field) and what to do."""
