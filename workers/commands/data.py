"""`towers prepare` and `validate`."""

from __future__ import annotations

import argparse
from typing import Any

from workers.commands import command, count, on_error, show, workers
from workers.config import UserError, locate

PREPARE = ("size", "quality", "keep", "holdout", "seed", "on_error")


def add(commands: Any) -> None:
    prepare = command(
        commands,
        "prepare",
        "make shards of labelled images",
        "towers prepare ILSVRC2012_img_train.tar s3://bucket/imagenet --split train",
        _prepare,
        again="the same command goes on where it stopped",
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
    on_error(prepare)
    workers(prepare)

    validate = command(
        commands,
        "validate",
        "read every row of shards and name what is wrong",
        "towers validate SHARDS",
        _validate,
    )
    validate.add_argument("shards", metavar="SHARDS", help="Parquet shards, folder or URL.")
    workers(validate)


def _prepare(args: argparse.Namespace) -> int:
    from datasets.kept import Options
    from workers.prepare import prepare
    from workers.progress import table

    given = vars(args)
    try:
        options = Options(**{name: given[name] for name in PREPARE if name in given})
    except ValueError as error:
        raise UserError(str(error)) from None
    result = prepare(
        locate(args.source),
        locate(args.shards),
        options,
        split=given.get("split"),
        labels=given.get("labels"),
        synsets=given.get("synsets"),
        workers=count(given.get("workers")),
    )
    rows = ", ".join(f"{split} {rows}" for split, rows in result["splits"].items())
    names = ("url", "shards", "classes", "skipped")
    lines: list[tuple[str, ...]] = [(name, str(result[name])) for name in names]
    return show(args, table([*lines, ("rows", rows)]), result)


def _validate(args: argparse.Namespace) -> int:
    from workers.validate import validate

    result = validate(locate(args.shards), workers=count(getattr(args, "workers", None)))
    faults = result["faults"]
    lines = [*result["named"], *(f"note: {note}" for note in result["notes"])]
    lines.append(f"{result['rows']} rows, {faults or 'no'} fault{'s' if faults != 1 else ''}")
    return show(args, "\n".join(lines), result) or int(faults > 0)
