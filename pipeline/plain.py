"""A network in plain torch modules, as code that others run, and as ONNX made by running it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.network import Layer, Network, Norm

MEAN = "pixels.mean"
"""Name of the mean that is taken off pixels, float32 [3, crop, crop], beside exported weights."""

WITHIN = """

class Norm(nn.LocalResponseNorm):  # each tower's maps by themselves
    def forward(self, x):
        parts = super().forward(x.unflatten(1, ({columns}, -1)).flatten(0, 1))
        return parts.unflatten(0, (-1, {columns})).flatten(1, 2)
"""

AROUND = """

class Around(nn.AvgPool2d):  # normalisation over positions of a map
    def __init__(self, size, alpha, beta, k):
        super().__init__(size, 1, size // 2)
        self.alpha, self.beta, self.k = alpha * size**2, beta, k

    def forward(self, x):
        return x * (self.k + self.alpha * super().forward(x * x)) ** -self.beta
"""

APART = """

class Apart(nn.Linear):  # each tower's outputs read that tower's inputs
    def forward(self, x):
        weights, biases = self.weight.chunk({columns}), self.bias.chunk({columns})
        parts = zip(x.chunk({columns}, 1), weights, biases)
        return torch.cat([nn.functional.linear(*own) for own in parts], 1)
"""

PIXELS = """

class Pixels(nn.Module):  # takes float32 [n, 3, {crop}, {crop}], RGB from 0 to 255
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.empty(3, {crop}, {crop}))

    def forward(self, x):
        return (x - self.mean) * {scale}
"""


def code(network: Network, scale: float) -> str:
    """Python that makes `net`, an `nn.Sequential` that needs nothing but torch.

    Its parameters have whole-network names, and beside them is `MEAN`, so that it takes pixels as
    they are, which it multiplies by `scale` less that mean.
    """
    norms = [norm for layer in network.layers for norm in layer.norms]
    parts = ["from collections import OrderedDict\n\nimport torch\nfrom torch import nn\n"]
    if any(not norm.spatial for norm in norms) and network.columns > 1:
        parts.append(WITHIN.format(columns=network.columns))
    if any(norm.spatial for norm in norms):
        parts.append(AROUND)
    if any(_groups(network, i) > 1 and at.kind == "full" for i, at in enumerate(network.layers)):
        parts.append(APART.format(columns=network.columns))
    parts.append(PIXELS.format(crop=network.crop, scale=scale))
    parts.append("\n\nnet = nn.Sequential(OrderedDict(\n    pixels=Pixels(),\n")
    flat = False
    for index, layer in enumerate(network.layers):
        if layer.kind == "full" and not flat:
            flat = True
            parts.append("    flat=nn.Flatten(),\n")
        made = [f"{layer.name}={_product(network, index)}", *_steps(layer, network.columns)]
        before, after = layer.padding
        if before != after:
            made.insert(0, f"{layer.name}_pad=nn.ZeroPad2d(({before}, {after}, {before}, {after}))")
        parts += [f"    {one},\n" for one in made]
    return "".join(parts) + "))\n"


def module(network: Network, state: Mapping[str, Tensor], scale: float) -> nn.Module:
    """What `code` makes, with whole-network weights and `MEAN` as its state."""
    made: dict[str, Any] = {}
    with torch.device("meta"):  # shapes alone: the initial weights would be thrown away
        exec(code(network, scale), made)  # the very code that is handed out
    net: nn.Module = made["net"]
    net.load_state_dict(dict(state), assign=True)
    return net.eval()


def to_onnx(net: nn.Module, crop: int, about: Mapping[str, str]) -> bytes:
    """An ONNX file of a module, from `pixels` float32 [n, 3, crop, crop] to `logits` [n, classes],
    for any n; `about` as its metadata. Needs the packages onnx and onnxscript.
    """
    for name in ("torch.onnx", "onnxscript"):  # what they lack for other networks
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net,
            (torch.zeros(2, 3, crop, crop),),
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            verbose=False,
        )
    assert program
    proto = program.model_proto
    for name, value in about.items():
        proto.metadata_props.add(key=name, value=value)
    return proto.SerializeToString()


def run_onnx(file: bytes, pixels: Tensor) -> Tensor:
    """The logits of an ONNX file, float32 [n, classes], of `pixels` float32 [n, 3, crop, crop] from
    0 to 255, by onnxruntime on the CPU.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixels": pixels.numpy()})
    return torch.from_numpy(logits)


def _groups(network: Network, index: int) -> int:
    """In how many a layer's outputs read their inputs."""
    return 1 if network.reads_all(index) else network.columns


def _product(network: Network, index: int) -> str:
    layer, inputs = network.layers[index], network.inputs(index)
    groups = _groups(network, index)
    if layer.kind == "full":
        kind = "Apart" if groups > 1 else "nn.Linear"
        return f"{kind}({inputs.units // groups}, {layer.maps})"
    before, after = layer.padding
    grouped = f", groups={groups}" if groups > 1 else ""
    sizes = f"{inputs.maps}, {layer.maps}, {layer.kernel}, {layer.stride}"
    if before == after:
        return f"nn.Conv2d({sizes}, {before}{grouped})"
    return f"nn.Conv2d({sizes}{grouped})"


def _steps(layer: Layer, columns: int) -> Sequence[str]:
    """What follows a layer's product, as name=module."""
    made = []
    for step in layer.order:
        if step == "activation" and layer.activation:
            kind = "ReLU" if layer.activation == "relu" else "Tanh"
            made.append(f"{layer.name}_{layer.activation}=nn.{kind}()")
        elif step == "norm":
            made += [
                f"{layer.name}_norm{n or ''}={_norm(norm, columns)}"
                for n, norm in enumerate(layer.norms)
            ]
        elif step == "pool" and layer.pool:
            made.append(f"{layer.name}_pool=nn.MaxPool2d({layer.pool.size}, {layer.pool.stride})")
    if layer.dropout:
        made.append(f"{layer.name}_drop=nn.Dropout({layer.dropout})")
    return made


def _norm(norm: Norm, columns: int) -> str:
    if norm.spatial:
        return f"Around({norm.size}, {norm.alpha}, {norm.beta}, {norm.k})"
    kind = "Norm" if columns > 1 else "nn.LocalResponseNorm"
    # torch divides alpha by the window, the paper's formula does not.
    return f"{kind}({norm.size}, {norm.alpha * norm.size:.6g}, {norm.beta}, {norm.k})"
