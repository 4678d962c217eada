"""A run's configuration: the recipe and all that says where, on what and how it runs."""

from __future__ import annotations

import json
import os
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import fsspec

from pipeline.mesh import Mesh
from pipeline.recipes import RECIPES, Recipe, setting
from pipeline.stages import cut

NOWHERE = "memory://"  # the run of what makes none


class UserError(ValueError):
    """A mistake that the user can mend; its one line says what, where and how. Exit code 2."""


@dataclass(frozen=True)
class Config(Recipe):
    """A complete, re-runnable configuration.

    Raises ValueError, naming field, value and what is allowed, for a value that cannot be.
    """

    shards: str = setting(
        "", "Folder or URL of Parquet shards; if unset the drawn data set, and alexnet-mini on it."
    )
    images: int | None = setting(
        None, "Training images that are used, rounded up to whole row groups; all if unset."
    )
    run: str = setting("", "Folder or URL of the run.")
    init: str = setting("", "Weights to start from: a file, a run, or a checkpoint of one.")
    steps: int | None = setting(None, "Training steps after which the run ends, if before EPOCHS.")
    seed: int = setting(0, "Of weights, dropout, order and augmentation.")
    towers: int | None = setting(
        None, "Processes that share a network; 2 unless there is one GPU.", (None, 1, 2)
    )
    replicas: int = setting(1, "Data-parallel copies of the towers.")
    stages: int = setting(1, "Pipeline stages that the layers are cut into.")
    cuts: str = setting("", "First layers of the stages after the first, such as conv3,fc6.")
    microbatches: int = setting(1, "Parts that a replica's batch is gone through in.")
    pipeline: str = setting("1f1b", "Order of micro-batches in the stages.", ("1f1b", "gpipe"))
    device: str = setting("auto", "GPUs where the cluster has them.", ("auto", "cpu", "cuda"))
    augmenters: str = setting("1:8", "Fewest and most actors of the augmentation fleet, MIN:MAX.")
    cache: float = setting(2.0, "GB of images that each node keeps on disk; 0 for none.")
    on_error: str = setting("fail", "What becomes of an image that is bad.", ("fail", "skip"))
    checkpoint_every: int | None = setting(None, "Steps between checkpoints inside an epoch.")
    timeout: float = setting(300.0, "Seconds that a rank waits for another before the run ends.")
    log_every: int | None = setting(None, "Steps between reports; one a second if unset.")
    profile: bool = setting(False, "Write a trace of a few steps, and a picture of one.")
    keep: int = setting(3, "Checkpoints that are kept.")
    restarts: int = setting(
        3, "Times in a row that a run goes on after a process was lost before its next checkpoint."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("images", "steps", "checkpoint_every", "log_every"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        self._at_least("keep", 1)
        self._at_least("timeout", 1)
        if self.timeout > 30 * 86400:
            raise ValueError(f"timeout is {self.timeout}: 30 days at most")
        self._at_least("restarts", 0)
        self._at_least("cache", 0)
        self._at_least("seed", 0)
        _ = self.fleet
        mesh = Mesh(self.replicas, self.stages, self.towers or 2)
        mesh.check_batch(self.batch, self.microbatches)
        _ = self.parts
        if self.towers == 2 and self.columns == 1:
            raise ValueError("towers is 2: a network of 1 column is held by 1 process")

    @property
    def parts(self) -> tuple[range, ...]:
        """The layers of each stage."""
        return cut(self.build(1000), self.stages, [name for name in self.cuts.split(",") if name])

    @property
    def fleet(self) -> tuple[int, int]:
        """Fewest and most augmenters."""
        low, _, high = self.augmenters.partition(":")
        if not (low.isdecimal() and (high or low).isdecimal()):
            raise ValueError(f"augmenters is {self.augmenters!r}: MIN:MAX, such as 1:8")
        sizes = int(low), int(high or low)
        if not 1 <= sizes[0] <= sizes[1] <= 100_000:
            raise ValueError(f"augmenters is {self.augmenters!r}: 1 <= MIN <= MAX <= 100000")
        return sizes

    def to_toml(self) -> str:
        """The whole configuration; JSON's strings, numbers and lists are TOML's too."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        # TOML has no pairs of surrogates, which JSON writes for what is beyond 16 bits.
        given = {k: json.dumps(v, ensure_ascii=False) for k, v in values.items() if v is not None}
        lines = [f"{k} = {v}" for k, v in given.items()]
        return "\n".join(lines) + "\n"


VOID = (
    ("schedule", "plateau", frozenset({"drops"})),
    ("lrn", False, frozenset({"lrn_size", "lrn_k", "lrn_alpha", "lrn_beta"})),
)
"""Settings, and what has no effect beside a value of theirs: a recipe's is left out there, and a
file's if the setting is given by name.
"""


WRITTEN = {f.name for f in fields(Recipe) if f.default not in (None, ())}
"""Settings that the file of every run has."""


def configure(given: dict[str, Any], file: str | None = None, *, goes_on: bool = False) -> Config:
    """The recipe of the network, under what a TOML file says, under what is `given` by name. Of the
    file of a run the recipe is what was then.

    Other `epochs` than the recipe's or the file's bring the schedule's `drops` with them, unless
    the file is that of a run that goes on. Raises UserError for an unknown field, a value of
    another type, or one that cannot be.
    """
    said = read(file) if file else {}
    if said.get("schedule") == "plateau":
        said.pop("drops", None)  # it has none
    chosen = {**said, **given}
    default = "alexnet" if chosen.get("shards") else "alexnet-mini"
    name = chosen.setdefault("network", default)
    if name not in RECIPES:
        raise UserError(f"network is {name!r}: one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    if chosen.keys() >= WRITTEN:  # what such a file lacks was unset, whatever the recipe sets now
        recipe = {name: value for name, value in recipe.items() if name in {*WRITTEN, "drops"}}
    for option, value, without in VOID:
        below = (recipe, chosen) if option in given else (recipe,)
        for under, field in product(below, without.difference(given)):
            if chosen.get(option) == value:
                under.pop(field, None)
    steps = chosen.get("schedule") != "plateau"
    if steps and "drops" not in given and not (goes_on and "drops" in said):
        shape = said if "drops" in said else recipe
        before = shape.get("epochs")
        if before and "drops" in shape and chosen.get("epochs", before) != before:
            ratio = chosen["epochs"] / before
            chosen["drops"] = tuple(round(drop * ratio, 2) for drop in shape["drops"])
    if chosen.get("cuts") and "stages" not in (given if given.get("cuts") else chosen):
        chosen["stages"] = chosen["cuts"].count(",") + 2
    if "microbatches" not in given and said.get("stages") not in (None, chosen.get("stages")):
        chosen.pop("microbatches", None)  # of other stages
    if chosen.get("stages", 1) > 1 and "microbatches" not in chosen:
        # Twice as many as stages keep most of them busy, if the batch divides.
        batch = chosen.get("batch", recipe.get("batch", Config.batch))
        each = batch // max(1, chosen.get("replicas", 1))
        fitting = (m for m in range(min(2 * chosen["stages"], each), 0, -1) if each % m == 0)
        chosen["microbatches"] = next(fitting, 1)
    chosen["run"] = locate(chosen.get("run") or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    for name in ("shards", "init"):
        if chosen.get(name):
            chosen[name] = locate(chosen[name])
    try:
        return Config(**{**recipe, **chosen})
    except ValueError as error:
        where = f"{file}: " if file and set(given) <= {"run"} else ""
        raise UserError(f"{where}{error}") from None


def provenance(config: Config) -> dict[str, Any]:
    """What a checkpoint says of where it comes from: the `recipe`, as TOML, and the `versions` of
    the libraries that trained it, those that are installed.
    """
    versions = {}
    for name in ("towers", "torch", "ray"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"recipe": config.to_toml(), "versions": versions}


def locate(place: str) -> str:
    """A URL as it is, a path made absolute: processes elsewhere have other working directories.

    Raises UserError for a relative path in a job, where the working directory is a copy that goes.
    """
    if "://" in place:
        return bare(place)
    if not os.path.isabs(place) and "/runtime_resources/working_dir_files/" in os.getcwd():
        raise UserError(
            f"{place}: a job's working directory does not last; name an absolute path or a URL"
        )
    return os.path.abspath(place)


def bare(place: str) -> str:
    """A path or URL without the slash that may end it, behind which stores look for something."""
    return place if place.endswith("://") else place.rstrip("/") or "/"


def read_toml(file: str, what: str) -> dict[str, Any]:
    """The tables of a TOML file, a path or URL. Raises UserError, which calls it a `what`."""
    try:
        with fsspec.open(file, "rb") if "://" in file else open(file, "rb") as f:
            return tomllib.loads(f.read().decode())
    except FileNotFoundError:
        raise UserError(f"{file}: no such {what}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not TOML: {error}") from None
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{file}: not readable as a {what}: {error}") from None


def read(file: str) -> dict[str, Any]:
    """The fields that a TOML file has. Raises UserError for what is none, or of another type."""
    return _typed(read_toml(file, "configuration file"), file)


def parsed(text: str, file: str) -> dict[str, Any]:
    """As `read`, of a text that is in a file."""
    try:
        return _typed(tomllib.loads(text), file)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not TOML: {error}") from None


def _typed(values: dict[str, Any], file: str) -> dict[str, Any]:
    known = {f.name: f for f in fields(Config)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{file}: unknown field {name!r}")
        want = str(known[name].type)
        if not fits(value, want):
            raise UserError(f"{file}: {name} is {value!r}: a value of type {want} is wanted")
        if isinstance(value, list):
            values[name] = tuple(value)
        elif "float" in want and isinstance(value, int):
            values[name] = float(value)
    return values


def fits(value: Any, want: str) -> bool:
    """Whether a value out of a TOML file is of a field's type."""
    if want.startswith("tuple"):
        return isinstance(value, list) and all(type(v) in (int, float) for v in value)
    kinds = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
    return type(value) in kinds[want.removesuffix(" | None")]
