"""Weights that a run starts from: read from a file, a run or a checkpoint, kept as its step 0."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from datasets.storage import opened, storage
from pipeline import checkpoint
from pipeline.network import Network
from pipeline.optimizer import SGD
from pipeline.recipes import Recipe
from pipeline.tower import Tower
from pipeline.weights import fitting, read_about, read_weights
from workers.config import Config, UserError, parsed
from workers.data import Classes, kept_classes
from workers.errors import RunFailed
from workers.run import COMPLETE, CONFIG, RunFolder, checkpoint_url
from workers.trained import pick_step


@dataclass(frozen=True)
class Initial:
    """The weights of `network` at `source`, by whole-network names; `classes` are those that it
    tells apart, None if nothing names them.
    """

    source: str
    network: Network
    weights: dict[str, Tensor]
    classes: Classes | None

    def begin(self, folder: RunFolder, config: Config, classes: Classes | None = None) -> str:
        """Writes the checkpoint of step 0 of a run that tells `classes` apart, its own if None.

        The last layer is drawn new if they are others. Returns a line that says so, else "".
        """
        new = classes is not None and self.differ(classes)
        count = len(classes.names) if classes else self.network.classes
        tower = Tower(config.build(count), seed=config.seed)
        last = self.network.layers[-1].name
        state = tower.state_dict()
        for name, weight in self.weights.items():
            if not (new and name.startswith(f"{last}.")):
                state[f"blocks.{name}"] = weight
        tower.load_state_dict(state)
        optimizer = SGD(tower.weights(), rate=config.rate, momentum=config.momentum)
        progress = {"step": 0, "evaluations": []}
        try:
            checkpoint.save(folder.checkpoint(0), tower, optimizer, progress, None)
        except checkpoint.NotSaved as error:
            raise RunFailed(str(error)) from None
        folder.event("init", source=self.source, drawn=[last] if new else [])
        had = self.network.classes
        return f"{last} is drawn new: {had} other classes at {self.source}" if new else ""

    def differ(self, classes: Classes) -> bool:
        """Whether other classes are told apart: by their names where both have some."""
        ours = self.classes
        if ours is None or ours.numbered or classes.numbered:
            return len(classes.names) != self.network.classes
        return classes.names != ours.names


def read_initial(config: Config) -> Initial:
    """The weights at `config.init`, a path or URL: a file (`read_weights`), a run's last
    checkpoint, or a checkpoint.

    Raises UserError if they are not those of the configured network, its classes left aside.
    """
    source = config.init
    fs, path = storage(source)
    if not fs.isdir(path):
        return _of_file(source, config)
    if fs.exists(f"{path}/{CONFIG}"):
        run, found = source, checkpoint_url(source, pick_step(source, None))
    elif fs.exists(f"{path}/{COMPLETE}"):
        run, found = source.rstrip("/").rpartition("/checkpoints/")[0], source
    else:
        raise UserError(f"{source}: no run and no checkpoint in this folder")
    try:
        network, weights = fitting(source, checkpoint.load_weights(found), config.build)
    except ValueError as error:
        raise UserError(str(error)) from None
    return Initial(source, network, weights, kept_classes(run) if run else None)


def recipe_of(source: str) -> dict[str, Any]:
    """The recipe that a `.safetensors` file by `towers export` says its weights are of, {} if it is
    no such file.
    """
    if not source.endswith(".safetensors"):
        return {}
    with _here(source) as file:
        text = read_about(file).get("recipe")
    if not isinstance(text, str):
        return {}
    said = parsed(text, f"the recipe in {source}")
    return {field.name: said[field.name] for field in fields(Recipe) if field.name in said}


def _of_file(source: str, config: Config) -> Initial:
    with _here(source) as file:
        network, weights = read_weights(file, config.build)
        about = read_about(file) if file.endswith(".safetensors") else {}
    names = about.get("names")
    return Initial(source, network, weights, Classes(tuple(names), {}) if names else None)


@contextmanager
def _here(source: str) -> Iterator[str]:
    """A file of weights on this machine; within it what is wrong with them is UserError's."""
    with tempfile.TemporaryDirectory() as folder:
        file = source
        if "://" in source:
            file = f"{folder}/{os.path.basename(source)}"
            with opened(source) as there, open(file, "wb") as here:
                here.write(there.read())
        try:
            yield file
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error).replace(file, source)) from None
