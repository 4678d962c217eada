"""`towers train`, `scale` and `describe`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from workers.commands import VARIANTS, command, given, help_of, options, show
from workers.config import NOWHERE, Config, UserError, configure, locate
from workers.guard import AGAIN, guarded

MESH = ("replicas", "stages", "cuts", "towers")


def add(commands: Any) -> None:
    train = command(
        commands,
        "train",
        "train a network",
        "towers train SHARDS --network alexnet --augmenters 2:16",
        _train,
        again="--resume goes on from the last checkpoint, if there is one",
    )
    train.add_argument("shards", nargs="?", metavar="SHARDS", help=help_of("shards"))
    train.add_argument("--config", metavar="FILE", help="TOML file of these options.")
    train.add_argument("--resume", action="store_true", help="Go on with the run in RUN.")
    options(train, *(f.name for f in fields(Config) if f.name != "shards"))

    scale = command(
        commands,
        "scale",
        "change the fleet of a run that is going on",
        "towers scale RUN --augmenters 8:32",
        _scale,
    )
    scale.add_argument("run", metavar="RUN", help=help_of("run"))
    scale.add_argument("--augmenters", metavar="MIN:MAX", required=True, help=help_of("augmenters"))

    describe = command(
        commands,
        "describe",
        "print a network's layers and what they cost",
        "towers describe --network alexnet --towers 2",
        _describe,
    )
    describe.add_argument("--classes", type=int, help="Classes; 1000, or 10 of the small networks.")
    options(describe, "network", *MESH, "batch", "image", *VARIANTS)


def _train(args: argparse.Namespace) -> int:
    said, resume = given(args), getattr(args, "resume", False)
    file = getattr(args, "config", None)
    if resume:
        if "run" not in said:
            raise UserError("--resume needs --run RUN, the run to go on with")
        if file:
            raise UserError("--config has no effect with --resume: RUN holds its configuration")
        if "init" in said:
            raise UserError("--init has no effect with --resume: RUN has weights")
        file = f"{locate(said['run'])}/config.toml"
    config = configure(said, file, goes_on=resume)

    began = time.time()

    def work(deaths: int = 0, progressed: Callable[[], object] = lambda: None) -> int:
        from workers.errors import ClusterLost, RunFailed
        from workers.progress import result_table
        from workers.supervisor import train

        try:
            result = train(
                config,
                resume=resume,
                deaths=deaths,
                since=began,
                sized=resume and "augmenters" in said,
                progressed=lambda _: progressed(),
            )
        except ClusterLost as error:
            if not args.guard:
                raise
            print(f"towers: {error}", file=sys.stderr)
            return AGAIN
        except UserError as error:  # what was no mistake when the run began
            if not deaths:
                raise
            raise RunFailed(f"{error}; --resume goes on") from None
        return show(args, result_table(result), result)

    return guarded(work, config.restarts) if args.guard else work()


def _scale(args: argparse.Namespace) -> int:
    from workers.run import write_scale

    augmenters = configure({"augmenters": args.augmenters, "run": NOWHERE}).augmenters
    run = locate(args.run)
    goes_on = write_scale(run, augmenters)
    when = "as soon as the run looks" if goes_on else "if it is resumed: it has ended"
    text = f"{args.run}: {augmenters} augmenters, {when}"
    return show(args, text, {"run": run, "augmenters": augmenters})


def _describe(args: argparse.Namespace) -> int:
    said = {"network": "alexnet", **given(args)}
    small = said["network"] in ("alexnet-mini", "cifar")
    config = configure({**said, "run": NOWHERE})
    classes = getattr(args, "classes", 10 if small else 1000)
    from pipeline.mesh import Mesh
    from workers.description import layer_table

    mesh = Mesh(config.replicas, config.stages, config.towers or config.columns)
    try:
        text, result = layer_table(config.build(classes), mesh, config.parts, config.batch)
    except ValueError as error:
        raise UserError(str(error)) from None
    return show(args, text, result)
