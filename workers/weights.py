"""`towers export` and `towers import`: weights out of a run, and a run out of weights."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from datasets.shards import open_dataset
from pipeline import checkpoint
from pipeline.network import Network
from pipeline.plain import MEAN, code, module, run_onnx, to_onnx
from pipeline.weights import packed
from workers.config import UserError, configure
from workers.data import classes_of, keep, known_statistics
from workers.errors import RunFailed
from workers.initial import read_initial, recipe_of
from workers.output import check_output, write_output
from workers.progress import Progress
from workers.run import RunFolder
from workers.trained import Step, Trained, open_trained

README = """# {name}

{parameters:,} parameters of `{network}`, step {step} of {run}, by Towers; {classes} classes.
An image's shorter side is scaled to {image} pixels; of its centre it sees {crop} x {crop}.
{use}{names}"""

TORCH = """
In plain PyTorch:

```python
{code}
{load}
net.eval()  # net(pixels).softmax(1) are the probabilities
```

To train it on 20 classes of your own, all but the convolutions:

```python
net.{last} = nn.Linear(net.{last}.in_features, 20)
for name, parameter in net.named_parameters():
    parameter.requires_grad = not name.startswith("conv")
net.train()
```
"""

ONNX = """
With NumPy and onnxruntime, where `pixels` are float32 [n, 3, {crop}, {crop}], RGB from 0 to 255:

```python
import onnxruntime

session = onnxruntime.InferenceSession("{name}")
(logits,) = session.run(["logits"], {{"pixels": pixels}})
names = session.get_modelmeta().custom_metadata_map["names"]  # of the classes, as JSON
```
"""

NAMELESS = "del net.pixels  # no mean is known; it takes (pixels - mean) * {scale}\n"

NEEDED = ("onnx", "onnxscript", "onnxruntime")
CLOSE = 1e-4  # of the greatest logit: how near onnxruntime has to come to the network itself


def export(run: str, file: str, step: Step = None) -> dict[str, Any]:
    """Writes the network of a run's last checkpoint, or of another one, and a README beside it.

    Its weights and the mean that it takes off pixels as `.safetensors` or `.pt`; all of it as
    `.onnx`, which is run and compared first. Raises UserError if there is no such checkpoint, the
    file cannot be written, or ONNX's packages are not there.
    """
    if file.endswith(".onnx"):
        _check_packages(file)
    trained = open_trained(run, step)
    network, config = trained.network, trained.config
    weights = trained.tensors
    about = {
        "network": config.network,
        "classes": str(network.classes),
        "step": str(trained.step),
        "recipe": config.to_toml(),
    }
    if trained.classes:
        about["names"] = json.dumps(trained.classes.names)
    check_output(file)
    if file.endswith(".onnx"):
        data, use = _onnx(trained, about), ONNX
    else:
        mean = _mean(trained)
        try:
            data = packed(file, weights | mean, about)
        except ValueError as error:
            raise UserError(str(error)) from None
        use = _in_torch(network, config.scale, file, known=bool(mean))
    write_output(file, data)
    parameters = sum(weight.numel() for weight in weights.values())
    said = {"name": os.path.basename(file), "crop": network.crop, "run": run}
    result = {"step": trained.step, "parameters": parameters, "classes": network.classes}
    said |= {**result, "network": config.network, "image": config.image}
    names = trained.classes.names if trained.classes else ()
    listed = f"\nIts outputs are, in order: {', '.join(names)}.\n" if names else ""
    text = README.format(**said, use=use.format(**said) if use is ONNX else use, names=listed)
    write_output(f"{file}.md", text.encode())
    return {"file": file, **result}


def _check_packages(file: str) -> None:
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise UserError(f"{file} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _mean(trained: Trained) -> dict[str, Tensor]:
    """What is taken off pixels by its name in a file, {} if the run does not know it."""
    if not trained.statistics:
        return {}
    mean = torch.from_numpy(trained.statistics.centre(trained.network.crop))
    return {MEAN: mean.permute(2, 0, 1)}


def _in_torch(network: Network, scale: float, file: str, *, known: bool) -> str:
    name = os.path.basename(file)
    load = "" if known else NAMELESS.format(scale=scale)
    if file.endswith(".pt"):
        load += f'net.load_state_dict(torch.load("{name}"))'
    else:
        load += "from safetensors.torch import load_file\n\n"
        load += f'net.load_state_dict(load_file("{name}"))'
    last = network.layers[-1].name
    return TORCH.format(code=code(network, scale), load=load, last=last)


def _onnx(trained: Trained, about: dict[str, str]) -> bytes:
    """The ONNX file, once onnxruntime computes with it what the network does."""
    if not trained.statistics:
        raise UserError(
            f"{trained.run} does not know the mean of its training images; "
            "`towers evaluate RUN --data SHARDS` finds and keeps it"
        )
    classifier = trained.classifier(precision="float32")
    net = module(trained.network, trained.tensors | _mean(trained), trained.config.scale)
    file = to_onnx(net, trained.network.crop, about)
    side = trained.network.crop
    draw = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8, generator=draw)
    want = classifier.logits(crops)
    got = run_onnx(file, crops.permute(0, 3, 1, 2).float().contiguous())
    off = ((got - want).abs().max() / want.abs().max().clamp_min(1)).item()
    if not off <= CLOSE:
        raise RunFailed(f"onnxruntime is {off:.1e} off the network's logits: nothing is written")
    return file


def import_(file: str, run: str, given: dict[str, Any]) -> dict[str, Any]:
    """Makes a run whose checkpoint of step 0 has the weights of a file, from which `towers train
    --resume` goes on. The recipe is the one in the file, if it has one of this network, which is
    `alexnet` if neither says another.

    Raises UserError if they are not the network's or of other classes than the run's shards, or the
    run is there already; DataError if there are no such shards.
    """
    recipe = recipe_of(file)
    if given.get("network", recipe.get("network")) != recipe.get("network"):
        recipe = {}
    config = configure({"network": "alexnet", **recipe, **given, "run": run, "init": file})
    initial = read_initial(config)
    count = initial.network.classes
    data = open_dataset(config.shards) if config.shards else None
    if data and len(data.classes) != count:
        raise UserError(
            f"{file} tells {count} classes apart, {config.shards} has {len(data.classes)}"
        )
    if data and initial.differ(classes_of(data)):
        assert initial.classes
        pairs = enumerate(zip(initial.classes.names, data.classes, strict=True))
        number, (one, other) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        raise UserError(
            f"class {number} is {one!r} in {file} and {other!r} in {config.shards}: "
            "`towers train --init` draws a new last layer for other classes"
        )
    classes = classes_of(data) if data else initial.classes
    folder = RunFolder(config, resume=False)
    with folder.held(Progress().say):
        folder.create()
        if classes:
            keep(folder.url, classes, known_statistics(config.image, data.root) if data else None)
        initial.begin(folder, config)
    sha = checkpoint.weights_sha256(folder.checkpoint(0))
    return {"run": config.run, "classes": count, "weights_sha256": sha}
