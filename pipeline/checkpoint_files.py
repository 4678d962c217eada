"""A checkpoint's files, by torch.distributed.checkpoint: reading them runs nothing that they name,
and what cannot be written says why.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import cache
from importlib import import_module
from pathlib import PosixPath
from typing import Any

import torch

from pipeline import NotANumber


def dcp(name: str = "") -> Any:
    """torch.distributed.checkpoint or a module of it: half as long to import as torch itself, which
    the first step need not wait for.
    """
    return import_module(f"torch.distributed.checkpoint{name}")


def _storage(kind: str, path: str) -> Any:
    """A Reader or Writer of a folder or URL."""
    if "://" in path:
        return getattr(dcp("._fsspec_filesystem"), f"Fsspec{kind}")(path)
    return getattr(dcp(), f"FileSystem{kind}")(path)


_METADATA = "torch.distributed.checkpoint.metadata"
_OF_METADATA = {
    *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size")),
    *(("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")),
    ("pathlib._local", "PosixPath"),  # by Python 3.13
    *(("torch", name) for name in ("float16", "bfloat16", "float32", "float64")),
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Chunk", "Bytes")),
    *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
}
"""What torch pickles into `.metadata`."""


class Unpickler(pickle.Unpickler):
    """Of `.metadata`. Raises UnpicklingError for a name that torch does not write there."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # early versions of Python 3.11 pickle enums so
        if (module, name) not in _OF_METADATA:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")
        return PosixPath if name == "PosixPath" else super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"{name} of {kind!r} is no part of a checkpoint's metadata")
    return kind[name]


def reader(path: str) -> Any:
    """A Reader that runs nothing that somebody's checkpoint may name: torch's own trusts it."""
    found = _storage("Reader", path)

    @cache
    def read_metadata() -> Any:  # without the parameter that has torch look for a rank's own one
        with found.fs.create_stream(found.fs.concat_path(found.path, ".metadata"), "rb") as file:
            metadata = Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp(".metadata").StorageMeta()
        metadata.storage_meta.load_id = found.load_id
        return metadata

    found.read_metadata = read_metadata
    return found


def writer(path: str) -> Any:
    """A Writer of which a file that cannot be written says why."""
    made = _storage("Writer", path)
    create = made.fs.create_stream

    @contextmanager
    def create_stream(*where: Any) -> Iterator[Any]:
        with create(*where) as stream:
            try:
                yield stream
            except RuntimeError as error:  # of torch's zip writer, about what it had to leave
                raise (error.__context__ or error) from None

    made.fs.create_stream = create_stream
    return made


Shares = Mapping[str, tuple[int, int]]
"""Of tensors by name: where the rows that are here begin in the whole, and how many that has."""


def save_planner(shares: Shares) -> Any:
    """A SavePlanner of tensors that are shares of whole ones. A DTensor would say the same, and the
    first one made imports torch's compiler. What the plan raises, NotANumber, every rank is told
    before any writes.
    """

    class Planner(dcp().DefaultSavePlanner):  # type: ignore[misc]
        def create_local_plan(self) -> Any:
            for name, value in self.state_dict.items():
                if isinstance(value, torch.Tensor) and not _finite(value):
                    raise NotANumber(f"{name} has some that are not finite")
            plan = super().create_local_plan()
            return replace(plan, items=[self._placed(item) for item in plan.items])

        def _placed(self, item: Any) -> Any:
            name, data = item.index.fqn, item.tensor_data
            if name not in shares:
                return item
            chunk = _chunk(data.size, shares[name])
            size = torch.Size((shares[name][1], *data.size[1:]))
            return replace(
                item,
                index=dcp(".metadata").MetadataIndex(name, chunk.offsets),
                type=dcp(".planner").WriteItemType.SHARD,
                tensor_data=replace(data, chunk=chunk, size=size),
            )

        def lookup_object(self, index: Any) -> Any:
            return self.state_dict[index.fqn]

    return Planner()


def _finite(x: torch.Tensor) -> bool:
    """Whether all of it is, without a copy of its size."""
    return all(bool(end.isfinite()) for end in x.aminmax())


def load_planner(shares: Shares) -> Any:
    """A LoadPlanner of such tensors and of whole ones; of what is no tensor it runs nothing."""
    default, helpers = dcp(".default_planner"), dcp(".planner_helpers")

    class Planner(default.DefaultLoadPlanner):  # type: ignore[name-defined]
        def create_local_plan(self) -> Any:
            whole = {name: x for name, x in self.state_dict.items() if name not in shares}
            items = list(default.create_default_local_load_plan(whole, self.metadata).items)
            for name, share in shares.items():
                if name in self.state_dict:
                    saved = self.metadata.state_dict_metadata[name]
                    chunk = _chunk(self.state_dict[name].shape, share)
                    items += helpers.create_read_items_for_chunk_list(name, saved, [chunk])
            return dcp(".planner").LoadPlan(items)

        def lookup_tensor(self, index: Any) -> Any:
            return self.state_dict[index.fqn]

        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            torch.load(value, weights_only=True)  # raises if reading it would run anything
            value.seek(0)
            super().load_bytes(read_item, value)

    return Planner()


def _chunk(local: torch.Size, share: tuple[int, int]) -> Any:
    """Where a tensor of this shape lies in the whole."""
    offsets = torch.Size((share[0], *(0 for _ in local[1:])))
    return dcp(".metadata").ChunkStorageMetadata(offsets, local)
