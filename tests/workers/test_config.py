"""Configurations: recipes under files under options, and every mistake in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.recipes import RECIPES
from workers.config import Config, UserError, configure


def test_options_stand_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('network = "cifar"\nbatch = 64\nrate = 1\n')
    config = configure({"run": "r", "batch": 32}, str(file))
    recipe = RECIPES["cifar"]()
    assert (config.network, config.batch, config.rate) == ("cifar", 32, 1.0)
    assert config.drops == recipe["drops"]


@pytest.mark.parametrize("network", RECIPES)
def test_what_is_written_is_read_back(network: str, tmp_path: Path) -> None:
    config = configure({"network": network, "run": str(tmp_path), "shards": "s3://bucket/🦋"})
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), "utf-8")
    assert configure({}, str(file)) == config


def test_a_run_without_shards_is_the_mini_network_and_with_them_the_papers() -> None:
    assert configure({}).network == "alexnet-mini"
    assert configure({"shards": "x"}).network == "alexnet"


def test_a_shorter_run_keeps_the_shape_of_its_schedule() -> None:
    recipe = RECIPES["alexnet-mini"]()
    half = configure({"epochs": recipe["epochs"] // 2})
    assert half.drops == tuple(drop / 2 for drop in recipe["drops"])


def test_so_does_a_longer_run_of_a_file_but_not_one_that_goes_on(tmp_path: Path) -> None:
    file = f"{tmp_path}/config.toml"
    base = configure({"epochs": 8, "drops": (2.125, 6.0)})
    Path(file).write_text(base.to_toml())
    assert configure({}, file).drops == (2.125, 6.0)
    assert configure({"epochs": 16}, file).drops == (4.25, 12.0)
    assert configure({"epochs": 16, "drops": (3.0,)}, file).drops == (3.0,)
    assert configure({"epochs": 16}, file, goes_on=True).drops == (2.125, 6.0)
    for goes_on in (False, True):
        plateau = configure({"schedule": "plateau"}, file, goes_on=goes_on)
        assert plateau.drops == ()
        Path(f"{tmp_path}/plateau.toml").write_text(plateau.to_toml())
        back = configure({"schedule": "steps"}, f"{tmp_path}/plateau.toml", goes_on=goes_on)
        assert back.drops == configure({}).drops  # the recipe's


def test_a_recipe_that_normalises_may_be_told_not_to(tmp_path: Path) -> None:
    config = configure({"network": "cifar"})
    assert config.lrn_alpha == 0.1
    Path(f"{tmp_path}/config.toml").write_text(config.to_toml())
    for file in (None, f"{tmp_path}/config.toml"):
        without = configure({"network": "cifar", "lrn": False}, file)
        assert (without.lrn, without.lrn_alpha) == (False, None)
    with pytest.raises(UserError, match="lrn_alpha"):
        configure({"network": "cifar", "lrn": False, "lrn_alpha": 0.2})


def test_every_field_has_a_sentence() -> None:
    for field in dataclasses.fields(Config):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": "resnet"}, "network is 'resnet': one of alexnet, alexnet-2012, "),
        ({"batch": 0}, "batch is 0: at least 1"),
        ({"batch": 100, "replicas": 3}, "100 does not divide over 3 replicas x 1 micro-batches"),
        ({"batch": 100, "microbatches": 8}, "take a multiple of 8"),
        ({"towers": 3}, "towers is 3: one of None, 1, 2"),
        ({"towers": 2, "columns": 1}, "a network of 1 column is held by 1 process"),
        ({"augmenters": "4:2"}, "augmenters is '4:2': 1 <= MIN <= MAX"),
        ({"augmenters": "many"}, "augmenters is 'many': MIN:MAX, such as 1:8"),
        ({"rate": -1.0}, "rate is -1.0: more than 0"),
        ({"timeout": float("inf")}, "timeout is inf: a finite number"),
        ({"stages": 2, "replicas": 0}, "replicas is 0"),
        ({"rate": float("nan")}, "rate is nan: a finite number"),
        ({"image": 60}, "image is 60: at least the crop of 64 pixels"),
        ({"network": "alexnet", "drops": (3.0,)}, "only schedule 'steps' has drops"),
        ({"pad": 4, "crops": False}, "pad is 4: it has no effect without crops"),
        ({"pad": 72}, "pad is 72: less than the image's 72 pixels"),
        ({"augmenters": "1:99999999"}, "1 <= MIN <= MAX <= 100000"),
        ({"timeout": 1e300}, "timeout is 1e+300: 30 days at most"),
        ({"on_error": "ignore"}, "on_error is 'ignore': one of fail, skip"),
    ],
)
def test_values_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        configure(given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("before", "given", "want"),
    [
        ({}, {"stages": 2}, (2, 4)),
        ({}, {"cuts": "conv3,fc6"}, (3, 4)),
        ({"stages": 2}, {}, (2, 4)),
        ({"stages": 2}, {"stages": 1}, (1, 1)),
        ({"stages": 2}, {"stages": 1, "microbatches": 8}, (1, 8)),
        ({"microbatches": 8}, {}, (1, 8)),
    ],
)
def test_a_run_with_other_stages_has_other_micro_batches(
    before: dict[str, object], given: dict[str, object], want: tuple[int, int], tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(configure({"run": "r", "batch": 128, **before}).to_toml())
    config = configure(given, str(file))
    assert (config.stages, config.microbatches) == want
    file.write_text("microbatches = 8")
    assert configure({"stages": 2}, str(file)).microbatches == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3", "unknown field 'batchsize'"),
        ('batch = "3"', "batch is '3': a value of type int is wanted"),
        ("batch = true", "batch is True: a value of type int is wanted"),
        ("batch = ", "not TOML"),
    ],
)
def test_files_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        configure({}, str(file))


def test_what_a_complete_file_lacks_was_unset(tmp_path: Path) -> None:
    """As in that of a run by a version whose recipe left it so."""
    text = configure({"network": "cifar", "run": "r"}).to_toml()
    old = "".join(line for line in text.splitlines(True) if not line.startswith("lrn_alpha"))
    (tmp_path / "old.toml").write_text(old)
    assert configure({"network": "cifar"}).lrn_alpha == 0.1
    assert configure({}, f"{tmp_path}/old.toml").lrn_alpha is None
    part = "".join(line for line in old.splitlines(True) if not line.startswith("rate"))
    (tmp_path / "part.toml").write_text(part)
    assert configure({}, f"{tmp_path}/part.toml").lrn_alpha == 0.1


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{folder}", "Is a directory"),
        ("nowhere://config.toml", "Protocol not known: nowhere"),
        ("{folder}/none.toml", "no such configuration file"),
    ],
)
def test_no_file_there(place: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        configure({}, place.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("s3://bucket/run/", "s3://bucket/run"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("memory://", "memory://"),
        ("/there/run/", "/there/run"),
    ],
)
def test_a_slash_at_the_end_says_nothing(given: str, meant: str) -> None:
    assert configure({"run": given}).run == meant


def test_in_a_job_a_relative_path_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "pkg"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="runs/one: a job's working directory does not last"):
        configure({"run": "runs/one"})
    assert configure({"run": "s3://bucket/one"}).run == "s3://bucket/one"
