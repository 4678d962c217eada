"""Fine-tuning: a run that starts from another's weights, some of them frozen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from datasets.drawn import CLASSES, draw
from datasets.images import encode
from datasets.shards import write_manifest, write_split
from pipeline.checkpoint import load_weights, read_progress
from workers.cli import main
from workers.config import configure
from workers.data import Classes
from workers.initial import read_initial
from workers.run import RunFolder
from workers.weights import export


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 images of three classes, the last of which the trained run does not know."""
    folder, names = str(tmp_path_factory.mktemp("three")), ("disc", "ring", "blob")
    records = [(encode(draw(5, "train", n)[0]), f"{n}", n % 3) for n in range(40)]
    written = write_split(folder, "train", records, names, rows_per_group=8)
    write_manifest(folder, {"train": written}, names, size=72)
    return folder


@pytest.fixture
def mistaken(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    torch.save({"fc8.bias": torch.zeros(3), "conv1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "none.pt"], "none.pt: no such file"),
        (["--init", "folder"], "folder: no run and no checkpoint in this folder"),
        (["--init", "w.pt"], "w.pt: conv1.weight is (1,), alexnet-mini wants (32, 3, 11, 11)"),
        (["--init", "RUN", "--network", "cifar", "--image", "72"], "fc4.bias is missing; there"),
        (["--init", "RUN", "--network", "cifar"], ": they are of --network alexnet-mini"),
        (["--init", "w.pt", "--resume", "--run", "r"], "--init has no effect with --resume"),
        (["--freeze", "conv9"], "freeze has 'conv9': FIRST:LAST of conv1, conv2, "),
        (["--freeze", "conv3:conv1"], "freeze is conv3:conv1: conv1 comes before conv3"),
        (["--freeze", "conv1:fc8"], "freeze is conv1:fc8: that leaves no layer to train"),
    ],
)
def test_a_mistake_is_one_line_exit_2_and_no_run(
    options: list[str],
    message: str,
    trained: Path,
    three: str,
    mistaken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(mistaken)
    given = [str(trained / "run") if option == "RUN" else option for option in options]
    assert main(["train", three, "--network", "alexnet-mini", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("towers: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (mistaken / "runs").exists()


def test_a_file_at_a_url_of_the_same_classes_keeps_its_last_layer(
    trained: Path, tmp_path: Path
) -> None:
    file, last = f"{tmp_path}/w.safetensors", "fc8.weight"
    export(f"{trained}/run", file, 3)
    weights = load_weights(f"{trained}/run/checkpoints/step-00000003")
    given = {"network": "alexnet-mini", "init": f"file://{file}"}
    for name, classes, kept in (
        ("same", CLASSES, True),
        ("others", CLASSES[::-1], False),
        ("nameless", tuple("0123456789"), True),
        ("more", (*CLASSES, "blob"), False),
    ):
        config = configure({**given, "run": f"{tmp_path}/{name}"})
        folder = RunFolder(config, resume=False)
        folder.create()
        line = read_initial(config).begin(folder, config, Classes(classes, {}))
        folder.close()
        found = load_weights(folder.checkpoint(0))
        assert len(found[last]) == len(classes)
        assert torch.equal(found[last], weights[last]) == kept == (line == "")
        assert all(torch.equal(found[n], w) for n, w in weights.items() if n[:3] != "fc8")


def test_what_no_shape_tells_is_said(trained: Path, tmp_path: Path) -> None:
    file, alone = f"{tmp_path}/w.safetensors", f"{tmp_path}/alone"
    export(f"{trained}/run", file, 3)
    step = f"{trained}/run/checkpoints/step-00000003"
    shutil.copytree(step, alone)
    assert {"torch", "ray"} <= read_progress(alone)["versions"].keys()
    for source in (file, f"{trained}/run", step, alone):
        given = {"network": "alexnet-mini", "init": source, "run": f"{tmp_path}/run"}
        assert read_initial(configure(given)).otherwise(configure(given)) == ""
        same = configure({**given, "crop": 64})  # as the table has it
        assert read_initial(same).otherwise(same) == ""
        config = configure({**given, "crop": 65})
        assert read_initial(config).otherwise(config).endswith("crop 64; here crop 65")
        config = configure({**given, "activation": "tanh", "scale": 1.0})
        assert read_initial(config).otherwise(config) == (
            f"the weights at {source} come from activation relu, scale 0.015625; "
            "here activation tanh, scale 1.0"
        )
