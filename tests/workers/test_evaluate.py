"""`towers evaluate` on a real run: what training itself measured, for any number of workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.data import DataContext

from datasets.drawn import draw
from datasets.images import encode
from datasets.shards import write_manifest, write_split
from workers.cli import main
from workers.config import UserError
from workers.evaluate import evaluate
from workers.evaluation_file import read_evaluation
from workers.progress import Progress
from workers.sweep import ITEM, row_ranges
from workers.trained import open_trained
from workers.weights import export, import_

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy, in which these tests leave their evaluations."""
    return shutil.copytree(trained / "run", f"{tmp_path_factory.mktemp('copy')}/run")


@pytest.fixture(scope="module")
def other(trained: Path, run: str) -> str:
    return shutil.copytree(trained / "other", f"{Path(run).parent}/other")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """450 images in row groups of 90: two ranges of rows, the last batches short."""
    folder = str(tmp_path_factory.mktemp("data"))
    drawn = (draw(7, "val", n) for n in range(450))
    classes = tuple(f"{n}" for n in range(10))
    records = ((encode(pixels), f"{n}.jpg", label) for n, (pixels, label) in enumerate(drawn))
    shards = write_split(folder, "val", records, classes, rows_per_group=90)
    write_manifest(folder, {"val": shards}, classes, size=72)
    return folder


def test_it_finds_what_training_measured(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [json.loads(line) for line in Path(f"{run}/metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line for line in metrics if line["split"] == "val"}
    for step, options in ((6, []), (3, ["--step", "3"])):
        assert main(["evaluate", run, "--json", *options]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (result["images"], result["crops"], result["runs"][0]["step"]) == (50, 1, step)
        for name in ("top1_error", "top5_error"):
            assert result[name] == trained[step][name]
        assert result["loss"] == pytest.approx(trained[step]["loss"], rel=1e-5)


def test_any_number_of_workers_finds_the_same(run: str, other: str, data: str) -> None:
    blocks = DataContext.get_current().target_max_block_size
    results: list[dict[str, Any]] = [
        evaluate([run, other], data=data, weights=[3, 1], workers=n) for n in (1, 3)
    ]
    assert results[0] == results[1]
    assert DataContext.get_current().target_max_block_size == blocks  # the caller's own
    assert results[0]["images"] == 450
    assert [line["step"] for line in results[0]["runs"]] == [6, 0]
    alone, average = results[0]["runs"][0], results[0]
    assert alone["loss"] != average["loss"]


def test_workers_that_are_killed_change_nothing(
    run: str, data: str, kill_own: Callable[[str], None]
) -> None:
    class Killer(Progress):
        killed = False

        def done(self, what: str, count: int, total: int, start: float) -> None:
            if not self.killed and count < total:
                self.killed = True
                kill_own("ray::MapBatches")

    progress = Killer()
    disturbed = evaluate([run], data=data, workers=2, progress=progress)
    assert progress.killed
    assert disturbed == evaluate([run], data=data)


def test_ranges_cover_every_row_once() -> None:
    for groups in ((90,) * 8, (1000, 1000, 7), (3,), (0, 5, 0), (ITEM,) * 3):
        ranges = row_ranges(groups)
        assert [row for part in ranges for row in part] == list(range(sum(groups)))


def test_the_whole_evaluation_is_kept_in_the_run(run: str, data: str) -> None:
    result = evaluate([run], data=data, crops=10)
    kept = read_evaluation(run)
    assert kept
    assert (kept["images"], kept["crops"], kept["split"]) == (450, 10, "val")
    assert [c["images"] for c in kept["classes"]] == [45] * 10
    assert kept["classes"][0]["title"] == "disc"  # as the run knows them
    assert sum(count for *_, count in kept["confusion"]) == 450
    right = sum(count for true, predicted, count in kept["confusion"] if true == predicted)
    assert right == round(450 * (1 - result["top1_error"]))
    assert [e["row"] for e in kept["examples"]][::7] == [0, 449]
    assert all(e["best"][0][0] != e["label"] for e in kept["mistakes"])
    assert len(kept["mistakes"]) == 8


def test_a_run_without_data_learns_its_mean_from_what_it_is_evaluated_on(
    run: str, shards: str, data: str, tmp_path: Path
) -> None:
    export(run, f"{tmp_path}/w.pt", 3)
    import_(f"{tmp_path}/w.pt", f"{tmp_path}/run", {"network": "alexnet-mini"})
    with pytest.raises(UserError, match="does not know the mean of its training images"):
        evaluate([f"{tmp_path}/run"], data=data)
    found = evaluate([f"{tmp_path}/run"], data=shards)
    assert found["loss"] == evaluate([run], data=shards, step=3)["loss"]
    evaluate([f"{tmp_path}/run"], data=data)


def test_labels_of_which_some_lack_are_no_fewer_classes(run: str, tmp_path: Path) -> None:
    export(run, f"{tmp_path}/w.pt", 3)
    import_(f"{tmp_path}/w.pt", f"{tmp_path}/run", {"network": "alexnet-mini"})
    names = [str(n) for n in range(8)]
    records = [(encode(draw(0, "val", n)[0]), f"{n}", n) for n in range(8)]
    written = {s: write_split(f"{tmp_path}/few", s, records, names) for s in ("train", "val")}
    write_manifest(f"{tmp_path}/few", written, names)
    assert evaluate([f"{tmp_path}/run"], data=f"{tmp_path}/few")["images"] == 8
    kept = open_trained(f"{tmp_path}/run").classes
    assert kept
    assert kept.names == tuple(str(n) for n in range(10))


def test_gpus_that_are_not_there_are_not_used(run: str, data: str) -> None:
    with pytest.raises(UserError, match="device is cuda: the cluster has no GPU; --device cpu"):
        evaluate([run], data=data, device="cuda")


def test_a_network_that_has_diverged_is_not_evaluated(run: str, data: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    export(run, f"{tmp_path}/w.pt", 3)
    weights = torch.load(f"{tmp_path}/w.pt")
    weights["fc8.weight"].fill_(3e38)
    torch.save(weights, tmp_path / "w.pt")
    shutil.rmtree(tmp_path / "run/checkpoints")
    import_(f"{tmp_path}/w.pt", f"{tmp_path}/far", {"network": "alexnet-mini"})
    shutil.copytree(tmp_path / "far/checkpoints", tmp_path / "run/checkpoints")
    with pytest.raises(UserError, match="run step 0: what the network makes of images are no numb"):
        evaluate([f"{tmp_path}/run"], data=data)


@pytest.fixture
def mistaken(tmp_path: Path) -> Path:
    records = [(encode(draw(0, "val", n)[0]), f"{n}", n) for n in range(3)]
    for name, classes in (("three", "abc"), ("others", "jihgfedcba")):
        shards = write_split(str(tmp_path / name), "val", records, classes)
        write_manifest(str(tmp_path / name), {"val": shards}, classes, size=72)
    broken = [(b"no image", "x", 0)]
    names = tuple(f"{n}" for n in range(10))
    shards = write_split(str(tmp_path / "broken"), "val", [*broken, *records], names)
    write_manifest(str(tmp_path / "broken"), {"val": shards}, names, size=72)
    (tmp_path / "nothing").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "nothing is no run"),
        (["RUN", "--step", "4"], "no checkpoint of step 4; there are 3, 6"),
        (["RUN", "--split", "test"], "no split 'test'; it has train, val"),
        (["RUN", "--data", "three"], "tells 10 classes apart, "),
        (["RUN", "--data", "others"], "was trained with 'disc' as class 0, "),
        (["RUN", "--data", "broken"], "row 0: the image (8 bytes) does not decode"),
        (["RUN", "--weights", "1,2"], "weights has 2 numbers: 1, one a network"),
        (["RUN", "--weights", "x"], "weights is 'x': numbers with commas"),
        (["FEWER"], "fewer/classes.json: 2 classes, of the checkpoint 10; remove it, and"),
        (["UNNAMED"], "unnamed/classes.json: not readable"),
        (["CHANGED"], "conv1.weight is (32, 3, 11, 11), alexnet wants (96, 3, 11, 11)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    options: list[str],
    message: str,
    run: str,
    mistaken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(mistaken)
    damage = {
        "FEWER": ("classes.json", '{"classes": ["a", "b"], "words": {}}'),
        "UNNAMED": ("classes.json", '{"classes": [0, 1], "words": {}}'),
        "CHANGED": ("config.toml", 'network = "alexnet"'),
    }
    if options[0] in damage:
        name, text = damage[options[0]]
        options = [shutil.copytree(run, options[0].lower())]
        Path(options[0], name).write_text(text)
    assert main(["evaluate", *(run if o == "RUN" else o for o in options)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("towers: ")
    assert error.count("\n") == 1


def test_bad_images_are_skipped_and_counted(run: str, mistaken: Path) -> None:
    result = evaluate([run], data=str(mistaken / "broken"), on_error="skip")
    assert (result["images"], result["skipped"]) == (3, 1)
