"""`towers claims`: trains the arms of the paper's claims side by side, and judges them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from datasets.shards import open_dataset
from datasets.storage import storage, write_whole
from workers.claims import ARMS, CLAIMS, Claim, Finding
from workers.claims_page import claims_page, markdown, told
from workers.cluster import connected
from workers.config import UserError, configure
from workers.counts import COUNTS, Count
from workers.history import History
from workers.lab import Lab, Scale
from workers.output import alone, writing
from workers.progress import Progress

SETTINGS, RESULT, TABLE, REPORT = "settings.json", "claims.json", "claims.md", "report.html"
ALL = (*COUNTS, *CLAIMS)  # by name, in the order of the table


def claims(
    folder: str,
    names: Sequence[str],
    scale: Scale,
    *,
    seeds: int = 3,
    parallel: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Shows the claims called `names`, all if there are none, in `folder`; runs that are finished
    there are not run again. Returns the keys of `towers claims --json`.

    Raises UserError and DataError for what the user can mend.
    """
    progress = progress or Progress()
    used = _checked(names, scale, seeds, parallel)  # before anything is made or started
    chosen = names or ALL
    trained = [claim for name, claim in CLAIMS.items() if name in chosen]
    lines = [_counted_line(count()) for name, count in COUNTS.items() if name in chosen]
    runs: dict[str, list[History]] = {}
    _keep(folder, scale)
    with alone(folder):
        if trained:
            with connected():
                lab = Lab(folder, scale, seeds, parallel, progress)
                runs = lab.train([ARMS[arm] for claim in trained for arm in claim.arms])
                lines += [
                    _trained_line(
                        claim, *lab.measured(claim, runs), _on(used, claim, runs, lab.failures)
                    )
                    for claim in trained
                ]
        return _write(folder, {**asdict(scale), "seeds": seeds}, lines, runs)


def _checked(names: Sequence[str], scale: Scale, seeds: int, parallel: int | None) -> Scale:
    """The scale, with as many images as are used: whole row groups."""
    for name in names:
        if name not in ALL:
            raise UserError(f"no claim {name!r}; there are {', '.join(ALL)}")
    numbers = {"seeds": seeds, "scale": scale.scale, "parallel": parallel, "images": scale.images}
    for what, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{what} is {value}: more than 0")
    configure({"network": "cifar", "precision": scale.precision})
    if not scale.data:
        return scale
    dataset = open_dataset(scale.data)
    if not scale.images:
        return scale
    return replace(scale, images=dataset.first("train", scale.images).rows("train"))


def _write(
    folder: str,
    of: dict[str, Any],
    lines: Sequence[dict[str, Any]],
    runs: dict[str, list[History]],
) -> dict[str, Any]:
    """Adds to what was found in a folder before; returns all of it."""
    before, drawn = _before(folder)
    found = {**before, **{line["claim"]: line for line in lines}}
    lines = [found[name] for name in ALL if name in found]
    result = {"run": folder, **of, "claims": lines}
    curves = drawn | {
        arm: [(told.steps, told.curve) for told in ended]
        for arm, ended in runs.items()
        if ARMS[arm].to_goal
    }
    fs, path = storage(folder)
    for name, text in (
        (RESULT, json.dumps({**result, "curves": curves}, indent=1) + "\n"),
        (TABLE, markdown(lines)),
        (REPORT, claims_page(result, curves)),
    ):
        write_whole(fs, f"{path}/{name}", text.encode())
    return {**result, "table": f"{folder}/{TABLE}", "report": f"{folder}/{REPORT}"}


def _keep(folder: str, scale: Scale) -> None:
    """Notes what the runs in a folder are of. Raises UserError if they are of something else."""
    fs, path = storage(folder)
    text = json.dumps(asdict(scale)) + "\n"
    with writing(folder):
        if fs.exists(f"{path}/{SETTINGS}"):
            before = fs.cat_file(f"{path}/{SETTINGS}").decode()
            if before != text:
                raise UserError(f"{folder} holds runs of {before.strip()}: name another folder")
            return
        fs.makedirs(path, exist_ok=True)
        write_whole(fs, f"{path}/{SETTINGS}", text.encode())


def _before(folder: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What was found in a folder before, by claim, where it was by the arms that the claim has, and
    the curves that were drawn, by arm.
    """
    fs, path = storage(folder)
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        result = json.loads(fs.cat_file(f"{path}/{RESULT}"))
        lines = {line["claim"]: line for line in result["claims"]}
        kept = {
            name: line
            for name, line in lines.items()
            if name not in CLAIMS or line["arms"].keys() == set(CLAIMS[name].compared)
        }
        return kept, result.get("curves", {})
    return {}, {}


def _counted_line(count: Count) -> dict[str, Any]:
    ours = f"{count.ours:,}" + (f" ({count.note})" if count.note else "")
    return {
        "claim": count.name,
        "says": count.says,
        "paper": count.said,
        "ours": ours,
        "on": "counted",
        "verdict": count.verdict,
        "value": count.ours,
    }


def _trained_line(
    claim: Claim, finding: Finding, values: dict[str, list[float]], on: str
) -> dict[str, Any]:
    return {
        "claim": claim.name,
        "says": claim.says,
        "paper": claim.paper,
        "ours": told(claim, finding),
        "on": on,
        "verdict": finding.verdict,
        "value": _number(finding.figure),
        "low": _number(finding.low),
        "high": _number(finding.high),
        "at_least": finding.bound,
        "measure": claim.measure,
        "arms": values,
    }


def _number(value: float) -> float | None:
    """What JSON has a word for."""
    return value if math.isfinite(value) else None


def _on(
    scale: Scale, claim: Claim, runs: dict[str, list[History]], failures: dict[str, str]
) -> str:
    """What a claim was tried on, or why it could not be."""
    name = scale.data.rstrip("/").rpartition("/")[2] if scale.data else "drawn set"
    seeds = len(set.intersection(*({one.seed for one in runs[arm]} for arm in claim.arms)))
    if not seeds:
        of_arms = (f"/runs/{arm}-{end}" for arm in claim.arms for end in ("rate", "seed"))
        why = (text for part in of_arms for run, text in failures.items() if part in run)
        return f"{name}: {next(why, 'of no seed all runs came to their end')}"
    images = f", {scale.images:,} images" if scale.images else ""
    ended = [one.curve[-1][0] for arm in claim.arms for one in runs[arm] if one.curve]
    steps = max(ended, default=0)
    return f"{name}{images}, {steps:,} steps, {seeds} seed{'s' * (seeds != 1)}"
