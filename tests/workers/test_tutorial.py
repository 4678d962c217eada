"""The tutorial does what it says, at a small size."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import load_weights
from workers.config import configure

SCRIPT = Path(__file__).parents[2] / "docs" / "tutorial.py"


@pytest.mark.usefixtures("cluster")
def test_it_runs_and_fine_tunes_what_it_does_not_freeze(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_from_file_location("tutorial", SCRIPT)
    assert spec
    assert spec.loader
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    result = script.tutorial(str(tmp_path), images=150, epochs=1)
    assert (result["first"]["steps"], result["second"]["steps"]) == (2, 2)
    assert result["evaluated"]["images"] == 25
    out, err = capsys.readouterr()
    assert "star.jpg" in out
    assert (tmp_path / "report.html").exists()

    source = f"{tmp_path}/shapes.safetensors"
    assert f"fc8 is drawn new: 10 other classes at {source}" in err
    config = configure({}, f"{tmp_path}/tuned/config.toml")
    assert (config.init, config.freeze) == (source, "conv1:conv5")
    before = load_weights(f"{tmp_path}/run/checkpoints/step-00000002")
    after = load_weights(f"{tmp_path}/tuned/checkpoints/step-00000002")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("conv")}
    assert after["fc8.weight"].shape == (2, 1024)
