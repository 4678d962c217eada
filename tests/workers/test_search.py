"""Searches and experiments on real runs side by side, on two cores."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from workers.claims import ARMS
from workers.cli import main
from workers.config import Config, UserError, configure
from workers.confirm import confirm
from workers.errors import RunFailed
from workers.experiments import claims
from workers.history import read_history
from workers.lab import ArmRun, Lab, Scale
from workers.output import alone
from workers.progress import Progress
from workers.run import CONFIG, EVENTS, read_lines
from workers.search import Search, _line, search
from workers.search_page import _table
from workers.space import Domain
from workers.trial import Reporter
from workers.trials import Trial

pytestmark = [pytest.mark.own_ray, pytest.mark.usefixtures("two_cores")]
SMALL = {"network": "cifar", "batch": 64, "epochs": 2, "images": 100}


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    """What `make train` needs too; two trials have to fit there side by side."""
    if ray.is_initialized():
        ray.shutdown()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Interrupted(Exception):
    """Somebody has seen enough."""


@pytest.fixture(scope="module")
def found(
    shards: str,
    tmp_path_factory: pytest.TempPathFactory,
    processes: Callable[[str], list[int]],
    kill_own: Callable[[str], None],
) -> dict[str, Any]:
    """A search both of whose trials were killed, which was then broken off, and resumed."""
    folder = str(tmp_path_factory.mktemp("searches") / "one")
    said: list[str] = []

    class Killer(Progress):
        killed = 0

        def say(self, text: str) -> None:
            said.append(text)
            if "epoch 1" in text and not self.killed:
                self.killed = len(processes("ray::ImplicitFunc"))
                kill_own("ray::ImplicitFunc")
            if "broke off: it goes on" in text:
                raise Interrupted

    class Listener(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    space = {
        "rate": Domain(low=0.001, high=0.1, log=True),
        "lrn_size": Domain(choices=(3, 5)),
        "decay": Domain(low=0.0, high=2.0),
    }
    wanted = Search({**SMALL, "shards": shards}, space, trials=2, early=False)
    killer = Killer()
    with pytest.raises(RunFailed, match=r"Ray Tune ended: .*Interrupted"):
        search(folder, wanted, killer)
    result = search(folder, None, Listener())
    return {**result, "said": said, "killed": killer.killed}


def test_a_search_goes_on_where_it_was_broken_off(found: dict[str, Any]) -> None:
    assert any("trials restored" in line or "had begun" in line for line in found["said"])
    assert (found["trials"], found["finished"], found["failed"]) == (2, 2, 0)


def test_the_first_trial_is_the_recipe_and_the_best_one_is_kept(found: dict[str, Any]) -> None:
    trials = read_lines(found["run"], "trials.jsonl")
    assert len(trials) == 2
    assert found["recipe"]["settings"] == {"rate": 0.03, "lrn_size": 5, "decay": 0.001}
    assert found["best"] in trials
    assert found["best"]["top1_error"] == min(trial["top1_error"] for trial in trials)
    text = Path(found["config"]).read_text()
    assert "run" not in tomllib.loads(text)
    best = configure({"run": found["best"]["run"]}, found["config"])
    assert best == configure({}, f"{found['best']['run']}/config.toml")
    assert {name: getattr(best, name) for name in found["best"]["settings"]} == (
        found["best"]["settings"]
    )


def test_the_best_recipe_is_compared_from_other_seeds(
    found: dict[str, Any], tmp_path: Path
) -> None:
    trials = sorted(Path(found["run"], "trials").iterdir())
    for name, trial in zip(("best-a", "recipe"), trials, strict=True):
        shutil.copytree(trial, tmp_path / f"confirm/{name}-seed1")
    confirmed = confirm(no_config, str(tmp_path), "a", 1, 2, Progress())
    best, recipe = (read_history(str(trial), goal=False).top1_error for trial in trials)
    errors = {"best": [best], "recipe": [recipe]}
    assert confirmed == {**errors, "seeds": [1], "lower": recipe - best}


def no_config(name: str, run: str, seed: int) -> Config:
    raise AssertionError(f"{run} is run again")


def test_runs_are_compared_from_the_seeds_that_both_ended_from(tmp_path: Path) -> None:
    for name, seed, error in (
        *(("best-a", 1, 0.3), ("best-a", 2, 0.2), ("best-a", 4, 0.4)),
        *(("recipe", 1, 0.5), ("recipe", 3, 0.9), ("recipe", 4, 0.5)),
        ("best-b", 2, 0.1),  # of another search's end
    ):
        run = tmp_path / f"confirm/{name}-seed{seed}"
        run.mkdir(parents=True)
        (run / EVENTS).write_text(
            json.dumps({"time": 1, "event": "end", "top1_error": error}) + "\n"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.confirm.run_all", lambda *args, **named: {})  # they fail
        found = confirm(lambda *_: configure({}), f"{tmp_path}", "a", 4, 2, Progress())
    assert (found["best"], found["recipe"]) == ([0.3, 0.2, 0.4], [0.5, 0.9, 0.5])
    assert found["seeds"] == [1, 4]
    assert found["lower"] == pytest.approx(0.15)


def test_two_runs_are_side_by_side_and_share_the_fleet(found: dict[str, Any]) -> None:
    assert found["killed"] == 2  # there at once when the first had come to an evaluation
    for place in Path(found["run"], "trials").iterdir():
        fleets = [e for e in read_lines(str(place), EVENTS) if e["event"] == "fleet"]
        assert {2} <= {fleet["augmenters"] for fleet in fleets} <= {0, 2}


def test_no_room_is_kept(found: dict[str, Any]) -> None:
    groups = ray.util.placement_group_table().values()
    assert groups
    assert {group["state"] for group in groups} == {"REMOVED"}


def test_the_page_has_a_line_a_trial(found: dict[str, Any]) -> None:
    page = Path(found["report"]).read_text()
    assert page.count("<polyline") == 2
    assert page.count("stroke-dasharray") == 1  # the recipe
    for axis in ("rate", "lrn_size", "decay", "top-1 error"):
        assert f"{axis}</text>" in page
    assert f"{found['best']['top1_error']:.2%}" in page


def test_the_page_has_trials_that_failed_before_and_after_a_report(found: dict[str, Any]) -> None:
    space = {"rate": Domain(low=0.001, high=1.0)}
    line = {"trial": "a", "top1_error": 0.25, "top5_error": 0.1, "epoch": 3, "state": "done"}
    line |= {"settings": dict.fromkeys(space, 1.0), "why": ""}
    failed = {**line, "state": "failed", "why": "no room"}
    rows = _table([{**failed, "top1_error": None}, failed, line], space)
    assert rows.count("no room") == 2
    assert rows.index("25.00%") < rows.index("no room")


@pytest.mark.parametrize(
    ("fixed", "epoch", "step", "state"),
    [
        ({"epochs": 9}, 9, 900, "finished"),
        ({"epochs": 9}, 8, 800, "ended early"),
        ({"epochs": 9, "steps": 150}, 2, 150, "finished"),
        ({"epochs": 9, "steps": 150}, 1, 100, "ended early"),
    ],
)
def test_a_trial_is_finished_at_its_last_epoch_or_step(
    fixed: dict[str, Any], epoch: int, step: int, state: str
) -> None:
    trial = Trial("a", {"rate": 0.1}, {"epoch": epoch, "step": step}, "")
    assert _line(Search(fixed, {}), trial)["state"] == state


def test_a_folder_that_holds_a_search_is_left_alone(
    found: dict[str, Any], shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        ([shards, "--run", found["run"]], "already holds a search: --resume it"),
        (["--resume", "--run", f"{tmp_path}"], "no search to resume"),
    ):
        assert main(["tune", *options]) == 2
        assert message in capsys.readouterr().err


def test_a_claim_is_judged_by_runs_that_are_not_run_again(
    found: dict[str, Any], shards: str, tmp_path: Path
) -> None:
    folder, said = str(tmp_path / "claims"), list[str]()
    base = f"{folder}/runs/pooling-3-2-seed0"
    shutil.copytree(found["best"]["run"], base)

    class Listener(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    scale = Scale(shards, scale=0.1, images=100)
    with pytest.raises(UserError, match=r"-seed0 was trained with \w+ .*, and the claim has"):
        claims(folder, ["pooling"], scale, seeds=1)
    config = Lab(folder, scale, 1, None, Progress()).config(ArmRun(ARMS["pooling-3-2"], 0))
    Path(base, CONFIG).write_text(config.to_toml())  # as if it had been trained so
    first = claims(folder, ["pooling"], scale, seeds=1, progress=Listener())
    assert "to run: 1" in said
    (line,) = first["claims"]
    assert line["verdict"] == "cannot show at this scale"  # one seed has no spread
    history = read_history(f"{folder}/runs/pooling-2-2-seed0", goal=False)
    assert history.done
    assert line["arms"] == {
        "pooling-3-2": [read_history(base, goal=False).top1_error],
        "pooling-2-2": [history.top1_error],
    }
    said.clear()
    assert claims(folder, ["pooling"], scale, seeds=1, progress=Listener())["claims"] == [line]
    assert not any("to run" in text for text in said)
    with (
        alone(folder),
        pytest.raises(UserError, match="claims: another process works there"),
    ):
        claims(folder, ["pooling"], scale, seeds=1)
    assert Path(first["report"]).read_text().count("<circle") == 2


def test_an_evaluation_is_told_once_its_own_checkpoint_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint may take longer than the next epoch."""
    told: list[tuple[int, int, float | None]] = []

    def report(line: dict[str, Any], checkpoint: Any) -> None:
        told.append((line["epoch"], line["step"], line["train_error"]))

    monkeypatch.setattr("workers.trial.tune.report", report)
    reporter = Reporter(configure({"network": "alexnet-mini", "run": "memory://told"}))
    measured = {"loss": 1.0, "top1_error": 0.5, "top5_error": 0.1, "images": 50}

    def evaluated(epoch: int, wrong: float) -> None:
        reporter.training.append((10.0, wrong))
        reporter.evaluation({"epoch": epoch, "step": 3 * epoch + 3, **measured})

    evaluated(0, 10.0)
    evaluated(1, 9.0)
    evaluated(1, 5.0)  # again, as a tower was lost with the first one's weights
    for step, count in (3, 1), (3, 1), (6, 2):
        reporter.checkpointed(step)
        assert told == [(1, 3, 1.0), (2, 6, 0.5)][:count]
    evaluated(1, 5.0)
    reporter.checkpointed(6)
    assert len(told) == 2
    evaluated(2, 4.0)
    reporter.ended({"steps": 9, "epochs": 3.0, **measured})
    assert told[2:] == [(3, 9, 0.4)]
