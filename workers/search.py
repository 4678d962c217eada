"""`towers tune`: a search for the best settings, each trial a run of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from datasets.shards import open_dataset
from datasets.storage import storage, write_whole
from workers.cluster import connected
from workers.config import NOWHERE, Config, UserError, configure
from workers.confirm import confirm
from workers.errors import RunFailed
from workers.output import alone, writing
from workers.placement import side_by_side
from workers.progress import Progress
from workers.room import cluster_nodes, place
from workers.search_page import search_page
from workers.space import CHANGEABLE, Domain, Space, published
from workers.trials import Plan, Trial, prepare_data, run_trials

SEARCH, TRIALS, BEST, REPORT = "search.json", "trials.jsonl", "best.toml", "report.html"
REDUCTION = 3  # of the trials that come to a rung of ASHA, one in so many goes on

Algorithm = Literal["random", "optuna", "pbt"]


class Population(PopulationBasedTraining):
    """Population-based training that leaves a trial alone which is `done`: of another's weights at
    their end it would train nothing, and pass their error off as that of its own settings. And it
    judges nobody until all have been measured, at the start and once a search is resumed.
    """

    def __init__(self, done: Callable[[dict[str, Any], dict[str, Any]], bool], **given: Any):
        super().__init__(**given)
        self.done = done

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "why" not in result and self.done(trial.config, result):
            return self.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def _quantiles(self) -> tuple[list[Any], list[Any]]:
        living = [s for trial, s in self._trial_state.items() if not trial.is_finished()]
        return super()._quantiles() if all(s.last_score is not None for s in living) else ([], [])


@dataclass(frozen=True)
class Search:
    """What is searched and how; kept in the search's folder, from which it can be resumed.

    `fixed` are settings of every trial, `space` the domains of the others; `confirm` from how many
    seeds the best recipe and the one as it was are trained again. Raises UserError for
    what cannot be.
    """

    fixed: dict[str, Any]
    space: Space
    trials: int = 20
    algorithm: Algorithm = "random"
    early: bool = True
    minutes: float | None = None
    parallel: int | None = None
    confirm: int | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "minutes", "parallel", "confirm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}: more than 0")
        if self.algorithm == "pbt" and not self.changed:
            raise UserError(f"pbt changes settings of runs that go on: {', '.join(CHANGEABLE)}")

    @property
    def changed(self) -> Space:
        """The settings that population-based training changes on the way."""
        return {name: domain for name, domain in self.space.items() if name in CHANGEABLE}

    def config(self, settings: dict[str, Any], run: str) -> Config:
        """The configuration of a run with some settings of the space."""
        rounded = _rounded(settings, self.space)
        return configure({**self.fixed, **rounded, "run": run})

    def nearest(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, those outside the space brought to its edge."""
        return {name: self.space[name].nearest(value) for name, value in settings.items()}

    def done(self, settings: dict[str, Any], report: dict[str, Any]) -> bool:
        """Whether a trial with these settings has nothing left to train."""
        base = self.config({}, NOWHERE)
        epochs, steps = (settings.get(name, getattr(base, name)) for name in ("epochs", "steps"))
        return report["epoch"] >= epochs or (steps is not None and report["step"] >= steps)

    def plan(self, parallel: int) -> Plan:
        """The trials of it: the first has the recipe's own settings, if the space has them. Those
        of pbt run all at once: who is not there cannot be compared with or take weights over.
        """
        base = self.config({}, NOWHERE)
        epochs = int(max(self.space["epochs"].ends)) if "epochs" in self.space else base.epochs
        own = published(base, self.space)
        # What is unset has no one value where layers have their own.
        first = [own] if None not in own.values() and own == self.nearest(own) else []
        space = {name: _drawn(domain) for name, domain in self.space.items()}
        scheduler: Any = None
        if self.algorithm == "pbt":
            parallel = self.trials
            scheduler = Population(
                self.done,
                time_attr="epoch",
                perturbation_interval=max(1, epochs // 10),
                hyperparam_mutations={
                    name: list(domain.choices) or space[name]  # of a list it takes a neighbour
                    for name, domain in self.changed.items()
                },
                custom_explore_fn=self.nearest,
            )
        elif self.early:
            # One more than there are, so that a run which comes to its end does so by itself.
            most = epochs + 1
            scheduler = ASHAScheduler("epoch", max_t=most, reduction_factor=REDUCTION)
        searcher: Any = None
        if self.algorithm == "optuna":
            searcher = OptunaSearch(seed=base.seed, points_to_evaluate=first)
        else:
            searcher = BasicVariantGenerator(
                points_to_evaluate=first, max_concurrent=parallel, random_state=base.seed
            )
        return Plan(space, parallel, self.trials, searcher, scheduler, self.minutes)


def search(folder: str, wanted: Search | None, progress: Progress | None = None) -> dict[str, Any]:
    """Searches in `folder`, a path or URL, or goes on with the search there if none is `wanted`.

    Returns the keys of `towers tune --json`. Raises UserError and DataError for what the user can
    mend, RunFailed if no trial came to an evaluation.
    """
    progress = progress or Progress()
    resume = wanted is None
    todo = wanted or _kept(folder)
    if wanted:
        _check_new(folder)
        if todo.fixed.get("shards"):
            open_dataset(todo.fixed["shards"])  # before anything is made or started
    with connected():
        config = todo.config({}, folder)
        parallel = min(todo.parallel or side_by_side(cluster_nodes(), [config]), todo.trials)
        plan = todo.plan(parallel)
        place(config, progress.say, plan.parallel)  # or the cluster is too small for it
        if wanted:
            _check_new(folder)  # another may have begun meanwhile
            _keep(folder, wanted)
        with alone(folder):
            shards = prepare_data([config], folder, progress)
            shared = replace(todo, fixed={**todo.fixed, "shards": shards})
            make = partial(_config, shared, folder)
            begun = time.time()
            trials = run_trials(make, plan, folder, progress, resume=resume)
            lines = [_line(todo, trial) for trial in trials]
            best = _best(lines)
            confirmed = None
            if todo.confirm:
                again = partial(_again, shared, best["settings"])
                confirmed = confirm(again, folder, best["trial"], todo.confirm, parallel, progress)
            return _written(folder, todo, lines, best, confirmed, time.time() - begun)


def _again(wanted: Search, best: dict[str, Any], name: str, run: str, seed: int) -> Config:
    seeded = {**wanted.fixed, "seed": wanted.fixed.get("seed", 0) + seed}
    return replace(wanted, fixed=seeded).config(best if name == "best" else {}, run)


def _config(wanted: Search, folder: str, settings: dict[str, Any], name: str) -> Config:
    return wanted.config(settings, f"{folder}/trials/{name}")


def _best(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The best trial of those that came to their end, of all that were evaluated if none did."""
    reached = [line for line in lines if line["state"] == "finished"]
    reached = reached or [line for line in lines if line["state"] == "ended early"]
    if not reached:
        why = next((f"all failed: {line['why']}" for line in lines), "give it more --minutes")
        raise RunFailed(f"no trial came to an evaluation; {why}")
    return min(reached, key=lambda line: line["top1_error"])


def _written(
    folder: str,
    wanted: Search,
    lines: list[dict[str, Any]],
    best: dict[str, Any],
    confirmed: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """The result, once its files are written."""
    own = _rounded(published(wanted.config({}, folder), wanted.space), wanted.space)
    recipe = next((line for line in lines if line["settings"] == own), None)
    result = {
        "run": folder,
        "trials": len(lines),
        "finished": sum(line["state"] == "finished" for line in lines),
        "failed": sum(line["state"] == "failed" for line in lines),
        "seconds": round(seconds, 1),
        "best": best,
        "recipe": recipe,
        "confirmed": confirmed,
        "config": f"{folder}/{BEST}",
        "report": f"{folder}/{REPORT}",
    }
    fs, path = storage(folder)
    config = wanted.config(best["settings"], folder)
    text = "".join(
        line + "\n" for line in config.to_toml().splitlines() if not line.startswith("run =")
    )
    page = search_page(result, lines, wanted.space, text)
    written = "".join(json.dumps(line) + "\n" for line in lines)
    for name, data in ((BEST, text), (TRIALS, written), (REPORT, page)):
        write_whole(fs, f"{path}/{name}", data.encode())
    return result


def _line(wanted: Search, trial: Trial) -> dict[str, Any]:
    settings = _rounded(trial.settings, wanted.space)
    state = "failed"
    if not trial.failed:
        state = "finished" if wanted.done(settings, trial.report) else "ended early"
    names = ("run", "epoch", "step", "loss", "top1_error", "top5_error", "train_error")
    report = {name: trial.report.get(name) for name in names}
    return {
        "trial": trial.name,
        "state": state,
        "settings": settings,
        **report,
        "seconds": round(trial.report.get("time_total_s", 0.0), 1),
        "why": trial.failed,
    }


def _rounded(settings: dict[str, Any], space: Space) -> dict[str, Any]:
    """Three digits say all that a search can tell, if they are not beyond what is allowed."""

    def short(name: str, value: Any) -> Any:
        if not isinstance(value, float):
            return value
        three, domain = float(f"{value:.3g}"), space.get(name)
        return value if domain and domain.nearest(three) != three else three

    return {name: short(name, value) for name, value in settings.items()}


def _drawn(domain: Domain) -> Any:
    """A domain as Tune has it."""
    if domain.choices:
        return tune.choice(list(domain.choices))
    if domain.whole:
        draw = tune.lograndint if domain.log else tune.randint
        return draw(int(domain.low), int(domain.high) + 1)
    return (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)


def _check_new(folder: str) -> None:
    fs, path = storage(folder)
    if fs.exists(f"{path}/{SEARCH}"):
        raise UserError(f"{folder} already holds a search: --resume it, or name another")


def _keep(folder: str, wanted: Search) -> None:
    fs, path = storage(folder)
    with writing(folder):
        fs.makedirs(path, exist_ok=True)
        write_whole(fs, f"{path}/{SEARCH}", (json.dumps(asdict(wanted), indent=1) + "\n").encode())


def _kept(folder: str) -> Search:
    fs, path = storage(folder)
    if not fs.exists(f"{path}/{SEARCH}"):
        raise UserError(f"{folder}: no search to resume")
    try:
        values = json.loads(fs.cat_file(f"{path}/{SEARCH}"))
        values["space"] = {n: Domain(**_tuples(d)) for n, d in values["space"].items()}
        values["fixed"] = _tuples(values["fixed"])
        found = Search(**{f.name: values[f.name] for f in fields(Search)})
        if type(found.trials) is not int or found.algorithm not in get_args(Algorithm):
            raise ValueError(f"{found.trials} trials by {found.algorithm}")
        for name, domain in found.space.items():
            for value in domain.ends:
                found.config({name: value}, folder)
        return found
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}/{SEARCH}: damaged ({error}); search anew elsewhere") from None


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _tuples(v) for name, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
