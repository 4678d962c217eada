"""`towers tune` and `claims`."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from typing import Any

from pipeline.recipes import Recipe
from workers.commands import command, given, help_of, options, show
from workers.config import NOWHERE, UserError, configure, locate, read
from workers.space import read_space

TRIALS = 20
POPULATION = 8  # of pbt, which has all its trials at once
PARALLEL = "Runs side by side. [a GPU for each tower, or else a CPU]"


def add(commands: Any) -> None:
    tune = command(
        commands,
        "tune",
        "search for the best settings, many runs side by side",
        "towers tune CIFAR10 --network cifar --minutes 30",
        _tune,
        again="--resume goes on",
    )
    tune.add_argument("shards", nargs="?", metavar="SHARDS", help=help_of("shards"))
    tune.add_argument("--space", metavar="FILE", help="TOML file of what may be chosen from what.")
    tune.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"Runs; of pbt its population, all side by side. [{TRIALS}, of pbt {POPULATION}]",
    )
    tune.add_argument(
        "--algorithm",
        choices=("random", "optuna", "pbt"),
        help="At random, Optuna's Bayesian search, population-based training. [random]",
    )
    tune.add_argument(
        "--scheduler", choices=("asha", "none"), help="Whether poor runs end early. [asha]"
    )
    tune.add_argument("--minutes", type=float, metavar="M", help="After which the search ends.")
    tune.add_argument("--parallel", type=int, metavar="P", help=PARALLEL)
    tune.add_argument(
        "--confirm",
        type=int,
        metavar="N",
        help="Then train the best recipe and the one as it was from N other seeds each.",
    )
    tune.add_argument("--config", metavar="FILE", help="TOML file of settings of every run.")
    tune.add_argument("--resume", action="store_true", help="Go on with the search in RUN.")
    tune.add_argument("--run", metavar="RUN", help="Folder or URL of the search.")
    options(tune, *FIXED)

    claims = command(
        commands,
        "claims",
        "show the paper's claims by experiments, beside its figures",
        "towers claims --data CIFAR10 --images 10000 --run claims",
        _claims,
        again="the same command goes on",
    )
    claims.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="This claim, or several with commas; may be said again. [all]",
    )
    claims.add_argument(
        "--data",
        metavar="SHARDS",
        help="Folder or URL of Parquet shards; if unset the drawn data set.",
    )
    claims.add_argument(
        "--scale", type=float, metavar="S", help="Factor on the epochs of every run. [1]"
    )
    claims.add_argument("--seeds", type=int, metavar="N", help="Runs of every recipe. [3]")
    claims.add_argument("--parallel", type=int, metavar="P", help=PARALLEL)
    claims.add_argument(
        "--run", metavar="RUN", help="Folder or URL; what is finished there is not run again."
    )
    options(claims, "images", "precision")


FIXED = (
    *(field.name for field in fields(Recipe) if field.name != "freeze"),
    *("images", "steps", "seed", "towers", "device", "on_error", "restarts"),
)
"""Settings that hold for every run of a search if they are given."""


def _tune(args: argparse.Namespace) -> int:
    folder = getattr(args, "run", "")
    if getattr(args, "resume", False):
        if not folder:
            raise UserError("--resume needs --run RUN, the search to go on with")
        for name in vars(args):
            if name not in ("run", "resume", "json", "run_command", "again", "guard"):
                raise UserError(f"{name} has no effect with --resume: RUN holds the search")
        from workers.search import search

        result = search(locate(folder), None)
    else:
        fixed = _fixed(args)
        space, left = read_space(getattr(args, "space", ""), fixed)
        from workers.search import Search, search

        names = ("trials", "algorithm", "minutes", "parallel", "confirm")
        said = {name: value for name, value in vars(args).items() if name in names}
        together = said.get("algorithm") == "pbt"
        if together and "parallel" in said:
            raise UserError("--parallel has no effect with pbt, whose --trials run all at once")
        if scheduler := getattr(args, "scheduler", ""):
            if together:
                raise UserError("--scheduler has no effect with pbt, which ends no run early")
            said["early"] = scheduler == "asha"
        wanted = Search(fixed, space, **{"trials": POPULATION if together else TRIALS, **said})
        if left:
            print(f"not searched: {', '.join(left)}", file=sys.stderr)
        folder = folder or f"runs/tune-{time.strftime('%Y%m%d-%H%M%S')}"
        result = search(locate(folder), wanted)
    return show(args, _text(result), result)


def _fixed(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of every run, checked."""
    file, asked = getattr(args, "config", None), given(args)
    said = read(file) if file else {}
    config = configure({**asked, "run": NOWHERE}, file)
    void = {n for n in said.keys() - asked if said[n] and getattr(config, n) in (None, ())}
    names = {"network", "shards", *said, *asked} - void - {"run"}
    return {name: getattr(config, name) for name in names}


def _text(result: dict[str, Any]) -> str:
    """The outcome for a person."""
    from workers.progress import table
    from workers.search_page import lower

    best, recipe = result["best"], result["recipe"]
    rows: list[tuple[str, ...]] = [
        ("trials", f"{result['trials']} ({result['finished']} to their end)"),
        ("best top-1 error", f"{best['top1_error']:.2%} (trial {best['trial']})"),
    ]
    if recipe and recipe["top1_error"] is not None:
        rows.append(("the recipe as it was", f"{recipe['top1_error']:.2%}"))
    if confirmed := result["confirmed"]:
        for name, errors in (("best", confirmed["best"]), ("recipe", confirmed["recipe"])):
            shown = ", ".join(f"{error:.2%}" for error in errors)
            rows.append((f"{name}, other seeds", shown or "none came to its end"))
        if "lower" in confirmed:
            rows.append(("lower by", lower(confirmed)))
    rows += [(name, f"{value}") for name, value in best["settings"].items()]
    rows += [("best recipe", result["config"]), ("page", result["report"])]
    return table(rows)


def _claims(args: argparse.Namespace) -> int:
    from workers.experiments import claims
    from workers.lab import Scale
    from workers.progress import table

    given = vars(args)
    data = getattr(args, "data", "")
    said = {name: given[name] for name in ("scale", "images", "precision") if name in given}
    scale = Scale(locate(data) if data else "", **said)
    folder = getattr(args, "run", "") or f"runs/claims-{time.strftime('%Y%m%d-%H%M%S')}"
    more = {name: given[name] for name in ("seeds", "parallel") if name in given}
    only = [name for names in getattr(args, "only", []) for name in names.split(",") if name]
    result = claims(locate(folder), only, scale, **more)
    names = ("claim", "paper", "ours", "on", "verdict")
    rows = [tuple(str(line[name]) for name in names) for line in result["claims"]]
    text = table(rows, names)
    return show(args, f"{text}\n\n{result['table']}\n{result['report']}", result)
