"""Weights go out and come back exactly, in every format, and Caffe's are turned to RGB."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.network import build
from pipeline.tower import Tower
from pipeline.weights import packed, read_about, read_weights

MAKE = partial(build, "cifar")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    tower = Tower(MAKE(7), seed=1)
    return {name: p.detach().clone() for name, p in tower.weights().items()}


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_come_back(ending: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = f"{tmp_path}/w.{ending}"
    Path(file).write_bytes(packed(file, weights, {"network": "cifar", "classes": "7"}))
    network, found = read_weights(file, MAKE)
    assert network.classes == 7
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_what_is_said_of_them_comes_back(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = f"{tmp_path}/w.safetensors"
    Path(file).write_bytes(packed(file, weights, {"network": "cifar", "names": "[1, 2]"}))
    about = read_about(file)
    assert (about["network"], about["names"]) == ("cifar", [1, 2])
    Path(file).write_bytes(packed(file, weights, {"empty": "", "from": "[converted from caffe]"}))
    about = read_about(file)
    assert (about["empty"], about["from"]) == ("", "[converted from caffe]")


@pytest.mark.parametrize("names", ["{}_w {}_b", "{}.weight {}.bias", "{}/0 {}/1"])
def test_caffes_arrays_are_read_and_turned(
    names: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    weight, bias = names.split()
    arrays = {}
    for name, tensor in weights.items():
        layer, kind = name.split(".")
        array = tensor.numpy()
        if name == "conv1.weight":
            array = array[:, [2, 1, 0]]
        arrays[(weight if kind == "weight" else bias).format(layer)] = array
    np.savez(tmp_path / "w.npz", **arrays)
    _, found = read_weights(f"{tmp_path}/w.npz", MAKE)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_bvlc_alexnets_shapes_are_ours() -> None:
    network = build("alexnet-2012", 1000)
    shapes = [network.weight_shape(index) for index in range(8)]
    assert shapes == [
        (96, 3, 11, 11),
        (256, 48, 5, 5),
        (384, 256, 3, 3),
        (384, 192, 3, 3),
        (256, 192, 3, 3),
        (4096, 9216),
        (4096, 4096),
        (1000, 4096),
    ]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "w.pt",
            {"conv2.weight": (64, 32, 3, 3)},
            r"conv2.weight is \(64, 32, 3, 3\), cifar wants",
        ),
        ("w.pt", {"fc4.bias": None}, "fc4.bias is missing; there are conv1.bias"),
        ("w.pt", {"fc4.bias": ()}, r"fc4.bias is \(\): one number a class"),
        ("w.pt", {"fc4.bias": (1, 1, 1, 7)}, r"fc4.bias is \(1, 1, 1, 7\): one number a class"),
        ("w.pt", {"fc9.bias": (3,)}, "fc9.bias is none of cifar's parameters"),
        ("w.bin", {}, "a name that ends in .safetensors, .pt or .npz is wanted"),
        ("w.npz", {}, "w.npz: no such file"),
    ],
)
def test_other_weights_are_refused(
    name: str,
    change: dict[str, tuple[int, ...] | None],
    message: str,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    for key, shape in change.items():
        if shape is None:
            del weights[key]
        else:
            weights[key] = torch.zeros(shape)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(f"{tmp_path}/{name}", MAKE)


def test_weights_that_are_no_numbers_are_refused(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    weights["conv2.weight"][3] = torch.nan
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt: conv2.weight has values that are no finite"):
        read_weights(f"{tmp_path}/w.pt", MAKE)


@pytest.mark.parametrize("ending", ["safetensors", "pt", "npz"])
def test_damaged_weights_are_named(
    ending: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / f"w.{ending}"
    file.write_bytes(b"no weights at all" * 20)
    with pytest.raises(ValueError, match=f"w.{ending}: not readable as weights"):
        read_weights(str(file), MAKE)
    with pytest.raises(ValueError, match=f"w.{ending}: not readable as weights"):
        read_about(str(file))
    with pytest.raises(ValueError, match=r"none.safetensors: no such file"):
        read_about(f"{tmp_path}/none.safetensors")
