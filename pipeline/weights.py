"""The whole network's weights in files that others read and write."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.network import Network
from pipeline.plain import MEAN

CAFFE = re.compile(r"(?P<layer>\w+?)(?:[._/](?P<kind>weights?|bias(?:es)?|w|b|0|1))")
"""Names as people give them who take weights out of Caffe: conv1.weight, conv1_w, conv1/0."""


def packed(file: str, weights: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """What a file of this name holds for weights by whole-network names: `.safetensors`, with
    `about` beside them, or `.pt`.

    Raises ValueError for another ending.
    """
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    if file.endswith(".safetensors"):
        from safetensors.torch import save

        return save(weights, metadata={"format": "pt", **about})
    if file.endswith(".pt"):
        buffer = io.BytesIO()
        torch.save({**weights}, buffer)
        return buffer.getvalue()
    raise ValueError(f"{file}: a name that ends in .safetensors, .pt or .onnx is wanted")


def read_weights(file: str, build: Callable[[int], Network]) -> tuple[Network, dict[str, Tensor]]:
    """The network that `build` makes for as many classes as a file has, and its weights there.

    The file is `.safetensors` or `.pt` with whole-network names, or an `.npz` of arrays in Caffe's
    layout.

    Caffe's arrays (those of bvlc_alexnet: maps x maps read x kernel, in two groups) have the shapes
    of ours, but read blue first: conv1's channels are turned. Raises ValueError as `fitting` does,
    and for a file that is not readable.
    """
    return fitting(file, {k: v for k, v in _read(file).items() if k != MEAN}, build)


def fitting(
    file: str, found: dict[str, Tensor], build: Callable[[int], Network]
) -> tuple[Network, dict[str, Tensor]]:
    """The network that `build` makes for as many classes as the weights `found` in a file tell
    apart, and them.

    Raises ValueError, naming file and parameter with both shapes, if they are not the network's or
    not finite.
    """
    network = shaped(file, found, build)
    for name, weight in found.items():
        if not weight.isfinite().all():
            raise ValueError(f"{file}: {name} has values that are no finite numbers")
    names = [f"{layer.name}.{kind}" for layer in network.layers for kind in ("weight", "bias")]
    return network, {name: found[name].float() for name in names}


def shaped(file: str, found: Mapping[str, Tensor], build: Callable[[int], Network]) -> Network:
    """The network that `build` makes for as many classes as the weights `found` in a file tell
    apart.

    Raises ValueError, naming file and parameter with both shapes, if they are not the network's.
    """
    last = f"{build(1000).layers[-1].name}.bias"
    if last not in found:
        raise ValueError(f"{file}: {last} is missing; there are {', '.join(sorted(found)[:20])}")
    if found[last].dim() != 1:
        raise ValueError(f"{file}: {last} is {tuple(found[last].shape)}: one number a class")
    network = build(len(found[last]))
    for index, layer in enumerate(network.layers):
        for name, want in (
            (f"{layer.name}.weight", network.weight_shape(index)),
            (f"{layer.name}.bias", (layer.maps,)),
        ):
            have = tuple(found[name].shape) if name in found else None
            if have != want:
                raise ValueError(f"{file}: {name} is {have}, {network.name} wants {want}")
    names = {f"{layer.name}.{kind}" for layer in network.layers for kind in ("weight", "bias")}
    if extra := sorted(set(found) - names):
        raise ValueError(f"{file}: {extra[0]} is none of {network.name}'s parameters")
    return network


def read_about(file: str) -> dict[str, Any]:
    """What was written beside the weights of a `.safetensors` file: network, classes and so on.

    Raises ValueError for a file that is not readable.
    """
    from safetensors import safe_open

    with _named(file), safe_open(file, "pt") as opened:
        about: dict[str, Any] = dict(opened.metadata() or {})
    return {name: _value(text) for name, text in about.items()}


def _value(text: str) -> Any:
    """What is JSON for more than one value, or else the text: others write there what they like."""
    try:
        return json.loads(text) if text[:1] in ("[", "{") else text
    except ValueError:
        return text


@contextmanager
def _named(file: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except Exception as error:  # a damaged file raises whatever its library stumbled on
        said = " ".join(str(error).split())[:150]
        raise ValueError(f"{file}: not readable as weights ({said})") from error


def _read(file: str) -> dict[str, Tensor]:
    with _named(file):
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file)
        if file.endswith(".pt"):
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
                raise ValueError("it holds no dictionary of tensors")
            for name, weight in state.items():
                if weight.is_meta or weight.layout != torch.strided or weight.is_complex():
                    raise ValueError(f"{name} is no plain tensor of real numbers")
            return {name: weight.float() for name, weight in state.items()}
        if file.endswith(".npz"):
            with np.load(file, allow_pickle=False) as arrays:
                return _caffe({name: arrays[name] for name in arrays.files})
    raise ValueError(f"{file}: a name that ends in .safetensors, .pt or .npz is wanted")


def _caffe(arrays: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, array in arrays.items():
        match = CAFFE.fullmatch(key)
        if not match:
            raise ValueError(f"{key} is no name of a layer's weight or bias")
        kind = "weight" if match["kind"] in ("weight", "weights", "w", "0") else "bias"
        if match["layer"] == "conv1" and kind == "weight":
            array = array[:, ::-1]
        found[f"{match['layer']}.{kind}"] = torch.from_numpy(np.ascontiguousarray(array))
    return found
