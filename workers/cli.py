"""The command line `towers`. Imports nothing heavy before it knows what is asked for."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any

from datasets import DataError
from workers import cli_jobs
from workers.config import Config, UserError, configure, locate
from workers.guard import AGAIN, guarded

PREPARE = ("size", "quality", "keep", "holdout", "seed", "on_error")
MESH = ("replicas", "stages", "cuts", "towers")
VARIANTS = ("activation", "lrn", "pooling", "dropout", "columns")


def program() -> int:
    """The program `towers`: `main`, with runs that outlive their own supervisor."""
    return main(guard=True)


def main(argv: list[str] | None = None, *, guard: bool = False) -> int:
    """Runs a command; returns 0 done, 1 the work failed, 2 the user's mistake.

    With `guard`, which needs a process in which nothing has begun, `train` works in a child process
    and is started again if that is killed.
    """
    args = _parser().parse_args(argv)
    args.guard = guard
    from workers.errors import RunFailed

    try:
        result: int = args.run_command(args)
        return result
    except (UserError, DataError) as error:
        print(f"towers: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"towers: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        from datasets.layout import passing

        if not passing(error):
            raise
        print(f"towers: a store failed, again and again: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("towers: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="towers", description="Trains the two-tower AlexNet of 2012 on a Ray cluster."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(
        commands,
        "train",
        "train a network",
        "towers train SHARDS --network alexnet --augmenters 2:16",
        _train,
    )
    train.add_argument("shards", nargs="?", metavar="SHARDS", help=_help("shards"))
    train.add_argument("--config", metavar="FILE", help="TOML file of these options.")
    train.add_argument("--resume", action="store_true", help="Go on with the run in RUN.")
    for f in fields(Config):
        if f.name != "shards":
            _option(train, f)

    prepare = _command(
        commands,
        "prepare",
        "make shards of labelled images",
        "towers prepare ILSVRC2012_img_train.tar s3://bucket/imagenet --split train",
        _prepare,
    )
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        help="ILSVRC's tar of tars, a tar, zip or folder of class folders, WebDataset tars, "
        "Hugging Face Parquet, or a CSV or Parquet list of paths and labels; a path or URL.",
    )
    prepare.add_argument("shards", metavar="SHARDS", help="Folder or URL of the shards.")
    prepare.add_argument("--split", metavar="NAME", help="Make this split alone, beside others.")
    prepare.add_argument("--size", type=int, help="Side of the images in pixels. [256]")
    prepare.add_argument("--quality", type=int, help="Of JPEG, 1 to 100. [95]")
    prepare.add_argument("--keep", action="store_true", help="Store the images as they came.")
    prepare.add_argument(
        "--holdout", type=float, help="Share that becomes val if the source has no split. [0.05]"
    )
    prepare.add_argument("--labels", metavar="FILE", help="What images in no class folder show.")
    prepare.add_argument("--synsets", metavar="FILE", help="Synsets and what they mean.")
    prepare.add_argument("--seed", type=int, help="Of order and split. [0]")
    prepare.add_argument(
        "--on-error", choices=("fail", "skip"), help="What becomes of an image that is bad. [fail]"
    )
    _workers(prepare)

    validate = _command(
        commands,
        "validate",
        "read every row of shards and name what is wrong",
        "towers validate SHARDS",
        _validate,
    )
    validate.add_argument("shards", metavar="SHARDS", help=_help("shards"))
    _workers(validate)

    scale = _command(
        commands,
        "scale",
        "change the fleet of a run that is going on",
        "towers scale RUN --augmenters 8:32",
        _scale,
    )
    scale.add_argument("run", metavar="RUN", help=_help("run"))
    scale.add_argument("--augmenters", metavar="MIN:MAX", required=True, help=_help("augmenters"))

    export = _command(
        commands,
        "export",
        "write a run's weights into a file",
        "towers export RUN alexnet.safetensors",
        _export,
    )
    export.add_argument("run", metavar="RUN", help=_help("run"))
    export.add_argument("file", metavar="FILE", help="A name in .safetensors or .pt.")
    export.add_argument("--step", type=int, help="Of this checkpoint instead of the last.")

    import_ = _command(
        commands,
        "import",
        "make a run out of weights",
        "towers import bvlc_alexnet.npz RUN --network alexnet-2012 --shards SHARDS",
        _import,
    )
    import_.add_argument("file", metavar="FILE", help="In .safetensors, .pt, or Caffe's .npz.")
    import_.add_argument("run", metavar="RUN", help=_help("run"))
    for f in fields(Config):
        if f.name in ("network", "shards", *VARIANTS):
            _option(import_, f)

    describe = _command(
        commands,
        "describe",
        "print a network's layers and what they cost",
        "towers describe --network alexnet --towers 2",
        _describe,
    )
    describe.add_argument("--classes", type=int, help="Classes; 1000, or 10 of the small networks.")
    for f in fields(Config):
        if f.name in ("network", *MESH, "batch", *VARIANTS):
            _option(describe, f)
    cli_jobs.add(commands, _command)
    return parser


def _command(commands: Any, name: str, text: str, example: str, run: Any) -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example: {example}",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object at the end.")
    parser.set_defaults(run_command=run)
    return parser


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="Workers; as many as the cluster has CPUs if unset.",
    )


def _help(name: str) -> str:
    field = {f.name: f for f in fields(Config)}[name]
    text: str = field.metadata["help"]
    return text


def _option(parser: argparse.ArgumentParser, field: Field[Any]) -> None:
    """The option of a configuration's field; values are checked by the configuration itself."""
    flag, kind = "--" + field.name.replace("_", "-"), str(field.type).removesuffix(" | None")
    default = "" if field.default in (None, "", (), MISSING) else f" [{field.default}]"
    text = field.metadata["help"].replace("%", "%%") + default
    allowed = [a for a in field.metadata.get("allowed") or () if a is not None]
    metavar = "|".join(map(str, allowed)) or field.name.upper()
    if kind == "bool":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif kind.startswith("tuple"):
        parser.add_argument(flag, type=_floats, metavar="E,E,...", help=text)
    else:
        types = {"int": int, "float": float, "str": str}
        parser.add_argument(flag, type=types[kind], metavar=metavar, help=text)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _version() -> str:
    from importlib.metadata import version

    return f"towers {version('towers')}"


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = {f.name for f in fields(Config)}
    return {
        name: value for name, value in vars(args).items() if name in names and value is not None
    }


def _train(args: argparse.Namespace) -> int:
    given, resume = _given(args), getattr(args, "resume", False)
    file = getattr(args, "config", None)
    if resume:
        if "run" not in given:
            raise UserError("--resume needs --run RUN, the run to go on with")
        if file:
            raise UserError("--config has no effect with --resume: RUN holds its configuration")
        file = f"{locate(given['run'])}/config.toml"
    config = configure(given, file)

    def work(deaths: int = 0, progressed: Callable[[], None] | None = None) -> int:
        from workers.errors import ClusterLost
        from workers.progress import result_table
        from workers.supervisor import train

        try:
            result = train(config, resume=resume, deaths=deaths, progressed=progressed)
        except ClusterLost as error:
            if not args.guard:
                raise
            print(f"towers: {error}", file=sys.stderr)
            return AGAIN
        print(result_table(result))
        if getattr(args, "json", False):
            print(json.dumps(result))
        return 0

    return guarded(work, config.restarts) if args.guard else work()


def _prepare(args: argparse.Namespace) -> int:
    from datasets.preparation import Options
    from workers.prepare import prepare
    from workers.progress import table

    given = vars(args)
    try:
        options = Options(**{name: given[name] for name in PREPARE if name in given})
        result = prepare(
            locate(args.source),
            locate(args.shards),
            options,
            split=given.get("split"),
            labels=given.get("labels"),
            synsets=given.get("synsets"),
            workers=_count(given.get("workers")),
        )
    except KeyboardInterrupt:
        print("towers: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 1
    except DataError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    rows = ", ".join(f"{split} {count}" for split, count in result["splits"].items())
    names = ("url", "shards", "classes", "skipped")
    lines: list[tuple[str, ...]] = [(name, str(result[name])) for name in names]
    print(table([*lines, ("rows", rows)]))
    if given.get("json"):
        print(json.dumps(result))
    return 0


def _validate(args: argparse.Namespace) -> int:
    from workers.validate import validate

    result = validate(locate(args.shards), workers=_count(getattr(args, "workers", None)))
    for fault in result["named"]:
        print(fault)
    for note in result["notes"]:
        print(f"note: {note}")
    faults = result["faults"]
    print(f"{result['rows']} rows, {faults or 'no'} fault{'s' if faults != 1 else ''}")
    if getattr(args, "json", False):
        print(json.dumps(result))
    return 1 if faults else 0


def _count(workers: int | None) -> int | None:
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: at least 1")
    return workers


def _scale(args: argparse.Namespace) -> int:
    from workers.run import write_scale

    augmenters = configure({"augmenters": args.augmenters, "run": "none"}).augmenters
    write_scale(locate(args.run), augmenters)
    print(f"{args.run}: {augmenters} augmenters, as soon as the run looks")
    return 0


def _export(args: argparse.Namespace) -> int:
    from workers.progress import table
    from workers.weights import export

    return _print(args, export(locate(args.run), args.file, getattr(args, "step", None)), table)


def _import(args: argparse.Namespace) -> int:
    from workers.progress import table
    from workers.weights import import_

    given = {name: value for name, value in _given(args).items() if name != "run"}
    return _print(args, import_(args.file, locate(args.run), given), table)


def _print(args: argparse.Namespace, result: dict[str, Any], table: Any) -> int:
    print(table([(name, str(value)) for name, value in result.items()]))
    if getattr(args, "json", False):
        print(json.dumps(result))
    return 0


def _describe(args: argparse.Namespace) -> int:
    given = {"network": "alexnet", **_given(args)}
    small = given["network"] in ("alexnet-mini", "cifar")
    config = configure({**given, "run": "none"})
    classes = getattr(args, "classes", 10 if small else 1000)
    from pipeline.mesh import Mesh
    from workers.description import layer_table

    mesh = Mesh(config.replicas, config.stages, config.towers or config.columns)
    try:
        text, result = layer_table(config.build(classes), mesh, config.parts, config.batch)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(text)
    if getattr(args, "json", False):
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(program())
