"""The command line `towers`. Imports nothing heavy before it knows what is asked for."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import MISSING, Field, fields
from typing import Any

from datasets import DataError
from workers.config import Config, UserError, configure, locate

VARIANTS = ("activation", "lrn", "pooling", "dropout", "columns")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0 done, 1 the work failed, 2 the user's mistake."""
    args = _parser().parse_args(argv)
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
    except KeyboardInterrupt:
        print("towers: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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

    describe = _command(
        commands,
        "describe",
        "print a network's layers and what they cost",
        "towers describe --network alexnet --towers 2",
        _describe,
    )
    describe.add_argument("--classes", type=int, help="Classes; 1000, or 10 of the small networks.")
    for f in fields(Config):
        if f.name in ("network", "towers", "batch", *VARIANTS):
            _option(describe, f)
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

    from workers.progress import result_table
    from workers.supervisor import train

    result = train(config, resume=resume)
    print(result_table(result))
    if getattr(args, "json", False):
        print(json.dumps(result))
    return 0


def _describe(args: argparse.Namespace) -> int:
    given = {"network": "alexnet", **_given(args)}
    small = given["network"] in ("alexnet-mini", "cifar")
    config = configure({**given, "run": "none"})
    classes = getattr(args, "classes", 10 if small else 1000)
    from workers.description import layer_table

    towers = config.towers or config.columns
    try:
        text, result = layer_table(config.build(classes), towers, config.batch)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(text)
    if getattr(args, "json", False):
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
