"""`towers export` and `towers import`: weights out of a run, and a run out of weights."""

from __future__ import annotations

import json
import os
from typing import Any

from datasets.shards import open_dataset
from pipeline import checkpoint
from pipeline.weights import write_weights
from workers.config import UserError, configure
from workers.data import classes_of, keep, kept_classes, known_statistics
from workers.initial import read_initial
from workers.run import RunFolder, checkpoint_url
from workers.trained import pick_step

README = """# {name}

{parameters:,} parameters of `{network}`, step {step} of {run}, by Towers. In plain PyTorch:

```python
from safetensors.torch import load_file

weights = load_file("{name}")  # or torch.load for .pt
for name, weight in weights.items():
    print(name, tuple(weight.shape))  # conv1.weight (96, 3, 11, 11), ...
```

Convolutions that don't cross the towers have two groups: `torch.nn.Conv2d(..., groups=2)`.
"""


def export(run: str, file: str, step: int | None = None) -> dict[str, Any]:
    """Writes the weights of a run's last checkpoint, or that of a step, and a README beside them.

    Raises UserError if there is no such checkpoint, or the file cannot be written.
    """
    step = pick_step(run, step)
    config = configure({}, f"{run}/config.toml")
    weights = checkpoint.load_weights(checkpoint_url(run, step))
    classes = len(weights[f"{config.build(1000).layers[-1].name}.bias"])
    about = {"network": config.network, "classes": str(classes), "step": str(step)}
    if known := kept_classes(run):
        about["names"] = json.dumps(known.names)
    try:
        write_weights(file, weights, about | {"recipe": config.to_toml()})
        parameters = sum(weight.numel() for weight in weights.values())
        values = {"name": os.path.basename(file), "parameters": parameters, "step": step}
        with open(f"{file}.md", "w") as f:
            f.write(README.format(**values, network=config.network, run=run))
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    return {"file": file, "step": step, "parameters": parameters, "classes": classes}


def import_(file: str, run: str, given: dict[str, Any]) -> dict[str, Any]:
    """Makes a run whose checkpoint of step 0 has the weights of a file, from which `towers train
    --resume` goes on.

    Raises UserError if they are not the network's or of other classes than the run's shards, or the
    run is there already; DataError if there are no such shards.
    """
    config = configure({**given, "run": run, "init": file})
    initial = read_initial(config)
    classes = initial.network.classes
    data = open_dataset(config.shards) if config.shards else None
    if data and len(data.classes) != classes:
        raise UserError(
            f"{file} tells {classes} classes apart, {config.shards} has {len(data.classes)}"
        )
    folder = RunFolder(config, resume=False)
    folder.create()
    if data:
        keep(folder.url, classes_of(data), known_statistics(config.image, data.root))
    initial.begin(folder, config)
    folder.close()
    sha = checkpoint.weights_sha256(folder.checkpoint(0))
    return {"run": config.run, "classes": classes, "weights_sha256": sha}
