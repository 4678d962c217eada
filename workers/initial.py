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
from pipeline.network import Network, build
from pipeline.optimizer import SGD
from pipeline.recipes import Recipe
from pipeline.tower import Tower
from pipeline.weights import fitting, read_about, read_weights
from workers.config import Config, UserError, parsed, provenance, read
from workers.data import Classes, kept_classes
from workers.errors import RunFailed
from workers.run import COMPLETE, CONFIG, RunFolder, checkpoint_url, is_run
from workers.trained import pick_step

SHAPELESS = (
    *("activation", "lrn", "lrn_size", "lrn_k", "lrn_alpha", "lrn_beta", "pooling", "crossings"),
    *("image", "crop", "scale"),
)
"""Settings that weights depend on and no shape of theirs tells."""


@dataclass(frozen=True)
class Initial:
    """The weights of `network` at `source`, by whole-network names; `classes` are those that it
    tells apart, None if nothing names them; `recipe` is what they were trained by, {} if unknown.
    """

    source: str
    network: Network
    weights: dict[str, Tensor]
    classes: Classes | None
    recipe: dict[str, Any]

    def otherwise(self, config: Config) -> str:
        """A line that says what of the recipe, though no weight's shape tells, `config` has
        otherwise; "" if nothing.
        """
        table = build(config.network, 2).crop
        was, here = (
            {**said, "crop": said.get("crop") or table} for said in (self.recipe, vars(config))
        )
        names = [name for name in SHAPELESS if self.recipe and was.get(name) != here[name]]
        if not names:
            return ""
        old, new = (", ".join(f"{name} {said.get(name)}" for name in names) for said in (was, here))
        return f"the weights at {self.source} come from {old}; here {new}"

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
        progress = {"step": 0, "evaluations": [], **provenance(config)}
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
    recipe: dict[str, Any] = {}
    try:
        if run and is_run(run):
            recipe = _settings(read(f"{run}/{CONFIG}"))
        else:  # a checkpoint that somebody has copied
            recipe = _recipe(found, checkpoint.read_progress(found))
        network, weights = fitting(source, checkpoint.load_weights(found), config.build)
    except ValueError as error:
        raise UserError(f"{error}{_hint(recipe, config)}") from None
    return Initial(source, network, weights, kept_classes(run) if run else None, recipe)


def recipe_of(source: str) -> dict[str, Any]:
    """The recipe that a `.safetensors` file by `towers export` says its weights are of, {} if it is
    no such file.
    """
    if not source.endswith(".safetensors"):
        return {}
    with _here(source) as file:
        return _recipe(source, _about(file))


def _of_file(source: str, config: Config) -> Initial:
    with _here(source) as file:
        about = _about(file)
        recipe = _recipe(source, about)
        try:
            network, weights = read_weights(file, config.build)
        except ValueError as error:
            raise ValueError(f"{error}{_hint(recipe, config)}") from None
    names = about.get("names")
    if not isinstance(names, list) or list(map(type, names)) != [str] * network.classes:
        names = None  # of somebody's own
    classes = Classes(tuple(names), {}) if names else None
    return Initial(source, network, weights, classes, recipe)


def _about(file: str) -> dict[str, Any]:
    return read_about(file) if file.endswith(".safetensors") else {}


def _recipe(source: str, about: dict[str, Any]) -> dict[str, Any]:
    text = about.get("recipe")
    return _settings(parsed(text, f"the recipe in {source}")) if isinstance(text, str) else {}


def _settings(said: dict[str, Any]) -> dict[str, Any]:
    return {field.name: said[field.name] for field in fields(Recipe) if field.name in said}


def _hint(recipe: dict[str, Any], config: Config) -> str:
    """What to add to an error about shapes."""
    known, crop = recipe.get("network", config.network), recipe.get("crop")
    if known != config.network:
        return f": they are of --network {known}"
    return f": they are of --crop {crop}" if crop and crop != config.crop else ""


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
