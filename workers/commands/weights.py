"""`towers export` and `import`."""

from __future__ import annotations

import argparse
from typing import Any

from workers.commands import VARIANTS, command, given, help_of, options, show, step
from workers.config import locate


def add(commands: Any) -> None:
    export = command(
        commands,
        "export",
        "write a run's network into a file, and how to use it beside it",
        "towers export RUN alexnet.safetensors",
        _export,
    )
    export.add_argument("run", metavar="RUN", help=help_of("run"))
    export.add_argument("file", metavar="FILE", help="A name in .safetensors, .pt or .onnx.")
    step(export)

    import_ = command(
        commands,
        "import",
        "make a run out of weights",
        "towers import alexnet.safetensors RUN --shards SHARDS",
        _import,
    )
    import_.add_argument(
        "file",
        metavar="FILE",
        help="In .pt, Caffe's .npz, or .safetensors, which may hold a recipe that goes before the "
        "defaults.",
    )
    import_.add_argument("run", metavar="RUN", help=help_of("run"))
    import_.add_argument(
        "--shards", metavar="SHARDS", help="Folder or URL of Parquet shards to train on."
    )
    options(import_, "network", "image", *VARIANTS)


def _export(args: argparse.Namespace) -> int:
    from workers.weights import export

    return _show(args, export(locate(args.run), locate(args.file), getattr(args, "step", None)))


def _import(args: argparse.Namespace) -> int:
    from workers.weights import import_

    said = {name: value for name, value in given(args).items() if name != "run"}
    return _show(args, import_(locate(args.file), locate(args.run), said))


def _show(args: argparse.Namespace, result: dict[str, Any]) -> int:
    from workers.progress import table

    return show(args, table([(name, str(value)) for name, value in result.items()]), result)
