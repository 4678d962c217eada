"""Recipes are complete, and a bad value is named with what is allowed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.network import NETWORKS, Norm
from pipeline.recipes import RECIPES, Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_network_and_schedule(name: str) -> None:
    recipe = Recipe(**RECIPES[name]())
    network = recipe.build(12)
    assert (recipe.network, network.name, network.classes) == (name, name, 12)
    assert 0 < recipe.rates().at(0, 0, []) <= recipe.rate
    assert recipe.rates().at(10_000, 0, []) == recipe.rate
    assert RECIPES[name].__doc__


def test_every_network_has_a_recipe() -> None:
    assert set(RECIPES) == set(NETWORKS)


def test_the_default_is_the_papers_recipe() -> None:
    recipe = Recipe()
    assert recipe == Recipe(**RECIPES["alexnet"]())
    assert (recipe.batch, recipe.momentum, recipe.decay, recipe.rate) == (128, 0.9, 5e-4, 0.01)
    assert (recipe.epochs, recipe.schedule, recipe.bias_rate, recipe.decay_bias) == (
        90,
        "plateau",
        1.0,
        True,
    )


def test_the_authors_recipe_is_that_of_their_source() -> None:
    recipe, paper = Recipe(**RECIPES["alexnet-2012"]()), Recipe()
    assert (recipe.bias_rate, recipe.decay_bias, recipe.colour_scale) == (2.0, False, "deviations")
    named = ("network", "bias_rate", "decay_bias", "colour_scale")
    assert recipe == replace(paper, **{name: getattr(recipe, name) for name in named})


def test_a_recipe_hands_its_options_on() -> None:
    options: dict[str, Any] = {"activation": "tanh", "lrn": False, "pooling": "2/2", "dropout": 0.2}
    network = Recipe(columns=1, **options).build(10)
    assert (network.columns, network.layers[0].maps) == (1, 48)
    assert (network.layers[0].activation, network.layers[0].norms) == ("tanh", ())
    assert network.layers[0].pool
    assert network.layers[0].pool.size == 2
    assert network.layers[5].dropout == 0.2
    network = Recipe(lrn_size=3, lrn_k=1.0, lrn_alpha=0.1, lrn_beta=0.5, init_scale=2.0).build(10)
    assert (network.layers[0].norms, network.layers[0].std) == ((Norm(3, 0.1, 0.5, 1.0),), 0.02)
    assert Recipe(network="cifar", init_std=0.5).build(10).layers[0].std == 0.5
    assert Recipe(crop=200, image=200).build(10).crop == 200
    assert not Recipe(crossings="last").build(10).layers[2].crosses
    schedule = Recipe(rate=0.5, schedule="steps", drops=(1.0,), warmup=3).rates()
    assert [schedule.at(s, e, []) for s, e in ((0, 0), (3, 0), (9, 1))] == [0.125, 0.5, 0.05]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "vgg"}, "network is 'vgg': one of alexnet, alexnet-2012, alexnet-mini, cifar"),
        ({"activation": "gelu"}, "activation is 'gelu': one of relu, tanh"),
        ({"pooling": "3/3"}, "pooling is '3/3': one of 3/2, 2/2"),
        ({"columns": 3}, "columns is 3: one of 1, 2"),
        ({"colour_scale": "both"}, "colour_scale is 'both': one of eigenvalues, deviations"),
        ({"schedule": "cosine"}, "schedule is 'cosine': one of plateau, steps"),
        ({"precision": "float16"}, "precision is 'float16': one of float32, bfloat16"),
        ({"dropout": 1.5}, r"dropout is 1\.5: at least 0 and less than 1"),
        ({"network": "cifar", "image": 32, "dropout": 0.5}, "cifar has no layer with dropout"),
        ({"batch": 0}, "batch is 0: at least 1"),
        ({"epochs": 0}, "epochs is 0: at least 1"),
        ({"patience": 0}, "patience is 0: at least 1"),
        ({"pad": -1}, "pad is -1: at least 0"),
        ({"colour": -0.1}, r"colour is -0\.1: at least 0"),
        ({"warmup": -1}, "warmup is -1: at least 0"),
        ({"decay": -1e-4}, r"decay is -0\.0001: at least 0"),
        ({"bias_rate": float("nan")}, "bias_rate is nan: a finite number"),
        ({"rate": 0.0}, r"rate is 0\.0: more than 0"),
        ({"rate": float("nan")}, "rate is nan: a finite number"),
        ({"scale": -1.0}, r"scale is -1\.0: more than 0"),
        ({"momentum": 1.0}, r"momentum is 1\.0: at least 0 and less than 1"),
        ({"drops": (3.0,)}, r"drops is \[3\.0\]: only schedule 'steps' has drops"),
        ({"pad": 2, "crops": False}, "pad is 2: it has no effect without crops"),
        ({"image": 223}, "image is 223: at least the crop of 224 pixels"),
        ({"image": 200, "pad": 11}, "image is 200: at least the crop of 224 pixels"),
    ],
    ids=str,
)
def test_a_recipe_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_images_are_as_large_as_the_crop_without_their_border() -> None:
    with pytest.raises(ValueError, match="image is 200: at least the crop of 224 pixels"):
        Recipe(image=200, pad=12)  # evaluation adds none
    assert Recipe(image=224, pad=12).pad == 12
    assert Recipe(image=224, crops=False).image == 224


@pytest.mark.parametrize(("classes", "rate", "warned"), [(10, 0.01, True), (10, 3e-4, False)])
def test_a_rate_for_a_thousand_classes_is_warned_of(
    classes: int, rate: float, warned: bool
) -> None:
    assert bool(Recipe(rate=rate).advice(classes)) is warned
    assert Recipe().advice(1000) == ""
    assert Recipe(**RECIPES["alexnet-mini"]()).advice(10) == ""
