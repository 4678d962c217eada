"""`towers plan`: its figures are those of a real run's files, or follow from the rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.description import describe, kept
from pipeline.network import build
from workers.cli import main

MINI = ("--network", "alexnet-mini", "--batch", "64")


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_memory_traffic_and_checkpoint(
    trained: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(capsys, shards, *MINI, "--epochs", "2")
    assert (found["images"], found["steps"], found["mesh"]) == (150, 6, "1x1x2")
    files = Path(f"{trained}/run/checkpoints/step-00000006").iterdir()
    written = sum(file.stat().st_size for file in files)
    assert found["checkpoint_bytes"] == pytest.approx(written, rel=0.02)
    assert "seconds" not in found

    # Of AlexNet on two towers, as the paper's sizes have it.
    big = plan(capsys, "--images", "1281167")
    (device,) = big["memory"]
    assert device["weights"] == device["velocities"] == 60_965_224 * 4 // 2
    assert big["step_bytes"]["towers"] == 2 * 128 * (128 * 13 * 13 + 4608 + 2048 + 2048) * 4
    assert big["steps"] == 10_010 * 90

    # Over stages and replicas each device has less, and cuts and gradients cross.
    options = ("--stages", "2", "--replicas", "2", "--images", "1281167", "--freeze", "conv1:conv2")
    mesh = plan(capsys, *options)
    assert sum(line["weights"] for line in mesh["memory"]) == device["weights"]
    assert sum(line["activations"] for line in mesh["memory"]) < device["activations"]
    for part in ("gradients", "activations"):
        assert [line[part] == 0 for line in mesh["memory"]] == [True, False]
    assert mesh["step_bytes"]["stages"] == [64 * 128 * 13 * 13 * 4]  # forward alone
    assert mesh["step_bytes"]["replicas"] == mesh["memory"][1]["gradients"]


def test_what_is_counted_follows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    network = build("alexnet", 1000)
    costs = describe(network, batch=128)

    def planned(*options: str) -> dict[str, Any]:
        return plan(capsys, "--images", "12800", *options)

    whole = planned()
    (device,) = whole["memory"]
    # The halves of a tower, and what it gets of the other's; pixels as they come and as float32.
    crossed = sum(cost.sent for cost in costs)
    assert device["activations"] == sum(kept(network)) // 2 * 128 + crossed
    assert device["batch"] == 128 * 224 * 224 * 3 * (1 + 4)
    assert planned("--steps", "7")["steps"] == 7
    half = planned("--precision", "bfloat16")
    assert 2 * half["step_bytes"]["towers"] == whole["step_bytes"]["towers"]
    # Frozen layers have no velocities, of which a checkpoint would hold four bytes each.
    frozen = planned("--freeze", "conv1:conv5")
    velocities = 4 * sum(cost.parameters for cost in costs if cost.name.startswith("conv"))
    assert whole["checkpoint_bytes"] - frozen["checkpoint_bytes"] == velocities
    # Of eight micro-batches the first of two stages keeps two at a time, the last one.
    undivided, divided = (
        [line["activations"] for line in planned("--stages", "2", "--microbatches", n)["memory"]]
        for n in "18"
    )
    assert [divided[0] * 4, divided[1] * 8] == undivided


def test_time_and_cost_follow_from_the_rates(capsys: pytest.CaptureFixture[str]) -> None:
    rates = ("--tower-rate", "1000", "--augmenter-rate", "400")
    prices = ("--price-towers", "5", "--price-augmenter", "0.5")
    given = ("--images", "128000", "--epochs", "90", *rates, *prices)
    found = plan(capsys, *given)
    assert (found["augmenters_needed"], found["augmenters"]) == (2.5, 3)
    assert (found["images_per_second"], found["epoch_seconds"]) == (1000, 128)
    assert found["cost"] == pytest.approx(128 * 90 / 3600 * (5 + 3 * 0.5))
    few = plan(capsys, *given, "--augmenters", "1:2")
    assert (few["images_per_second"], few["epoch_seconds"]) == (800, 160)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "how many images? name SHARDS, or say --images"),
        (["--images", "9", "--measure"], "--measure needs SHARDS"),
        (["--images", "9", "--tower-rate", "9"], "--tower-rate and --augmenter-rate are wanted"),
        (["--images", "0"], "images is 0: at least 1"),
        (["--images", "9", "--tower-rate", "inf"], "tower_rate is inf: more than 0"),
        (["--images", "9", "--price-towers", "-1"], "price_towers is -1.0: 0 or more"),
        (["--images", "9", "--price-augmenter", "nan"], "price_augmenter is nan: 0 or more"),
        (["--images", "9", "--classes", "-3"], "classes is -3: at least 2"),
        (["SHARDS", "--measure", "--tower-rate", "9"], "--measure has no effect where rates are"),
        (["nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    options: list[str], message: str, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *(shards if o == "SHARDS" else o for o in options)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
