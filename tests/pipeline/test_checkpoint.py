"""A checkpoint of one mesh loads on every other, exactly."""

from __future__ import annotations

import io
import os
import pickle
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from ranks import ALONE, TOWERS, Ranks, batch, devices, joined, make_trainer, seen
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from pipeline import NotANumber, checkpoint
from pipeline.checkpoint_files import Unpickler
from pipeline.mesh import Mesh
from pipeline.network import Network, build
from pipeline.training import Trainer

NETWORK = build("cifar", 11)  # an odd number of classes: 6 in one tower, 5 in the other
PROGRESS = {"epoch": 3, "batch": 17, "errors": [0.5, 0.25], "name": "é"}
State = tuple[dict[str, Any], dict[str, Tensor]]


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, and momenta of those that are trained, copied."""
    weights, momenta = trainer.tower.weights(), trainer.optimizer.momenta()
    found = {name: p.detach().clone() for name, p in weights.items()}
    return found | {f"v {name}": momenta[p].clone() for name, p in weights.items() if p in momenta}


def write(network: Network, path: str, mesh: Mesh, steps: int = 2) -> dict[str, Tensor]:
    trainer = make_trainer(network, mesh, dtype=torch.float32)
    for step in range(steps):
        trainer.step(batch(network, 4, step), step)
    checkpoint.save(path, trainer.tower, trainer.optimizer, PROGRESS, devices(mesh))
    return state(trainer)


def read(network: Network, path: str, mesh: Mesh) -> State:
    """Progress and state, into a trainer that has other weights and momenta of its own."""
    trainer = make_trainer(network, mesh, dtype=torch.float32)
    trainer.step(batch(network, 3, 50), 50)
    progress = checkpoint.load(path, trainer.tower, trainer.optimizer, devices(mesh))
    return progress, state(trainer)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def whole(answers: list[dict[str, Tensor]], mesh: Mesh) -> dict[str, Tensor]:
    return joined(answers[: mesh.towers])


def test_two_towers_save_and_one_process_loads(pair: Ranks, tmp_path: Path) -> None:
    saved = whole(pair.run(write, NETWORK, f"{tmp_path}/c", TOWERS), TOWERS)
    progress, loaded = read(NETWORK, f"{tmp_path}/c", ALONE)
    assert progress == PROGRESS
    assert_equal(loaded, saved)
    assert not (saved["v conv1.weight"] == 0).all()
    # Which takes as long to import as all of torch.
    assert not any(pair.run(is_imported, "torch._dynamo"))


def is_imported(name: str) -> bool:
    return name in sys.modules


def test_one_process_saves_and_any_mesh_loads(pair: Ranks, four: Ranks, tmp_path: Path) -> None:
    saved = write(NETWORK, f"{tmp_path}/c", ALONE)
    for ranks, mesh in (pair, TOWERS), (pair, Mesh(2, 1, 1)), (four, Mesh(2, 1, 2)):
        answers = ranks.run(read, NETWORK, f"{tmp_path}/c", mesh)
        assert [progress for progress, _ in answers] == [PROGRESS] * mesh.size
        states = [found for _, found in answers]
        assert_equal(whole(states, mesh), saved)
        assert_equal(joined(states[-mesh.towers :]), saved)


def test_training_goes_on_as_if_it_had_not_stopped(pair: Ranks, tmp_path: Path) -> None:
    want = pair.run(write, NETWORK, f"{tmp_path}/straight", TOWERS, 4)
    pair.run(write, NETWORK, f"{tmp_path}/half", TOWERS, 2)
    got = pair.run(resume, NETWORK, f"{tmp_path}/half", TOWERS, (2, 4))
    for one, other in zip(got, want, strict=True):
        assert_equal(one, other)


def resume(network: Network, path: str, mesh: Mesh, steps: tuple[int, int]) -> dict[str, Tensor]:
    trainer = make_trainer(network, mesh, dtype=torch.float32)
    checkpoint.load(path, trainer.tower, trainer.optimizer, devices(mesh))
    for step in range(*steps):
        trainer.step(batch(network, 4, step), step)
    return state(trainer)


def untrained(network: Network, path: str, mesh: Mesh) -> None:
    write(network, path, mesh, 0)


def test_weights_are_the_whole_networks_and_their_sum_the_same_from_any_mesh(
    pair: Ranks, four: Ranks, tmp_path: Path
) -> None:
    paths = [f"{tmp_path}/{name}" for name in ("one", "two", "copies", "four", "trained")]
    untrained(NETWORK, paths[0], ALONE)
    pair.run(untrained, NETWORK, paths[1], TOWERS)
    pair.run(untrained, NETWORK, paths[2], Mesh(2, 1, 1))
    four.run(untrained, NETWORK, paths[3], Mesh(2, 1, 2))
    trained = write(NETWORK, paths[4], ALONE)
    sums = [checkpoint.weights_sha256(path) for path in paths]
    assert len(set(sums[:4])) == 1
    assert sums[4] != sums[0]
    weights = checkpoint.load_weights(paths[4])
    assert_equal(weights, {n: t for n, t in trained.items() if not n.startswith("v ")})
    assert_equal(checkpoint.load_weights(paths[3]), checkpoint.load_weights(paths[0]))


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://checkpoints/one"
    fsspec.filesystem("memory").rm("/checkpoints", recursive=True)


def test_a_checkpoint_goes_to_memory(memory: str) -> None:
    saved = write(NETWORK, memory, ALONE)
    assert checkpoint.read_progress(memory) == PROGRESS
    progress, loaded = read(NETWORK, memory, ALONE)
    assert progress == PROGRESS
    assert_equal(loaded, saved)
    weights = checkpoint.load_weights(memory)
    assert torch.equal(weights["fc4.bias"], saved["fc4.bias"])


def test_two_towers_save_to_a_url(pair: Ranks, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/c"
    saved = whole(pair.run(write, NETWORK, url, TOWERS), TOWERS)
    assert_equal(read(NETWORK, url, ALONE)[1], saved)
    assert checkpoint.weights_sha256(url) == checkpoint.weights_sha256(f"{tmp_path}/c")


def test_the_sum_is_over_weights_alone(tmp_path: Path) -> None:
    trainer = make_trainer(NETWORK, dtype=torch.float32)
    for path, progress in (f"{tmp_path}/a", {"step": 1}), (f"{tmp_path}/b", {"step": 2}):
        checkpoint.save(path, trainer.tower, trainer.optimizer, progress, None)
        trainer.optimizer.momenta()[trainer.tower.weights()["conv1.bias"]].add_(1)
    assert checkpoint.weights_sha256(f"{tmp_path}/a") == checkpoint.weights_sha256(f"{tmp_path}/b")
    assert checkpoint.read_progress(f"{tmp_path}/b") == {"step": 2}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (build("cifar", 12), r"fc4\.weight is \(11, 1152\), cifar wants \(12, 1152\)"),
        (build("cifar", 11, columns=1), r"conv1\.weight is \(64, 3, 5, 5\), cifar wants \(32,"),
        (
            build("alexnet-mini", 11),
            r"conv1\.weight is \(64, 3, 5, 5\), alexnet-mini wants \(32, 3, 11, 11\)",
        ),
    ],
    ids=["classes", "columns", "table"],
)
def test_a_checkpoint_of_another_network_is_refused(
    tmp_path: Path, other: Network, message: str
) -> None:
    write(NETWORK, f"{tmp_path}/c", ALONE, 0)
    trainer = make_trainer(other, dtype=torch.float32)
    before = state(trainer)
    with pytest.raises(ValueError, match=f"{tmp_path}/c is of another network: {message}"):
        checkpoint.load(f"{tmp_path}/c", trainer.tower, trainer.optimizer, None)
    assert_equal(state(trainer), before)


MESHES = (ALONE, TOWERS, Mesh(1, 2, 1), Mesh(1, 2, 2), Mesh(2, 1, 2), Mesh(1, 3, 2), Mesh(2, 2, 2))


def write_aside(network: Network, path: str, mesh: Mesh) -> dict[str, Tensor]:
    """Saves while training goes on, and returns the state that it was asked to save."""
    trainer = make_trainer(network, mesh, dtype=torch.float32)
    trainer.step(seen(batch(network, 4, 0), trainer), 0)
    writer = checkpoint.Writer(devices(mesh))
    asked = state(trainer)
    writer.save(path, trainer.tower, trainer.optimizer, PROGRESS)
    for step in range(1, 4):
        trainer.step(seen(batch(network, 4, step), trainer), step)
    assert writer.finish()
    assert not writer.finish()
    return asked


def read_only(network: Network, path: str, mesh: Mesh) -> State:
    trainer = make_trainer(network, mesh, dtype=torch.float32)
    return checkpoint.load(path, trainer.tower, trainer.optimizer, devices(mesh)), state(trainer)


@pytest.mark.parametrize("saved", MESHES, ids=str)
def test_what_any_mesh_saved_while_it_trained_every_other_loads(
    saved: Mesh, pair: Ranks, four: Ranks, six: Ranks, eight: Ranks, tmp_path: Path
) -> None:
    ranks = {2: pair, 4: four, 6: six, 8: eight}

    def on(mesh: Mesh, job: Any) -> list[Any]:
        arguments = NETWORK, f"{tmp_path}/c", mesh
        return ranks[mesh.size].run(job, *arguments) if mesh.size > 1 else [job(*arguments)]

    def replica(answers: list[Any], mesh: Mesh) -> dict[str, Tensor]:
        return joined(answers[: mesh.stages * mesh.towers])

    want = replica(on(saved, write_aside), saved)
    assert len(want) == 2 * 2 * len(NETWORK.layers)
    for mesh in MESHES:
        answers = on(mesh, read_only)
        assert all(progress == PROGRESS for progress, _ in answers)
        assert_equal(replica([tensors for _, tensors in answers], mesh), want)


def test_velocities_come_back_with_the_rate_that_they_belong_to(tmp_path: Path) -> None:
    ran, resumed = (make_trainer(NETWORK, dtype=torch.float32, rate=r) for r in (0.01, 0.05))
    ran.step(batch(NETWORK, 4, 0), 0)
    ran.optimizer.set_rate(0.002)
    ran.step(batch(NETWORK, 4, 1), 1)
    checkpoint.save(f"{tmp_path}/c", ran.tower, ran.optimizer, PROGRESS, None)
    checkpoint.load(f"{tmp_path}/c", resumed.tower, resumed.optimizer, None)
    for trainer in (ran, resumed):
        trainer.optimizer.set_rate(0.01)
        trainer.step(batch(NETWORK, 4, 2), 2)
    assert_equal(state(resumed), state(ran))


def test_a_step_waits_until_the_weights_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, writer = make_trainer(NETWORK, dtype=torch.float32), checkpoint.Writer(None)
    trainer.step(batch(NETWORK, 4, 0), 0)
    asked = state(trainer)
    copied = writer._copied

    def slow(name: str, local: Tensor) -> Tensor:
        time.sleep(0.05)  # of each, during which a step would be through
        return copied(name, local)

    monkeypatch.setattr(writer, "_copied", slow)
    writer.save(f"{tmp_path}/c", trainer.tower, trainer.optimizer, PROGRESS)
    trainer.step(batch(NETWORK, 4, 1), 1)
    assert writer.finish()
    assert_equal(read_only(NETWORK, f"{tmp_path}/c", ALONE)[1], asked)


def spoilt(path: str, mesh: Mesh, spoiler: int) -> None:
    """What one tower has learned is no number, as by a gradient that overflowed."""
    trainer = make_trainer(NETWORK, mesh, dtype=torch.float32)
    trainer.step(batch(NETWORK, 4, 0), 0)
    if trainer.pair and trainer.pair.tower == spoiler:
        momentum = trainer.optimizer.momenta()[trainer.tower.weights()["conv2.weight"]]
        momentum[0, 0, 0, 0] = torch.inf
    with pytest.raises(NotANumber, match=r"/c would .*: momentum\.conv2\.weight has some"):
        checkpoint.save(path, trainer.tower, trainer.optimizer, PROGRESS, devices(mesh))


@pytest.mark.parametrize("spoiler", [0, 1])
def test_what_is_no_number_is_not_saved(pair: Ranks, spoiler: int, tmp_path: Path) -> None:
    pair.run(spoilt, f"{tmp_path}/c", TOWERS, spoiler)
    assert not (tmp_path / "c/.metadata").exists()
    assert not list(tmp_path.glob("c/*.distcp"))


def test_what_a_disk_says_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(NETWORK, dtype=torch.float32)
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        with pytest.raises(checkpoint.NotSaved, match=r"/c cannot be written .* File too large$"):
            checkpoint.save(f"{tmp_path}/c", trainer.tower, trainer.optimizer, PROGRESS, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    with pytest.raises(checkpoint.Damaged):  # nor is what is left taken for one
        checkpoint.load_weights(f"{tmp_path}/c")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(NETWORK, dtype=torch.float32)
    checkpoint.save(f"{tmp_path}/c", trainer.tower, trainer.optimizer, PROGRESS, None)
    file = tmp_path / "c" / name
    file.write_bytes(file.read_bytes()[:100])
    for read in (checkpoint.load_weights, checkpoint.read_progress):
        with pytest.raises(checkpoint.Damaged, match=r"/c is damaged \(\w+: .*an earlier one"):
            read(f"{tmp_path}/c")
    with pytest.raises(checkpoint.Damaged, match="/c is damaged"):
        checkpoint.load(f"{tmp_path}/c", trainer.tower, trainer.optimizer, None)


class Harm:
    """What runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_somebodys_checkpoint_runs_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(NETWORK, dtype=torch.float32)
    checkpoint.save(f"{tmp_path}/c", trainer.tower, trainer.optimizer, PROGRESS, None)
    (tmp_path / "c/.metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(checkpoint.Damaged, match=r"mkdir is no part of a checkpoint's metadata"):
        checkpoint.load_weights(f"{tmp_path}/c")
    harm: Any = Harm(tmp_path / "harm")
    checkpoint._dump(f"{tmp_path}/d", {"rate": 0.1, "progress": harm}, {}, None, alone=True)
    with pytest.raises(checkpoint.Damaged, match=r"/d is damaged \(UnpicklingError"):
        checkpoint.read_progress(f"{tmp_path}/d")
    assert not (tmp_path / "harm").exists()


class Named:
    """What pickles as a call of a module's function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def test_metadata_of_other_versions_of_python_is_read() -> None:
    """Of 3.13, and of early 3.11, which pickles members of an enum by `getattr`."""
    path = b"cpathlib._local\nPosixPath\n(Va\nVb\ntR."
    assert Unpickler(io.BytesIO(path)).load() == Path("a/b")
    kind = _MEM_FORMAT_ENCODING
    text = pickle.dumps(Named(getattr, kind, "TORCH_PRESERVE_FORMAT"))
    assert Unpickler(io.BytesIO(text)).load() is kind.TORCH_PRESERVE_FORMAT
    harm = pickle.dumps(Named(getattr, Path("x"), "unlink"))
    with pytest.raises(pickle.UnpicklingError, match=r"unlink of .* is no part"):
        Unpickler(io.BytesIO(harm)).load()


@pytest.mark.parametrize(
    "error", [ConnectionError("no store"), MemoryError(), RuntimeError("Connection closed by peer")]
)
def test_what_is_no_damage_is_not_called_so(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(NETWORK, dtype=torch.float32)
    checkpoint.save(f"{tmp_path}/c", trainer.tower, trainer.optimizer, PROGRESS, None)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", fail)
    with pytest.raises(type(error)):
        checkpoint.load_weights(f"{tmp_path}/c")


def test_a_full_disk_is_said_by_the_writer(tmp_path: Path) -> None:
    trainer = make_trainer(NETWORK, dtype=torch.float32)
    writer = checkpoint.Writer(None)
    (tmp_path / "file").write_text("not a folder")
    writer.save(f"{tmp_path}/file/c", trainer.tower, trainer.optimizer, PROGRESS)
    with pytest.raises(
        checkpoint.NotSaved, match=r"file/c cannot be written by rank 0: .*Not a dir"
    ):
        writer.finish()
    assert not writer.finish()
