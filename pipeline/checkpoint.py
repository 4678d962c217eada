"""The training state in `torch.distributed.checkpoint`, under whole-network names.

A parameter is saved as the whole of which each tower holds a share along dimension 0, so that any
mesh loads what any other saved. `.metadata` is written last: a folder without it is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pipeline import NotANumber
from pipeline.checkpoint_files import Shares, dcp, load_planner, reader, save_planner, writer
from pipeline.network import Network
from pipeline.optimizer import SGD
from pipeline.tower import Tower

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

# One process alone is meant wherever it says so.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class NotSaved(RuntimeError):
    """A checkpoint could not be written; the message says where and why."""


class Damaged(ValueError):
    """A checkpoint could not be read; the message says which and why."""


def save(
    path: str, tower: Tower, optimizer: SGD, progress: dict[str, Any], mesh: DeviceMesh | None
) -> None:
    """Writes the state to a folder (path or fsspec URL); every rank of the mesh takes part.

    `progress`: what JSON can hold, such as the position in the data. Raises, on every rank alike
    and with nothing that is a checkpoint left, NotSaved, and NotANumber for weights or momenta that
    are none: a step whose loss is finite may make them.
    """
    state = _state(tower, optimizer, optimizer.rate, json.dumps(progress))
    _dump(path, state, _shares(tower), None, alone=mesh is None)


class Writer:
    """Writes checkpoints while training goes on: from copies, in a process group of its own.

    Even the copies are made beside the next step's forward and backward; only its update waits
    until they are complete. One checkpoint at a time: `save` first waits for the one before. Every
    rank of the mesh does the same. `stood`: seconds that training stood still for all this.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.mesh = mesh
        self.group = dist.new_group(backend="gloo") if mesh else None
        self.stood = 0.0
        self._copies: dict[str, Tensor] = {}
        self._complete = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, path: str, tower: Tower, optimizer: SGD, progress: dict[str, Any]) -> None:
        """Starts to write the state as it is now, as `save` of this module does.

        Raises what `finish` does, of the one before.
        """
        start = time.perf_counter()
        self.finish()
        self._complete.clear()
        optimizer.before_change = self._wait
        rest = optimizer.rate, json.dumps(progress)
        arguments = path, tower, optimizer, *rest
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()
        self.stood += time.perf_counter() - start

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> bool:
        """Waits for the one that is being written, if there is one; tells whether there was.

        Raises NotSaved if it could not be written, NotANumber if it is of none.
        """
        if self._thread is None:
            return False
        self._thread.join()
        self._thread = None
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure
        return True

    def _wait(self) -> None:
        """Returns once the copies are complete, so that weights may change."""
        start = time.perf_counter()
        self._complete.wait()
        self.stood += time.perf_counter() - start

    def _copied(self, name: str, local: Tensor) -> Tensor:
        # The same memory each time: fresh pages cost more than the copy.
        if name not in self._copies:
            self._copies[name] = torch.empty_like(local)
        return self._copies[name].copy_(local)

    def _write(self, path: str, tower: Tower, optimizer: SGD, rate: float, progress: str) -> None:
        try:
            try:
                state = _state(tower, optimizer, rate, progress, self._copied)
            finally:
                self._complete.set()
            _dump(path, state, _shares(tower), self.group, alone=self.mesh is None)
        except BaseException as error:
            self._failure = error


def load(path: str, tower: Tower, optimizer: SGD, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Loads a state into this rank's share and returns its progress.

    Layers that were frozen when it was saved have no momentum in it, and start anew. Raises
    ValueError, naming a parameter, if it is of another network, Damaged if it cannot be read.
    """
    found = _opened(path)
    saved = _saved(found)
    _check(path, saved, tower.network)
    state: dict[str, Any] = {**_tensors(tower, optimizer), "rate": 0.0, "progress": ""}
    for name in [name for name in state if name.startswith("momentum.") and name not in saved]:
        state.pop(name).zero_()
    _load(path, found, state, _shares(tower), alone=mesh is None)
    optimizer.rate = state["rate"]  # which the velocities belong to
    return json.loads(state["progress"])


def read_progress(path: str) -> dict[str, Any]:
    """The progress that a checkpoint holds, without its tensors. Raises Damaged."""
    state = {"progress": ""}
    _load(path, _opened(path), state)
    return json.loads(state["progress"])


def load_weights(path: str) -> dict[str, Tensor]:
    """The whole network's weights by name, on the CPU, without a process group. Raises Damaged."""
    found = _opened(path)
    weights = {
        name.removeprefix("weights."): torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in _saved(found).items()
        if name.startswith("weights.")
    }
    _load(path, found, {"weights": weights})
    return weights


def weights_sha256(path: str) -> str:
    """SHA-256 over the whole network's weights in the order of their names."""
    return sha256(load_weights(path))


def sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over weights, on any device, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state(
    tower: Tower,
    optimizer: SGD,
    rate: float,
    progress: str,
    copied: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    # Momentum is kept in units of the rate.
    return {**_tensors(tower, optimizer, copied), "rate": rate, "progress": progress}


def _dump(
    path: str,
    state: dict[str, Any],
    shares: Shares,
    group: dist.ProcessGroup | None,
    *,
    alone: bool,
) -> None:
    planner = save_planner(shares)
    try:
        dcp().save(
            state, storage_writer=writer(path), planner=planner, process_group=group, no_dist=alone
        )
    except dcp().api.CheckpointException as error:  # which is no Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, NotANumber):
            raise NotANumber(f"{path} would hold weights that are no numbers: {cause}") from None
        raise NotSaved(f"{path} cannot be written by rank {rank}: {cause}") from cause


def _opened(path: str) -> Any:
    """A Reader that knows what there is. Raises Damaged."""
    found = reader(path)
    with _named(path):
        found.read_metadata()  # here, as torch would hide why it cannot be read
    return found


def _load(
    path: str,
    found: Any,
    state: dict[str, Any],
    shares: Shares | None = None,
    *,
    alone: bool = True,
) -> None:
    with _named(path):
        dcp().load(state, storage_reader=found, planner=load_planner(shares or {}), no_dist=alone)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """What a damaged file makes its readers raise as Damaged; the rest, such as of stores and of
    other ranks, as it is.
    """
    try:
        yield
    except BaseException as error:
        failures = getattr(error, "failures", {})  # of the ranks, in reading
        cause = next((cause for cause, _ in failures.values()), error)
        if isinstance(cause, (*_OF_DAMAGE, *([RuntimeError] if failures else []))):
            said = " ".join(str(cause).split())[:150] or "no message"
            raise Damaged(
                f"{path} is damaged ({type(cause).__name__}: {said}); an earlier one may be whole"
            ) from None
        raise cause from None


_OF_DAMAGE = (
    *(EOFError, FileNotFoundError, ImportError, pickle.UnpicklingError),
    *(AttributeError, LookupError, TypeError, ValueError),
)


def _tensors(
    tower: Tower, optimizer: SGD, copied: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """This rank's part of the weights and momenta, the very memory unless it is `copied`."""
    weights, momenta = tower.weights(), optimizer.momenta()
    local = {f"weights.{name}": p.detach() for name, p in weights.items()}
    local |= {f"momentum.{name}": momenta[p] for name, p in weights.items() if p in momenta}
    return {key: copied(key, part) if copied else part for key, part in local.items()}


def _shares(tower: Tower) -> Shares:
    shares = tower.shares().items()
    return {f"{kind}.{name}": share for name, share in shares for kind in ("weights", "momentum")}


def _saved(found: Any) -> dict[str, TensorStorageMetadata]:
    """The tensors that a Reader's checkpoint has."""
    items = found.read_metadata().state_dict_metadata
    tensor = dcp(".metadata").TensorStorageMetadata
    return {name: m for name, m in items.items() if isinstance(m, tensor)}


def check(path: str, network: Network) -> None:
    """Raises ValueError, naming parameter and shapes, if a checkpoint is of another network, and
    Damaged.
    """
    _check(path, _saved(_opened(path)), network)


def _check(path: str, saved: Mapping[str, TensorStorageMetadata], network: Network) -> None:
    shapes = {name.split(".", 1)[1]: tuple(m.size) for name, m in saved.items()}
    for index, layer in enumerate(network.layers):
        want, have = network.weight_shape(index), shapes.get(f"{layer.name}.weight")
        if want != have:
            raise ValueError(
                f"{path} is of another network: {layer.name}.weight is {have}, "
                f"{network.name} wants {want}"
            )
