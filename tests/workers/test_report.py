"""`towers report`: one page with what the files of real runs say, and nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from bisect import bisect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workers.cli import main
from workers.evaluation_file import read_evaluation
from workers.first_layer import colourfulness


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, for a page to be written into or damage to be done."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def test_a_page_tells_what_the_files_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["file"] == f"{run}/report.html"
    page = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    charts = page.split("<figure>")[1:8]
    names = [re.search("<b>(.*)</b>", chart)[1] for chart in charts]  # type: ignore[index]
    assert names[:3] == ["Loss", "Top-1 error", "Top-5 error"]
    assert names[3:] == [
        *("Learning rate", "Images a second", "Time waited for data", "Augmenters")
    ]
    labels = {tuple(re.findall(r'text-anchor="middle">([^<]*)<', chart)) for chart in charts}
    assert len(labels) == 1  # the times and steps of one axis
    for chart in charts:
        assert chart.count("<title>restart: tower rank") == 1
        assert ">seconds<" in chart
        assert ">step<" in chart
    assert "1 restart, 0 stalls of the fleet" in page
    metrics, events = (
        [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "events")
    )
    starts = [event["time"] for event in events if event["event"] == "start"]
    assert len(starts) == 2
    trained = {bisect(starts, line["time"]) for line in metrics if line["split"] == "train"}
    assert all(chart.count("<polyline") == len(trained) for chart in charts)  # none over the gap
    kept = read_evaluation(str(run))
    assert kept
    in_training = [line for line in metrics if line["split"] == "val"][-1]
    for line in (in_training, kept, kept["average"]):
        assert f"<td class=n>{line['loss']:.4f}<td class=n>{line['top1_error']:.2%}" in page
    assert "2 runs averaged, val, 1 crop, weights 3, 1" in page
    assert page.count("data:image/png") == 2  # the towers' kernels
    assert page.count("data:image/jpeg") == len(kept["examples"]) + len(kept["mistakes"])
    for known in kept["classes"]:
        assert f"<tr><td>{known['title']}<td class=n>{known['images']}" in page
    assert sum(map(int, re.findall(r'%, transparent\)">(\d+)', page))) == 50  # the confusion


def test_two_runs_share_the_charts(trained: Path, run: Path, tmp_path: Path) -> None:
    again, page = shutil.copytree(run, tmp_path / "deeper/run"), f"{tmp_path}/page.html"
    assert main(["report", str(run), str(again), f"{trained}/other", "--output", page]) == 0
    text = Path(page).read_text()
    assert text.count("<h2>") == 3
    assert f"<h2>{again}</h2>" in text  # of runs with one name the whole path
    circles = text.count('<circle cx="')
    assert circles > 0
    assert circles % 6 == 0
    assert 'stroke="var(--s1)"' in text
    assert text.count("2 runs averaged") == 1  # which each of them keeps


def test_colour_is_measured() -> None:
    grey = np.repeat(np.random.default_rng(0).normal(size=(4, 1, 5, 5)), 3, axis=1)
    assert colourfulness(grey) == pytest.approx(0, abs=1e-12)
    opposed = grey.copy()
    opposed[:, 0], opposed[:, 2] = -opposed[:, 1], 0
    assert colourfulness(opposed) == pytest.approx(1)


@pytest.mark.parametrize(
    ("damaged", "text", "output", "message"),
    [
        ("", "", "page/missing.html", "page/missing.html cannot be written: No such file"),
        ("", "", "run", "run is a folder; name a file in it"),
        ("", "", "run/config.toml/x", "cannot be written: Not a directory"),
        ("", "", "nosuch://x/page.html", "nosuch://x/page.html: Protocol not known: nosuch"),
        ("evaluation.json", '{"classes": [', "x", "run/evaluation.json: no evaluation, or damaged"),
        ("evaluation.json", '{"classes": 1}', "x", "`towers evaluate` writes it anew"),
        (
            "evaluation.json",
            '{"classes": [], "confusion": [], "examples": [], "mistakes": []}',
            "x",
            "no",
        ),
        ("events.jsonl", "{}x\n", "x", "events.jsonl line 1: no JSON with time, event; remove the"),
        ("events.jsonl", "[]\n", "x", "run/events.jsonl line 1: no JSON with time, event"),
        (
            "metrics.jsonl",
            '{"time": 1, "step": 2}\n',
            "x",
            "line 1: no JSON with time, split, step",
        ),
        ("", "", "run/config.toml", "run/config.toml is read by this command; name another file"),
        ("config.toml", None, "x", "run: no run there"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    damaged: str,
    text: str | None,
    output: str,
    message: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run.parent)
    if damaged:
        (run / damaged).unlink() if text is None else (run / damaged).write_text(text)
    before = sorted(run.parent.rglob("*"))
    assert main(["report", "run", "--output", output]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("towers: ")
    assert error.count("\n") == 1
    assert sorted(run.parent.rglob("*")) == before


def test_a_line_half_written_is_left_for_later(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1')
    assert main(["report", str(run)]) == 0


def test_a_browser_draws_it(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here to draw the page with")
    assert main(["report", str(run), "--output", f"{tmp_path}/page.html"]) == 0
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,900")
    shot = tmp_path / "page.png"
    subprocess.run(
        [browser, *options, f"--screenshot={shot}", f"file://{tmp_path}/page.html"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)[260:]  # below the legend
    run_colour = np.abs(pixels - np.array([0x2F, 0x6F, 0xB3])).max(axis=2) < 3
    assert run_colour.sum() > 60  # three charts with two dots or more each
