"""`towers evaluate`, `predict`, `neighbours` and `report`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from workers.commands import command, count, on_error, show, step, workers
from workers.config import UserError, locate

BAR, WIDTH = "\u2588", 40  # a full block, and how many of them are all of the probability


def add(commands: Any) -> None:
    evaluate = command(
        commands,
        "evaluate",
        "measure the errors of runs, and of their averaged prediction",
        "towers evaluate RUN --data SHARDS --crops 10",
        _evaluate,
    )
    evaluate.add_argument("runs", nargs="+", metavar="RUN", help="Folders or URLs of runs.")
    evaluate.add_argument(
        "--data", metavar="SHARDS", help="Folder or URL of shards; the run's own if unset."
    )
    _split(evaluate)
    _network(evaluate)
    evaluate.add_argument(
        "--weights", metavar="W,W,...", help="Of each run in the average; equal if unset."
    )
    on_error(evaluate)
    workers(evaluate, gpus=True)

    predict = command(
        commands,
        "predict",
        "print the likeliest classes of images",
        "towers predict RUN photos/ cat.jpg https://example.org/dog.jpg",
        _predict,
    )
    predict.add_argument("run", metavar="RUN", help="Folder or URL of the run.")
    images = "Files, folders of images, or URLs."
    predict.add_argument("images", nargs="*", default=[], metavar="IMAGE", help=images)
    predict.add_argument(
        "--data", metavar="SHARDS", help="Every row of these shards instead, by all workers."
    )
    _split(predict)
    predict.add_argument(
        "--output", metavar="FILE.parquet", help="Where the classes of the rows of --data go."
    )
    _network(predict)
    on_error(predict)
    workers(predict, gpus=True)

    near = command(
        commands,
        "neighbours",
        "find the training images that a network finds most like an image",
        "towers neighbours RUN cat.jpg --data SHARDS --output sheet.png",
        _neighbours,
    )
    near.add_argument("run", metavar="RUN", help="Folder or URL of the run.")
    near.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    near.add_argument("--data", metavar="SHARDS", help="Among these; the run's own if unset.")
    near.add_argument("--split", metavar="NAME", help="Split of the shards. [train]")
    near.add_argument("--k", type=int, help="How many of each. [5]")
    near.add_argument("--output", metavar="FILE.png", help="A contact sheet of them.")
    step(near)
    on_error(near)
    workers(near, gpus=True)

    report = command(
        commands,
        "report",
        "write a page of curves, kernels and mistakes of runs",
        "towers report RUN",
        _report,
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="Folders or URLs of runs.")
    report.add_argument("--output", metavar="FILE", help="The page. [report.html in the first RUN]")


def _split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", metavar="NAME", help="Split of the shards. [val, else test]")


def _network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--crops", type=int, choices=(1, 10), help="Crops of each image: its centre, or ten. [1]"
    )
    step(parser)


def _evaluate(args: argparse.Namespace) -> int:
    from workers.evaluate import evaluate
    from workers.progress import table

    given = _given(args)
    if data := getattr(args, "data", ""):
        given["data"] = locate(data)
    if text := getattr(args, "weights", ""):
        given["weights"] = _numbers(text)
    result = evaluate([locate(run) for run in args.runs], **given)
    crops = "1 crop" if result["crops"] == 1 else f"{result['crops']} crops"
    heads = (f"{result['images']} images of {result['split']}, {crops}", "loss", "top-1", "top-5")
    rows = [_figures(f"{line['run']} step {line['step']}", line) for line in result["runs"]]
    if len(rows) > 1:
        rows.append(_figures("averaged", result))
    return show(args, table(rows, heads) + _skipped(result), result)


def _predict(args: argparse.Namespace) -> int:
    from workers.predict import predict
    from workers.progress import styled

    run, given, found = locate(args.run), _given(args), []
    if data := getattr(args, "data", ""):
        return _predict_rows(args, run, data, given)
    if not args.images:
        raise UserError("no image to predict: name files, folders or URLs, or shards by --data")
    for name in ("split", "output", "workers", "device"):
        if hasattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} has no effect without --data")
    bar = BAR if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    bar = bar if sys.stdout.isatty() else ""
    skipped = 0
    for line in predict(run, args.images, **given):
        if "skipped" in line:
            print(f"skipped: {line['skipped']}", file=sys.stderr)
            skipped += 1
            continue
        print(styled(prediction(line, bar), sys.stdout))
        found.append(line)
    about = {"run": run, "crops": given.get("crops", 1), "skipped": skipped}
    return show(args, "", {**about, "images": found})


def _predict_rows(args: argparse.Namespace, run: str, data: str, given: dict[str, Any]) -> int:
    from workers.prediction_file import predict_rows

    if args.images:
        raise UserError(f"{args.images[0]}: name images or --data, not both")
    if not (output := getattr(args, "output", "")):
        raise UserError("--data needs --output FILE.parquet, where its rows' classes go")
    result = predict_rows(run, locate(data), locate(output), **given)
    text = f"{result['file']}: {result['rows']} rows of {result['split']}"
    return show(args, text + _skipped(result), result)


def _neighbours(args: argparse.Namespace) -> int:
    from workers.neighbours import neighbours
    from workers.progress import table

    given = _given(args)
    for name in ("data", "output"):
        if place := getattr(args, name, ""):
            given[name] = locate(place)
    if hasattr(args, "k"):
        given["k"] = args.k
    result = neighbours(locate(args.run), args.images, **given)
    texts = []
    for one in result["images"]:
        near = one["neighbours"]
        rows: list[tuple[str, ...]] = [
            (n["title"], f"{n['distance']:.4g}", n["place"]) for n in near
        ]
        texts.append(table(rows, (one["image"], "distance", "where")))
    return show(args, "\n\n".join(texts), result)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were said, as arguments of the functions that do the work."""
    names = ("split", "crops", "step", "on_error", "workers", "device")
    found = {name: value for name, value in vars(args).items() if name in names}
    count(found.get("workers"))
    return found


def _skipped(result: dict[str, Any]) -> str:
    return f"\n{result['skipped']} bad images were skipped" if result["skipped"] else ""


def _report(args: argparse.Namespace) -> int:
    from workers.report import report

    output = getattr(args, "output", "")
    result = report([locate(run) for run in args.runs], locate(output) if output else "")
    return show(args, result["file"], result)


def prediction(line: dict[str, Any], bar: str) -> str:
    """An image's likeliest classes for a person, with bars made of `bar` if it is not ""."""
    from workers.progress import width

    wide = max(width(one["title"]) for one in line["classes"])
    lines = [line["image"]]
    for one in line["classes"]:
        chance = one["probability"]
        drawn = bar * round(chance * WIDTH)
        title = one["title"] + " " * (wide - width(one["title"]))
        lines.append(f"  {title}  {chance:6.1%}  {drawn}".rstrip())
    return "\n".join(lines)


def _figures(name: str, line: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{line['loss']:.4f}",
        f"{line['top1_error']:.2%}",
        f"{line['top5_error']:.2%}",
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"weights is {text!r}: numbers with commas between them") from None
