"""Search spaces: the default one fits every network, and each mistake is one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers.pbt import _explore

from pipeline.recipes import RECIPES
from workers.cli import main, parser
from workers.commands.search import NOWHERE, _fixed
from workers.config import configure
from workers.search import Search, _again, _best, _drawn, _rounded
from workers.search_page import _marks
from workers.space import CHANGEABLE, Domain, published, read_space


@pytest.mark.parametrize("network", RECIPES)
def test_the_default_space_holds_the_recipes_own_settings(network: str) -> None:
    space, left = read_space("", {"network": network})
    own = published(configure({"network": network}), space)
    assert left == (["dropout"] if network == "cifar" else [])
    assert {"rate", "momentum", "decay", "batch", "lrn_k", "init_scale", "colour"} <= set(own)
    outside = [name for name, value in own.items() if space[name].nearest(value) != value]
    assert outside == []
    assert set(CHANGEABLE) & set(space)


def test_a_space_of_what_the_recipe_leaves_to_the_network() -> None:
    fixed = {"network": "cifar", "image": 36}
    for space, first in (
        ({"crop": Domain(low=28, high=36, whole=True)}, [{"crop": 32}]),
        ({"crop": Domain(choices=(28, 32))}, [{"crop": 32}]),
        ({"init_std": Domain(low=0.01, high=0.1)}, []),  # each layer has its own
    ):
        searcher = Search(fixed, space, algorithm="random").plan(1).searcher
        assert searcher._points_to_evaluate == first


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ('schedule = "steps"\ndrops = [4.0, 4.75]\nepochs = 5', ["--epochs", "10"]),
        ('schedule = "steps"\ndrops = [4.0, 4.75]', ["--schedule", "plateau"]),
        ("lrn_alpha = 0.2", ["--no-lrn"]),
        ('schedule = "plateau"\ndrops = [1.0]', []),
        ('init = "weights.pt"', []),
    ],
)
def test_a_search_takes_options_over_a_file_as_a_training_does(
    text: str, options: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f'network = "cifar"\n{text}\n')
    args = parser().parse_args(["tune", "--config", f"{file}", *options])
    asked = {n: getattr(args, n) for n in ("epochs", "schedule", "lrn") if hasattr(args, n)}
    alone = configure({**asked, "run": NOWHERE}, f"{file}")
    assert configure({**_fixed(args), "run": NOWHERE}) == alone


def test_marks_of_whole_numbers_are_whole() -> None:
    marks = _marks(Domain(low=256, high=4096, log=True, whole=True))
    assert (marks[0], marks[-1]) == (256, 4096)
    assert {type(mark) for mark in marks} == {int}
    assert _marks(Domain(low=1, high=3, whole=True)) == [1, 2, 3]


def test_what_is_fixed_is_left_out_of_the_default_space() -> None:
    space, left = read_space("", {"network": "alexnet", "rate": 0.1})
    assert left == ["rate"]
    assert "rate" not in space


def test_values_outside_a_domain_go_to_its_edge() -> None:
    assert Domain(low=0.1, high=0.5).nearest(0.7) == 0.5
    assert Domain(low=0.1, high=0.5).nearest(0.2) == 0.2
    assert Domain(choices=(3, 5)).nearest(4) == 3


def test_a_domain_is_drawn_from_as_it_says() -> None:
    whole = _drawn(Domain(low=1, high=2, whole=True))
    assert {whole.sample() for _ in range(60)} == {1, 2}
    even, logarithmic = (_drawn(Domain(low=1e-6, high=1.0, log=log)) for log in (False, True))
    assert 0.3 < np.median([even.sample() for _ in range(200)]) < 0.7
    assert 1e-4 < np.median([logarithmic.sample() for _ in range(200)]) < 1e-2


def test_a_range_of_a_number_with_a_fraction_may_be_given_in_whole_ones(tmp_path: Path) -> None:
    """Tune's population-based training would round all that comes of whole ends."""
    (tmp_path / "s.toml").write_text("lrn_k = { low = 1, high = 4 }\nbatch = { low = 8, high = 9 }")
    space, _ = read_space(f"{tmp_path}/s.toml", {"network": "alexnet"})
    assert [type(end) for end in space["lrn_k"].ends] == [float, float]
    assert [type(end) for end in space["batch"].ends] == [int, int]


def test_settings_are_rounded_within_what_is_allowed() -> None:
    space = {"momentum": Domain(low=0.8, high=0.9999), "batch": Domain(choices=(32, 64))}
    given = {"momentum": 0.99987, "batch": 64}
    assert _rounded(given, space) == given
    assert _rounded({"momentum": 0.87654}, space) == {"momentum": 0.877}
    space = {"rate": Domain(choices=(0.01234,))}
    assert _rounded({"rate": 0.01234, "decay": 0.01234}, space) == {
        "rate": 0.01234,
        "decay": 0.0123,
    }


def test_the_best_trial_is_of_those_that_came_to_their_end_if_any_did() -> None:
    finished = {"state": "finished", "top1_error": 0.3}
    worse = {"state": "finished", "top1_error": 0.4}
    early = {"state": "ended early", "top1_error": 0.2}
    assert _best([worse, early, finished]) is finished
    assert _best([{"state": "failed", "top1_error": 0.1}, early]) is early


def test_the_best_and_the_recipe_are_confirmed_from_seeds_that_the_search_had_not() -> None:
    wanted = Search({"network": "cifar", "seed": 5}, {"rate": Domain(low=0.001, high=0.1)})
    best, recipe = (_again(wanted, {"rate": 0.02}, name, "r", 2) for name in ("best", "recipe"))
    assert (best.rate, recipe.rate) == (0.02, RECIPES["cifar"]()["rate"])
    assert best.seed == recipe.seed == 5 + 2


def test_bayesian_search_begins_with_the_recipe_and_stays_within_the_space() -> None:
    domains = {"pad": Domain((0, 2, 4, 8)), "rate": Domain((), 0.01, 0.1, True)}
    plan = Search({"network": "cifar"}, domains, algorithm="optuna").plan(2)
    plan.searcher.set_search_properties("top1_error", "min", plan.space)
    recipe, drawn = RECIPES["cifar"](), []
    for number in range(12):
        drawn.append(plan.searcher.suggest(f"{number}"))
        far = abs(drawn[-1]["rate"] - 0.02)
        plan.searcher.on_trial_complete(f"{number}", {"top1_error": 0.3 + far})
    assert drawn[0] == {"pad": recipe["pad"], "rate": recipe["rate"]}
    assert all(0.01 <= one["rate"] <= 0.1 and one["pad"] in (0, 2, 4, 8) for one in drawn)
    assert len({one["rate"] for one in drawn}) > 8


def test_asha_ends_the_worse_ones_early_and_lets_the_better_come_to_their_end() -> None:
    domains = {"rate": Domain((), 0.01, 0.1, True)}
    scheduler = Search({"network": "cifar", "epochs": 9}, domains).plan(2).scheduler
    scheduler.set_search_properties("top1_error", "min")
    controller: Any = SimpleNamespace()
    decided: dict[float, list[str]] = {}
    for error in (0.2, 0.3, 0.4, 0.5):
        trial = Trial("towers", config={}, stub=True)
        scheduler.on_trial_add(controller, trial)
        decided[error] = []
        for epoch in range(1, 10):
            line = {"epoch": epoch, "top1_error": error}
            decided[error].append(scheduler.on_trial_result(controller, trial, line))
            if decided[error][-1] == scheduler.STOP:
                break
    assert decided[0.2] == [scheduler.CONTINUE] * 9
    assert decided[0.5][-1] == scheduler.STOP
    assert len(decided[0.5]) < 9


def test_a_population_changes_settings_a_little_and_leaves_alone_who_is_done() -> None:
    fixed = {"network": "cifar", "epochs": 3, "steps": 20}
    domains = {"pad": Domain((0, 2, 4, 8)), "rate": Domain((), 0.01, 0.1, True)}
    scheduler = Search(fixed, domains, algorithm="pbt").plan(2).scheduler
    scheduler.set_search_properties("top1_error", "min")
    settings = {"pad": 4, "rate": 0.05}
    draws = [
        _explore(
            settings,
            scheduler._hyperparam_mutations,
            0.0,  # never drawn anew
            scheduler._perturbation_factors,
            scheduler._custom_explore_fn,
        )[0]
        for _ in range(50)
    ]
    assert {draw["pad"] for draw in draws} == {2, 8}
    assert {round(draw["rate"], 3) for draw in draws} == {0.04, 0.06}

    trial = Trial("towers", config=settings, stub=True)
    controller = SimpleNamespace(search_alg=None, get_trials=list)
    scheduler.on_trial_add(controller, trial)
    report = {"epoch": 3, "step": 15, "top1_error": 0.5}
    for last in (report, {**report, "epoch": 2, "step": 20}):
        assert scheduler.on_trial_result(controller, trial, last) == scheduler.CONTINUE
    assert scheduler._trial_state[trial].last_score is None
    others = [Trial("towers", config=settings, stub=True) for _ in range(3)]
    for other in others:
        scheduler.on_trial_add(controller, other)
    for error, other in enumerate([trial, *others]):
        assert scheduler._quantiles() == ([], [])  # who is not measured may be the worst
        scheduler._trial_state[other].last_perturbation_time = 0
        line = {**report, "epoch": 1, "top1_error": 0.5 + error / 10}
        scheduler.on_trial_result(controller, other, line)
    assert scheduler._trial_state[trial].last_score == -0.5
    assert scheduler._quantiles() == ([others[-1]], [trial])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("rat = { low = 1, high = 2 }", [], "space.toml: unknown setting 'rat'"),
        ("network = { choices = ['cifar'] }", [], "unknown setting 'network'"),
        ("rate = 0.1", [], "rate is 0.1: { low = L, high = H }, or { choices = [A, B] }"),
        ("rate = { low = 0.1 }", [], "{ low = L, high = H }"),
        ("rate = { low = 0.1, high = 'x' }", [], "{ low = L, high = H }"),
        ("rate = { choices = [] }", [], "{ choices = [A, B] }"),
        ("rate = { low = 0.2, high = 0.1 }", [], "from 0.2 to 0.1: low has to be less"),
        ("decay = { low = 0, high = 0.1, log = true }", [], "with log, low has to be more than 0"),
        ("momentum = { low = 0.5, high = 1.5 }", [], "momentum is 1.5: at least 0 and less than 1"),
        ("batch = { low = 0.5, high = 8.0 }", [], "batch has 0.5: a value of type int is wanted"),
        ("dropout = { low = 0.1, high = 0.5 }", [], "cifar has no layer with dropout"),
        ("rate = { low = 0.1, high = 0.5 }", ["--rate", "0.1"], "rate is searched, and fixed as"),
        ("", [], "space.toml: nothing to search"),
        ("rate = ", [], "space.toml: not TOML"),
        ("rate = { low = 0.1, high = 0.5 }", ["--trials", "0"], "trials is 0: more than 0"),
        ("batch = { choices = [8] }", ["--algorithm", "pbt"], "pbt changes settings of runs"),
        (
            "rate = { low = 0.1, high = 0.5 }",
            ["--algorithm", "pbt", "--scheduler", "asha"],
            "--scheduler has no effect with pbt",
        ),
        (
            "rate = { low = 0.1, high = 0.5 }",
            ["--algorithm", "pbt", "--parallel", "2"],
            "--parallel has no effect with pbt, whose --trials run all at once",
        ),
        ("rate = { low = 0.1, high = 0.5 }", ["--resume"], "--resume needs --run RUN"),
        ("", ["--resume", "--run", "runs/none"], "network has no effect with --resume"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    text: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.toml").write_text(text)
    assert main(["tune", "--network", "cifar", "--space", "space.toml", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("towers: ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()
