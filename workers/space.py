"""Search spaces: which settings `towers tune` may choose, and from what, as a TOML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.network import Norm
from pipeline.recipes import Recipe
from workers.config import NOWHERE, Config, UserError, configure, fits, read_toml

DEFAULT = Path(__file__).with_name("space.toml")

CHANGEABLE = (
    *("rate", "momentum", "decay", "bias_rate", "dropout"),
    *("lrn_k", "lrn_alpha", "lrn_beta", "mirror", "pad", "colour"),
)
"""What population-based training may change in a run that goes on."""


@dataclass(frozen=True)
class Domain:
    """What a setting may be: one of `choices`, or from `low` to `high`, whole numbers only or not,
    by the logarithm or not.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that are all allowed if every one of the domain is."""
        return self.choices or (self.low, self.high)

    def nearest(self, value: Any) -> Any:
        """The value itself if it is of the domain, else the nearer end, or the first choice."""
        if self.choices:
            return value if value in self.choices else self.choices[0]
        return min(max(value, self.low), self.high)


Space = dict[str, Domain]


def read_space(file: str, fixed: dict[str, Any]) -> tuple[Space, list[str]]:
    """The space of a TOML file, the default one if it is "", and the settings that were left out of
    the default one: those that the network of the `fixed` settings lacks or that are fixed.

    Raises UserError, naming file and setting, for what cannot be.
    """
    name = file or str(DEFAULT)
    space, left = {}, []
    for setting, table in read_toml(name, "search space").items():
        if not file and setting in fixed:
            left.append(setting)
            continue
        try:
            space[setting] = _checked(setting, table, fixed)
        except UserError as error:
            if file:
                raise UserError(f"{file}: {error}") from None
            left.append(setting)
    if not space:
        raise UserError(f"{name}: nothing to search; every setting is fixed")
    return space, left


def _checked(setting: str, table: Any, fixed: dict[str, Any]) -> Domain:
    known = {f.name: str(f.type).removesuffix(" | None") for f in fields(Recipe)}
    known.pop("network")
    if setting not in known:
        raise UserError(f"unknown setting {setting!r}")
    if setting in fixed:
        raise UserError(f"{setting} is searched, and fixed as {fixed[setting]!r}")
    domain = _domain(setting, table, whole=known[setting] == "int")
    for value in domain.ends:
        if not fits(list(value) if isinstance(value, tuple) else value, known[setting]):
            raise UserError(f"{setting} has {value!r}: a value of type {known[setting]} is wanted")
        configure({**fixed, setting: value, "run": NOWHERE})
    return domain


def published(config: Config, space: Space) -> dict[str, Any]:
    """The settings of a space as the configuration has them, where unset as its network does."""
    network = config.build(1000)
    layers = network.layers
    norm = next((n for layer in layers for n in layer.norms if not n.spatial), Norm())
    drop = next((layer.dropout for layer in layers if layer.dropout), 0.0)
    unset = {"dropout": drop, "crop": network.crop} | {
        f"lrn_{k}": getattr(norm, k) for k in ("size", "k", "alpha", "beta")
    }
    found = {name: getattr(config, name) for name in space}
    return {name: unset.get(name) if value is None else value for name, value in found.items()}


def _domain(setting: str, table: Any, *, whole: bool) -> Domain:
    form = f"{setting} is {table!r}: {{ low = L, high = H }}, or {{ choices = [A, B] }}"
    if not isinstance(table, dict):
        raise UserError(form)
    if set(table) == {"choices"}:
        values = table["choices"]
        if not (isinstance(values, list) and values):
            raise UserError(form)
        return Domain(choices=tuple(tuple(v) if isinstance(v, list) else v for v in values))
    if not {"low", "high"} <= set(table) <= {"low", "high", "log"}:
        raise UserError(form)
    low, high, log = table["low"], table["high"], table.get("log", False)
    numbers = all(type(v) in (int, float) and math.isfinite(v) for v in (low, high))
    if not numbers or type(log) is not bool:
        raise UserError(form)
    if not low < high:
        raise UserError(f"{setting} is from {low} to {high}: low has to be less than high")
    if log and not low > 0:
        raise UserError(f"{setting} is from {low} to {high}: with log, low has to be more than 0")
    low, high = (value if whole else float(value) for value in (low, high))
    return Domain((), low, high, log, whole)
