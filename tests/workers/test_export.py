"""Exported files: what their README says to do with them is done, and gives what the run gives."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets.drawn import CLASSES, draw
from datasets.images import encode
from datasets.shards import write_manifest, write_split
from workers.cli import main
from workers.config import UserError, configure
from workers.data import kept_classes
from workers.trained import open_trained
from workers.weights import export, import_


def crops(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 64, 64, 3), dtype=torch.uint8, generator=draw)


def blocks(file: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", Path(f"{file}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_the_readme_loads_it_in_plain_torch_and_trains_it_on_other_classes(
    ending: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = str(trained / "run"), tmp_path / f"w.{ending}"
    assert main(["export", run, str(file)]) == 0
    monkeypatch.chdir(tmp_path)
    use, tune = blocks(file)
    made: dict[str, Any] = {}
    exec(use, made)
    net, some = made["net"], crops(5)
    pixels = some.permute(0, 3, 1, 2).float()
    with torch.no_grad():
        torch.testing.assert_close(net(pixels), open_trained(run).classifier().logits(some))
    exec(tune, made)
    nn.functional.cross_entropy(net(pixels), torch.tensor([0, 5, 10, 15, 19])).backward()
    learned = {name for name, p in net.named_parameters() if p.grad is not None}
    assert learned == {f"fc{n}.{kind}" for n in (6, 7, 8) for kind in ("weight", "bias")}


def test_onnx_takes_any_number_of_images_and_knows_the_classes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = str(trained / "run"), tmp_path / "w.onnx"
    assert main(["export", run, str(file), "--step", "3"]) == 0
    monkeypatch.chdir(tmp_path)
    (use,) = blocks(file)
    classifier = open_trained(run, 3).classifier()
    for n in (1, 7):
        made: dict[str, Any] = {"pixels": np.float32(crops(n).permute(0, 3, 1, 2))}
        exec(use, made)
        np.testing.assert_allclose(made["logits"], classifier.logits(crops(n)), rtol=0, atol=1e-4)
        assert json.loads(made["names"]) == list(CLASSES)


def test_an_exported_network_comes_back_as_it_was(
    trained: Path, shards: str, tmp_path: Path
) -> None:
    """With its recipe and its classes; whoever names another network means that."""
    export(str(trained / "run"), f"{tmp_path}/w.pt")
    odd = {"network": "alexnet-mini", "activation": "tanh", "image": 80, "rate": 0.005}
    import_(f"{tmp_path}/w.pt", f"{tmp_path}/odd", {**odd, "shards": shards})
    file = f"{tmp_path}/odd.safetensors"
    export(f"{tmp_path}/odd", file)
    assert main(["import", file, f"{tmp_path}/again"]) == 0
    found = configure({}, f"{tmp_path}/again/config.toml")
    assert {name: getattr(found, name) for name in odd} == odd
    classes = kept_classes(f"{tmp_path}/again")
    assert classes
    assert classes.names == CLASSES
    assert main(["import", file, f"{tmp_path}/relu", "--activation", "relu"]) == 0
    assert configure({}, f"{tmp_path}/relu/config.toml").image == 80
    with pytest.raises(UserError, match=r"fc4.bias is missing"):
        import_(file, f"{tmp_path}/other", {"network": "cifar"})

    folder, names = f"{tmp_path}/turned", CLASSES[::-1]
    records = [(encode(draw(0, "train", n)[0]), f"{n}", n) for n in range(10)]
    write_manifest(folder, {"train": write_split(folder, "train", records, names)}, names)
    with pytest.raises(UserError, match=rf"class 0 is '{CLASSES[0]}' in .* and '{names[0]}' in"):
        import_(file, f"{tmp_path}/wrong", {"shards": folder})


def test_what_cannot_be_exported_is_told_and_leaves_no_file(
    trained: Path,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export(str(trained / "run"), f"{tmp_path}/w.pt")
    bad = torch.load(f"{tmp_path}/w.pt")
    bad["fc8.weight"].fill_(3e38)
    torch.save(bad, tmp_path / "bad.pt")
    given = {"network": "alexnet-mini"}
    import_(f"{tmp_path}/bad.pt", f"{tmp_path}/bad", {**given, "shards": shards})
    import_(f"{tmp_path}/w.pt", f"{tmp_path}/good", {**given, "shards": shards})
    import_(f"{tmp_path}/w.pt", f"{tmp_path}/bare", given)
    capsys.readouterr()

    def said(code: int, run: str, file: str) -> str:
        assert main(["export", f"{tmp_path}/{run}", f"{tmp_path}/{file}"]) == code
        assert not list(tmp_path.glob(f"{file}*"))
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "bad step 0: what the network makes of images are no numbers" in said(2, "bad", "a.onnx")
    with monkeypatch.context() as strict:
        strict.setattr("workers.weights.CLOSE", -1.0)
        assert "off the network's logits: nothing is written" in said(1, "good", "a.onnx")
    assert "does not know the mean of its training images" in said(2, "bare", "a.onnx")
    assert "a name that ends in .safetensors, .pt or .onnx is wanted" in said(2, "bare", "a.bin")
    assert "is no run" in said(2, "nothing", "a.onnx")
    assert "cannot be written" in said(2, "bad", "none/a.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "a.onnx needs onnxscript: pip install onnxscript" in said(2, "bad", "a.onnx")

    # Without a mean the README says so, and its code runs.
    file = tmp_path / "bare.safetensors"
    export(f"{tmp_path}/bare", str(file))
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(blocks(file)[0], made)
    assert made["net"](torch.zeros(1, 3, 64, 64)).shape == (1, 10)
