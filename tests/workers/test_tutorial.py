"""The tutorial does what it says, at a small size, and rates are measured on its shards."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.checkpoint import load_weights
from workers.cli import main
from workers.config import configure

pytestmark = pytest.mark.usefixtures("cluster")
SCRIPT = Path(__file__).parents[2] / "docs" / "tutorial.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorial")


def test_it_runs_and_fine_tunes_what_it_does_not_freeze(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_from_file_location("tutorial", SCRIPT)
    assert spec
    assert spec.loader
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    result = script.tutorial(str(folder), images=150, epochs=1)
    assert (result["first"]["steps"], result["second"]["steps"]) == (3, 2)
    assert result["evaluated"]["images"] == 25
    out, err = capsys.readouterr()
    assert out.count("star.jpg") == 2
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 5 * 144
    assert (folder / "report.html").exists()

    source = f"{folder}/shapes.safetensors"
    assert f"fc8 is drawn new: 10 other classes at {source}" in err
    config = configure({}, f"{folder}/tuned/config.toml")
    assert (config.init, config.freeze) == (source, "conv1:conv5")
    before = load_weights(f"{folder}/run/checkpoints/step-00000003")
    after = load_weights(f"{folder}/tuned/checkpoints/step-00000002")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("conv")}
    assert after["fc8.weight"].shape == (2, 1024)


def test_rates_are_measured_where_a_run_would_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("workers.rates.SECONDS", 0.2)
    options = ("--network", "alexnet-mini", "--batch", "32", "--towers", "1")
    assert main(["plan", f"{folder}/round", *options, "--measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["mesh"], found["images"]) == ("1x1x1", 60)
    assert 0 < found["images_per_second"] <= found["tower_rate"]
    assert found["augmenters_needed"] == found["tower_rate"] / found["augmenter_rate"]
