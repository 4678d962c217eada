"""The commands of `towers`, a module a theme; each adds its parsers, and nothing heavy is imported
before a command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any

from pipeline.recipes import Recipe
from workers.config import Config, UserError

VARIANTS = (
    *("activation", "lrn", "pooling", "dropout", "columns", "crossings", "crop"),
    *("lrn_size", "lrn_k", "lrn_alpha", "lrn_beta"),
)
"""Fields of a configuration that make another network."""


def command(
    commands: Any,
    name: str,
    text: str,
    example: str,
    run: Callable[[argparse.Namespace], int],
    again: str = "",
) -> argparse.ArgumentParser:
    """Adds a command that `run` does; options that are not given are absent from its arguments.

    `again`: what goes on with its work when it was interrupted.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example: {example}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object at the end.")
    parser.set_defaults(run_command=run, again=again)
    return parser


def options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds the options of these fields of the configuration."""
    if "network" in names:
        said = "Defaults in [ ] are alexnet's; other networks have their own."
        parser.description = f"{parser.description} {said}"
    groups: dict[str, Any] = {}
    recipe = {field.name for field in fields(Recipe)}
    for field in fields(Config):
        if field.name in names:
            title = "network" if field.name in ("network", *VARIANTS) else "training"
            title = title if field.name in recipe else "run"
            if title not in groups:
                groups[title] = parser.add_argument_group(title) if len(names) > 9 else parser
            _option(groups[title], field)


def help_of(name: str) -> str:
    """What a field of the configuration says of itself."""
    field = {f.name: f for f in fields(Config)}[name]
    return field.metadata["help"]


def _option(parser: Any, field: Field[Any]) -> None:
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
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas between them") from None


def workers(parser: argparse.ArgumentParser, *, gpus: bool = False) -> None:
    """Adds --workers, of which each has a GPU with `gpus`, where there are some, and --device."""
    most = "GPUs, which is the most, or else CPUs" if gpus else "CPUs"
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"Workers; as many as the cluster has {most} if unset.",
    )
    if gpus:
        parser.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), help="GPUs where there are some. [auto]"
        )


def on_error(parser: argparse.ArgumentParser) -> None:
    """Adds --on-error."""
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), help="What becomes of an image that is bad. [fail]"
    )


def step(parser: argparse.ArgumentParser) -> None:
    """Adds --step."""
    parser.add_argument(
        "--step",
        type=_number_or_best,
        metavar="N|best",
        help="Of this checkpoint, or of the best evaluated one, instead of the last.",
    )


def _number_or_best(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a number of steps, or best")
    return text if text == "best" else int(text)


def count(workers: int | None) -> int | None:
    """The value of --workers. Raises UserError if it cannot be."""
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: at least 1")
    return workers


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configuration that were said."""
    names = {f.name for f in fields(Config)}
    return {
        name: value for name, value in vars(args).items() if name in names and value is not None
    }


def show(args: argparse.Namespace, text: str, result: dict[str, Any]) -> int:
    """Prints a result as text, if there is any, and as JSON if that was asked for; returns 0."""
    from workers.progress import styled

    if text:
        print(styled(text, sys.stdout))
    if getattr(args, "json", False):
        print(json.dumps(result))
    return 0
