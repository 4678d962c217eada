"""Whether the best of a search is better than the recipe as it was, from other seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from workers.claims import interval
from workers.config import Config
from workers.history import read_history
from workers.progress import Progress
from workers.trials import run_all

NAMES = ("best", "recipe")


def confirm(
    config: Callable[[str, str, int], Config],
    folder: str,
    best: str,
    seeds: int,
    parallel: int,
    progress: Progress,
) -> dict[str, Any]:
    """Trains "best" and "recipe" from so many seeds each, 1 and on, by `config(name, run, seed)`;
    `best` is the trial of the best: a search that goes on may find another.

    Returns the top-1 errors of either; the `seeds` that both came to their end from, and by them:
    by how much the best one's mean is `lower`, and if there are two or more, `at_least` and
    `at_most` what the spread between them allows with 95% certainty. Runs that are finished are not
    run again.
    """
    folders = {"best": f"best-{best}", "recipe": "recipe"}
    places = {
        (name, seed): f"{folder}/confirm/{folders[name]}-seed{seed}"
        for name in NAMES
        for seed in range(1, seeds + 1)
    }
    configs = {
        run: config(name, run, seed)
        for (name, seed), run in places.items()
        if not read_history(run, goal=False).done
    }
    if configs:
        progress.say(f"the best recipe and the one before, from {seeds} seeds each")
        run_all(configs, folder, progress, name="confirm/tune", parallel=parallel)
    histories = {place: read_history(run, goal=False) for place, run in places.items()}
    errors = {
        name: {s: one.top1_error for (of, s), one in histories.items() if of == name and one.done}
        for name in NAMES
    }
    found: dict[str, Any] = {name: list(of.values()) for name, of in errors.items()}
    if both := [seed for seed in errors["best"] if seed in errors["recipe"]]:
        figures = interval(*([errors[name][seed] for seed in both] for name in NAMES))
        named = zip(("lower", "at_least", "at_most"), figures, strict=True)
        found |= {"seeds": both}
        found |= {name: figure for name, figure in named if math.isfinite(figure)}
    return found
