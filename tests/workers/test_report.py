"""`towers report`: one page with what the run's files say, and nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.network import build
from pipeline.tower import Tower
from workers.cli import main
from workers.report import colourfulness
from workers.weights import import_


@pytest.fixture(scope="module")
def run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three reports of training, an evaluation of them, and a restart."""
    folder = tmp_path_factory.mktemp("report")
    tower = Tower(build("alexnet-mini", 10), seed=3)
    torch.save({name: p.detach() for name, p in tower.weights().items()}, folder / "w.pt")
    given = {"network": "alexnet-mini", "shards": shards}
    import_(f"{folder}/w.pt", f"{folder}/run", given)
    lines = [
        {"time": 60.0 * n, "split": "train", "step": n, "loss": 2.0 / n, "top1_error": 0.5 / n}
        for n in (1, 2, 3)
    ]
    lines = [{**line, "images_per_second": 1234.0, "augmenters": 2} for line in lines]
    figures = {"images": 50, "loss": 0.7, "top1_error": 0.21, "top5_error": 0.01}
    lines.append({"time": 190.0, "split": "val", "step": 3, **figures})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "run/metrics.jsonl").write_text(text + '{"time": 1')  # a line half written
    event = {"time": 100.0, "event": "lost", "processes": ["x"], "restarts": 1}
    (folder / "run/events.jsonl").write_text(json.dumps(event) + "\n")
    return folder / "run"


def test_a_page_tells_what_the_files_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["file"] == f"{run}/report.html"
    page = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    for text in ("21.00%", "1 restarts", ">restart<", "Tower b", "1,234", "alexnet-mini"):
        assert text in page, text
    assert page.count("<polyline") == 4  # loss, error, images a second, augmenters


def test_colour_is_measured() -> None:
    grey = np.repeat(np.random.default_rng(0).normal(size=(4, 1, 5, 5)), 3, axis=1)
    assert colourfulness(grey) == pytest.approx(0, abs=1e-12)
    opposed = grey.copy()
    opposed[:, 0], opposed[:, 2] = -opposed[:, 1], 0
    assert colourfulness(opposed) == pytest.approx(1)


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("no run there\n")


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
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (np.abs(pixels - np.array([0x2F, 0x6F, 0xB3])).max(axis=1) < 3).sum() > 300  # the curves
