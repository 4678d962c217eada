"""The claims' table, the counts, and the rule that judges by the spread between seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.network import build
from workers.claims import ARMS, CLAIMS, REFUTED, SUPPORTED, T95, UNSHOWN, WEAKER, judge
from workers.claims_page import claims_page, told
from workers.cli import main
from workers.config import configure
from workers.counts import COUNTS
from workers.experiments import _on, _trained_line
from workers.history import History, read_history
from workers.lab import ArmRun, Lab, Scale
from workers.progress import Progress

POOLING, RELU = CLAIMS["pooling"], CLAIMS["relu"]


def test_counts_are_of_the_network_and_the_augmentation() -> None:
    found = {name: count() for name, count in COUNTS.items()}
    assert found["parameters"].ours == 60_965_224
    assert found["multiply-adds"].ours == 724_406_816
    assert found["layers"].ours == 8
    assert found["neurons"].ours == 659_272
    assert found["crops-2048"].ours == 33 * 33 * 2
    verdicts = [count.verdict for count in found.values()]
    # One place more fits each way than the paper counts.
    assert verdicts == [SUPPORTED, "counted", SUPPORTED, SUPPORTED, "counted"]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe(arm: str) -> None:
    assert configure(ARMS[arm].settings).network in ("cifar", "alexnet-mini")


def test_every_arm_is_of_a_claim_and_every_claim_of_arms() -> None:
    used = {arm for claim in CLAIMS.values() for arm in claim.arms}
    assert used == set(ARMS)
    assert all(claim.better in ARMS and claim.worse in ARMS for claim in CLAIMS.values())


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([0.30, 0.31, 0.32], [0.35, 0.36, 0.35], SUPPORTED),
        ([0.30, 0.31, 0.32], [0.31, 0.32, 0.31], UNSHOWN),
        ([0.35, 0.36, 0.35], [0.30, 0.31, 0.32], REFUTED),
        ([0.30], [0.90], UNSHOWN),  # without a spread nothing is known
        ([], [0.3, 0.4], UNSHOWN),
    ],
)
def test_a_difference_has_to_exceed_the_spread(
    better: list[float], worse: list[float], verdict: str
) -> None:
    assert judge(POOLING, better, worse).verdict == verdict


def test_the_interval_is_students() -> None:
    # By hand: differences of .05, .04 and .03, their deviation .01, 2 degrees of freedom.
    finding = judge(POOLING, [0.30, 0.31, 0.32], [0.35, 0.35, 0.35])
    assert finding.figure == pytest.approx(0.04)
    assert finding.high - finding.figure == pytest.approx(4.30 * 0.01 / 3**0.5)
    # Runs of one seed are alike: they differ by .01 each time, whatever the seeds differ by.
    assert judge(POOLING, [0.2, 0.5, 0.8], [0.21, 0.51, 0.811]).verdict == SUPPORTED
    # But errors are counts: that a few differ by the very same tells nothing of the spread.
    assert judge(POOLING, [0.2, 0.5, 0.8], [0.21, 0.51, 0.81]).verdict == UNSHOWN
    # Several networks averaged are one figure against those of each.
    alone = judge(CLAIMS["averaging"], [0.20], [0.30, 0.31, 0.32])
    assert alone.high - alone.figure == pytest.approx(4.30 * 0.01 * (1 + 1 / 3) ** 0.5)


@pytest.mark.parametrize("freedom", range(1, len(T95) + 1))
def test_students_t_leaves_one_in_twenty_outside(freedom: int) -> None:
    n, t = freedom, T95[freedom - 1]
    x = np.linspace(-t, t, 20_001)
    scale = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
    inside = np.trapezoid(scale * (1 + x**2 / n) ** (-(n + 1) / 2), x)
    assert inside == pytest.approx(0.95, abs=6e-4)  # the table is rounded


def write_run(folder: Path, lines: list[tuple[float, int, float, float]], *events: Any) -> None:
    """Files of a run that trained on 1000 images a second, of lines of time, step, seconds and
    error; it starts at step 0, and `events` follow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = {"event": "start", "step": 0, "time": 0}
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in (start, *events)))
    with open(folder / "metrics.jsonl", "w") as file:
        for time, step, seconds, error in lines:
            line = {"split": "train", "time": time, "step": step, "seconds": seconds}
            line |= {"images_per_second": 1000.0, "top1_error": error}
            line |= {"loss": 1.0, "top5_error": error}
            file.write(json.dumps(line) + "\n")


END = {"event": "end", "time": 90, "top1_error": 0.5}


def test_a_history_has_what_was_done_again_once(tmp_path: Path) -> None:
    """A run that lost a process after step 30, and went on from 15."""
    lines = [(10, 10, 1.0), (20, 20, 1.0), (30, 30, 1.0), (60, 27, 1.2), (70, 39, 1.2)]
    again = {"event": "start", "step": 15, "time": 40}
    write_run(tmp_path, [(*line, 0.5) for line in lines], again, END)
    history = read_history(f"{tmp_path}", goal=False)
    assert [at for at, _ in history.curve] == [10, 27, 39]
    assert history.step_seconds == pytest.approx(0.1)


def test_the_goal_is_reached_by_the_mean_of_a_whole_window(tmp_path: Path) -> None:
    """Of three lines: the first is good by luck, the fourth is so alone."""
    errors = [(10, 0.1), (20, 0.3), (30, 0.5), (40, 0.1), (50, 0.1)]
    write_run(tmp_path, [(step, step, 1.0, error) for step, error in errors])
    history = read_history(f"{tmp_path}", goal=True)
    assert [error for _, error in history.curve] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.7 / 3])
    assert (history.reached, history.done) == (50, True)
    assert not read_history(f"{tmp_path}", goal=False).done


def test_the_rate_is_taken_that_came_to_the_goal_first_or_else_nearest(tmp_path: Path) -> None:
    def best(arm: str, *errors: list[float]) -> int:
        """The number of the best rate, by the errors in training of each; held-out images have
        an error that falls with the rate's number.
        """
        rates = ARMS[arm].rates
        for n, (rate, each) in enumerate(zip(rates, errors, strict=True)):
            lines = [(10.0 * n, 10 * n, 3.0, error) for n, error in enumerate(each, 1)]
            end = END | {"top1_error": 0.5 - n / 10}
            write_run(tmp_path / f"runs/{arm}-rate{rate:g}-seed0", lines, end)
        found = Lab(f"{tmp_path}", Scale(), 3, None, Progress()).best_rate(ARMS[arm])
        assert found
        return rates.index(found)

    slow, quick, near, far = [0.5, 0.5, 0.2], [0.5, 0.2, 0.2], [0.5, 0.4, 0.3], [0.5, 0.5, 0.4]
    assert best("relu-scaled", slow, quick, near) == 1
    assert best("relu-scaled", far, far, near) == 2
    assert best("lrn", quick, slow, far) == 2  # of arms that train to their end, by the end


def test_both_poolings_leave_as_many_positions_as_the_papers_do() -> None:
    lab = Lab("memory://pooling", Scale(), 1, None, Progress())
    ours = [lab.config(ArmRun(ARMS[arm], 0)).build(10) for arm in POOLING.arms]
    papers = [build("alexnet", 10, pooling=pooling) for pooling in ("3/2", "2/2")]
    for overlapping, apart in (ours, papers):
        assert overlapping.shapes == apart.shapes


def test_longer_arms_drop_their_rate_later() -> None:
    lab = Lab("memory://longer", Scale(scale=3), 1, None, Progress())
    config = lab.config(ArmRun(ARMS["lrn"], 0, 0.003))
    assert (config.epochs, config.drops) == (30, (24.0, 28.5))


def test_errors_are_measured_by_what_the_claim_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(runs: list[str], *, crops: int = 1, split: str = "", **_: Any) -> dict[str, Any]:
        error = 0.05 if split == "train" else 0.2 if crops == 10 else 0.3
        return {"runs": [{"run": run, "top1_error": error} for run in runs], "top1_error": 0.1}

    monkeypatch.setattr("workers.lab.evaluate", evaluate)
    lab = Lab(f"{tmp_path}", Scale(), 2, None, Progress())
    runs = {
        arm: [
            History(f"runs/{arm}-seed{seed}", True, [(9, 0.5)], 9, None, math.nan, error)
            for seed, error in enumerate((0.2, 0.3))
        ]
        for arm in ("base", "dropout", "no-dropout")
    }

    def values(claim: str) -> dict[str, Any]:
        return lab.measured(CLAIMS[claim], runs)[1]

    gap = pytest.approx([0.2 - 0.05, 0.3 - 0.05])  # over the error on training images
    assert values("dropout") == {"dropout": gap, "no-dropout": gap}
    assert values("ten-crops") == {"ten_crops": [0.2, 0.2], "one_crop": [0.3, 0.3]}
    assert values("averaging") == {"averaged": [0.1], "one_crop": [0.3, 0.3]}


def test_runs_are_compared_by_their_seeds(tmp_path: Path) -> None:
    lab = Lab(f"{tmp_path}", Scale(), 3, None, Progress())

    def told(arm: str, errors: dict[int, float]) -> list[History]:
        runs = {seed: f"{tmp_path}/runs/{arm}-seed{seed}" for seed in errors}
        return [
            History(runs[seed], True, [(9, 0.5)], 9, None, math.nan, error)
            for seed, error in errors.items()
        ]

    # Of one seed a run failed, and one seed's is of no use: the others differ by .01 each.
    runs = {
        "pooling-3-2": told("pooling-3-2", {0: 0.2, 2: 0.5, 3: 0.8}),
        "pooling-2-2": told("pooling-2-2", {0: 0.21, 1: 0.9, 2: 0.51, 3: math.nan}),
    }
    finding, values = lab.measured(POOLING, runs)
    assert finding.figure == pytest.approx(0.01)
    assert values == {"pooling-3-2": [0.2, 0.5, 0.8], "pooling-2-2": [0.21, 0.9, 0.51]}
    assert _on(Scale(), POOLING, runs, {}).endswith("9 steps, 3 seeds")
    # Runs too short to tell how long a step takes.
    half = CLAIMS["towers-time"]
    finding, values = lab.measured(half, {arm: told(arm, {0: 0.5}) for arm in half.arms})
    line = _trained_line(half, finding, values, "here")
    assert (line["ours"], line["value"]) == ("-", None)
    assert "half-column" not in claims_page({"claims": [line]}, {})


def test_a_ratio_has_to_hold_the_papers_factor() -> None:
    relu = [100.0, 110.0, 105.0]
    assert judge(RELU, relu, [600.0, 640.0, 620.0]).verdict == SUPPORTED
    weaker = judge(RELU, relu, [200.0, 210.0, 220.0])
    assert weaker.verdict == WEAKER
    assert weaker.figure == pytest.approx(2, rel=1e-3)
    assert weaker.low < weaker.figure < weaker.high
    never = judge(RELU, relu, [200.0, 200.0, 200.0], worse_reached=False)
    assert (never.verdict, never.bound) == (SUPPORTED, True)
    assert told(RELU, never).startswith("at least 1.9")
    assert judge(RELU, relu, relu, better_reached=False).verdict == UNSHOWN


def test_an_arm_that_did_not_come_to_the_goal_refutes_nothing() -> None:
    slower, faster = [600.0, 610.0, 605.0], [200.0, 210.0, 205.0]
    assert judge(RELU, slower, faster).verdict == REFUTED
    assert judge(RELU, slower, faster, worse_reached=False).verdict == UNSHOWN


def test_counted_claims_need_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "claims")
    assert main(["claims", "--only", "layers", "--only", "neurons", "--run", run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [line["value"] for line in result["claims"]] == [8, 659_272]
    assert "| 8 (3.5) | 8 | counted | supported |" in (tmp_path / "claims/claims.md").read_text()
    assert "659,272" in (tmp_path / "claims/report.html").read_text()
    assert main(["claims", "--only", "parameters", "--run", run]) == 0  # and keeps the others
    kept = json.loads((tmp_path / "claims/claims.json").read_text())["claims"]
    assert [line["claim"] for line in kept] == ["parameters", "layers", "neurons"]
    # Of trained ones those that are of the claim's arms, and the figure.
    line = dict.fromkeys(("says", "paper", "ours", "on", "verdict"), "-")
    line |= {"measure": "top1_error", "value": 0.1, "low": 0.0, "high": 0.2, "at_least": False}
    arms = {"relu": ("relu", "tanh"), "pooling": ("base", "pooling-2-2")}
    kept += [
        {**line, "claim": name, "arms": {arm: [0.1] for arm in both}} for name, both in arms.items()
    ]
    told = {"claims": kept, "curves": {"relu": [[9, [[1, 0.5], [9, 0.3]]]]}}
    (tmp_path / "claims/claims.json").write_text(json.dumps(told))
    assert main(["claims", "--only", "crops-2048", "--run", run]) == 0
    kept = json.loads((tmp_path / "claims/claims.json").read_text())["claims"]
    names = [line["claim"] for line in kept]
    assert names == ["parameters", "layers", "neurons", "crops-2048", "relu"]
    assert "figure 1" in (tmp_path / "claims/report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "gelu"], "no claim 'gelu'; there are parameters, multiply-adds, "),
        (["--only", ""], "only is given, and empty; is a variable of the shell not set?"),
        (["--precision", "x"], "precision is 'x': one of float32, bfloat16"),
        (["--scale", "0"], "scale is 0.0: more than 0"),
        (["--seeds", "0"], "seeds is 0: more than 0"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--scale", "2", "--only", "layers", "--run", "held"], "held holds runs of "),
        (["--images", "-5", "--only", "layers", "--run", "held"], "images is -5: more than 0"),
        (["--scale", "inf", "--only", "layers", "--run", "held"], "scale is inf: more than 0"),
        (["--only", "layers", "--run", "file/x"], "cannot be written: Not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["claims", "--only", "layers", "--run", "held"]) == 0
    capsys.readouterr()
    assert main(["claims", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("towers: ")
    assert error.count("\n") == 1
