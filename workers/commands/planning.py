"""`towers plan`."""

from __future__ import annotations

import argparse
import math
from typing import Any

from workers.commands import VARIANTS, command, given, options, show
from workers.commands.training import MESH
from workers.config import NOWHERE, UserError, configure

RATES = {"tower_rate": "all towers together", "augmenter_rate": "one augmenter"}
PRICES = {"price_towers": "all towers together", "price_augmenter": "one augmenter"}


def add(commands: Any) -> None:
    plan = command(
        commands,
        "plan",
        "tell the memory, traffic, time and cost of a training",
        "towers plan SHARDS --network alexnet --measure --price-towers 2.5 --price-augmenter 0.4",
        _plan,
    )
    plan.add_argument("shards", nargs="?", metavar="SHARDS", help="Parquet shards, folder or URL.")
    plan.add_argument("--images", type=int, help="Training images; those of SHARDS if unset.")
    plan.add_argument("--classes", type=int, help="Classes; those of SHARDS, or 1000, if unset.")
    names = ("network", "epochs", "steps", "batch", "augmenters", *MESH, "microbatches")
    options(plan, *names, "pipeline", "precision", "device", "freeze", "image", *VARIANTS)
    plan.add_argument(
        "--measure", action="store_true", help="Measure the rates here, on SHARDS; half a minute."
    )
    for name, whose in RATES.items():
        flag, text = f"--{name.replace('_', '-')}", f"Images a second of {whose}."
        plan.add_argument(flag, type=float, metavar="R", help=text)
    for name, whose in PRICES.items():
        flag, text = f"--{name.replace('_', '-')}", f"Of an hour of {whose}. [0]"
        plan.add_argument(flag, type=float, metavar="P", help=text)


def _plan(args: argparse.Namespace) -> int:
    known = vars(args)
    config = configure({"network": "alexnet", **given(args), "run": NOWHERE})
    said = [known[name] for name in RATES if name in known]
    for name in (*RATES, *PRICES):
        value, price = known.get(name, 1), name in PRICES
        if not (0 <= value < math.inf and (value or price)):
            raise UserError(f"{name} is {value}: {'0 or more' if price else 'more than 0'}")
    for name, least in (("images", 1), ("classes", 2)):
        if known.get(name, least) < least:
            raise UserError(f"{name} is {known[name]}: at least {least}")
    if said and "measure" in known:
        raise UserError("--measure has no effect where rates are given")
    if len(said) == 1:
        raise UserError("--tower-rate and --augmenter-rate are wanted together")
    if "measure" in known and not config.shards:
        raise UserError("--measure needs SHARDS, whose images augmenters are measured on")
    from datasets.shards import open_dataset
    from pipeline.mesh import Mesh
    from workers.plan import plan, text
    from workers.rates import Rates, measure

    dataset = open_dataset(config.shards) if config.shards else None
    images = known.get("images") or (dataset.rows("train") if dataset else 0)
    if not images:
        raise UserError("how many images? name SHARDS, or say --images")
    classes = known.get("classes") or (len(dataset.classes) if dataset else 1000)
    rates = Rates(*said) if said else None
    mesh = Mesh(config.replicas, config.stages, config.towers or config.columns)
    if "measure" in known and dataset:
        rates, mesh = measure(dataset, config)
    prices = {name: known[name] for name in PRICES if name in known}
    result = plan(config.build(classes), config, mesh, images, rates, **prices)
    return show(args, text(result, rates), result)
