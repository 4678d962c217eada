"""The tables are the published networks, and what cannot be built is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.description import describe
from pipeline.network import NETWORKS, Layer, Network, Norm, Pool, build, half_column
from pipeline.tower import Tower, share

SIDES = {  # of what leaves each layer, pooling included
    "alexnet": [27, 13, 13, 13, 6, 1, 1, 1],
    "alexnet-2012": [27, 13, 13, 13, 6, 1, 1, 1],
    "alexnet-mini": [9, 4, 4, 4, 1, 1, 1, 1],
    "cifar": [15, 7, 3, 1],
}


def parameters(network: Network) -> int:
    return sum(cost.parameters for cost in describe(network))


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_have_the_published_sides(name: str) -> None:
    network = build(name, 10)
    assert [shape.side for shape in network.shapes] == SIDES[name]


@pytest.mark.parametrize("name", ["alexnet", "alexnet-2012"])
def test_the_first_convolution_has_55_by_55_positions(name: str) -> None:
    network = build(name, 1000)
    first = replace(network.layers[0], pool=None)
    assert replace(network, layers=(first, network.layers[-1])).shapes[0].side == 55


def test_shapes_are_those_that_come_out() -> None:
    for name in NETWORKS:
        network = build(name, 10)
        tower, found = Tower(network, seed=0), []
        for block in tower.blocks.values():
            block.register_forward_hook(lambda _, __, out, found=found: found.append(out.shape))
        with torch.no_grad():
            tower(torch.zeros(2, 3, network.crop, network.crop), None)
        want = [(2, s.maps, s.side, s.side) for s in network.shapes]
        assert [(*s, 1, 1)[:4] for s in found] == want
        assert [s.units for s in network.shapes] == [s[1:].numel() for s in found]


@pytest.mark.parametrize("name", ["alexnet", "alexnet-2012"])
def test_alexnet_has_60_965_224_parameters(name: str) -> None:
    assert parameters(build(name, 1000)) == 60_965_224


def test_alexnet_without_columns_has_62_378_344_parameters() -> None:
    network = replace(build("alexnet", 1000), columns=1)
    assert sum(cost.parameters for cost in describe(network, towers=1)) == 62_378_344


def test_alexnet_takes_720_million_multiply_adds() -> None:
    costs = describe(build("alexnet", 1000))
    assert 0.71e9 < sum(cost.macs for cost in costs) < 0.73e9
    by_hand = {"conv1": 55 * 55 * 96 * 363, "conv3": 13 * 13 * 384 * 2304, "fc6": 9216 * 4096}
    assert {cost.name: cost.macs for cost in costs if cost.name in by_hand} == by_hand


def test_alexnet_sends_what_the_paper_sent() -> None:
    sent = {cost.name: cost.sent / 1e6 for cost in describe(build("alexnet", 1000), batch=128)}
    want = {"conv3": 11.08, "fc6": 2.36, "fc7": 1.05, "fc8": 1.05}
    assert {name: round(mb, 2) for name, mb in sent.items() if mb} == want
    alone = describe(build("alexnet", 1000), towers=1)
    assert not any(cost.sent for cost in alone)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_tower_holds_half(name: str) -> None:
    network = build(name, 10)
    costs, towers = describe(network), [Tower(network, seed=0, towers=2, tower=t) for t in (0, 1)]
    for cost in costs:
        for tower in towers:
            weights = tower.weights()
            held = sum(weights[f"{cost.name}.{kind}"].numel() for kind in ("weight", "bias"))
            assert 2 * held == cost.parameters
            assert cost.weights == 4 * held
    output = costs[0].output
    assert costs[0].activations == output.units // 2 * 4 * 128


def test_half_a_column_has_half_the_kernels_but_in_the_last_convolution() -> None:
    network = build("alexnet", 1000, columns=1)
    assert network == half_column(build("alexnet", 1000))
    assert [layer.maps for layer in network.layers] == [48, 128, 192, 192, 256, 4096, 4096, 1000]
    # Footnote 1 of the paper: about as many parameters as the two towers.
    assert 0.9 < parameters_of_one(network) / 60_965_224 < 1.05


def parameters_of_one(network: Network) -> int:
    return sum(p.numel() for p in Tower(network, seed=0).parameters())


def test_options_change_every_layer_that_they_name() -> None:
    layers = build("alexnet", 10, activation="tanh", lrn=False, pooling="2/2", dropout=0.25).layers
    assert [layer.activation for layer in layers] == ["tanh"] * 7 + [None]
    assert [layer.norms for layer in layers] == [()] * 8
    assert [(p.size, p.stride) for layer in layers if (p := layer.pool)] == [(2, 2)] * 3
    assert [layer.dropout for layer in layers] == [0] * 5 + [0.25] * 2 + [0]
    larger = build("alexnet", 10, crop=256)
    assert [shape.side for shape in larger.shapes] == [31, 15, 15, 15, 7, 1, 1, 1]
    assert larger.weight_shape(5) == (4096, 256 * 7 * 7)


def test_norms_take_other_constants_where_they_run_over_maps() -> None:
    layers = build("alexnet-2012", 10, norm={"size": 3, "k": 1.0, "alpha": 0.1, "beta": 0.5}).layers
    plain = build("alexnet-2012", 10).layers
    assert layers[0].norms == (Norm(3, 0.1, 0.5, 1.0),)
    assert layers[1].norms == (Norm(3, 0.1, 0.5, 1.0), plain[1].norms[1])
    assert build("alexnet", 10, norm={"k": 1.0}).layers[0].norms == (Norm(k=1.0),)


def test_weights_start_wider_by_a_factor() -> None:
    narrow, wide = (
        Tower(build("cifar", 10, init_scale=factor), seed=0).weights() for factor in (1.0, 2.0)
    )
    for name, p in narrow.items():
        factor = 2 if name.endswith(".weight") else 1
        torch.testing.assert_close(wide[name], p * factor)
    alike = build("cifar", 10, init_std=0.01, init_scale=2.0)
    assert [layer.std for layer in alike.layers] == [0.02] * 4


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_last_layer_may_cross(name: str) -> None:
    network = build(name, 10, crossings="last")
    assert [layer.crosses for layer in network.layers] == [False] * (len(network.layers) - 1) + [
        True
    ]
    sent = [cost.sent for cost in describe(network)]
    assert not any(sent[:-1])
    assert sent[-1]
    assert parameters(network) < parameters(build(name, 10))


@pytest.mark.parametrize(("network", "of_conv3_to_5"), [("alexnet", 0.01), ("alexnet-2012", 0.03)])
def test_weights_start_as_published(network: str, of_conv3_to_5: float) -> None:
    weights = Tower(build(network, 10), seed=0).weights()
    for name, p in weights.items():
        layer, kind = name.split(".")
        if kind == "bias":
            ones = layer in ("conv2", "conv4", "conv5", "fc6", "fc7")
            assert (p == ones).all(), name
        else:
            std = of_conv3_to_5 if layer in ("conv3", "conv4", "conv5") else 0.01
            assert abs(p.std().item() / std - 1) < 0.02, name
            assert abs(p.mean().item() / std) < 0.02, name


@given(st.sampled_from(["alexnet-mini", "cifar"]), st.integers(2, 30), st.integers(0, 99))
@settings(max_examples=15)
def test_shares_of_one_seed_fit_together(name: str, classes: int, seed: int) -> None:
    network = build(name, classes)
    whole = Tower(network, seed=seed).weights()
    a, b = (Tower(network, seed=seed, towers=2, tower=t).weights() for t in (0, 1))
    assert all(torch.equal(torch.cat((a[n], b[n])), p) for n, p in whole.items())
    assert not torch.equal(
        whole["conv1.weight"], Tower(network, seed=seed + 1).weights()["conv1.weight"]
    )


def test_of_an_odd_number_the_first_tower_has_one_more() -> None:
    assert [share(11, 2, t) for t in (0, 1)] == [(0, 6), (6, 11)]
    assert share(11, 1, 0) == (0, 11)
    network = build("cifar", 11)
    assert [Tower(network, seed=0, towers=2, tower=t).first_class for t in (0, 1)] == [0, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vgg"}, r"network is 'vgg': one of alexnet, alexnet-2012, alexnet-mini, cifar"),
        ({"activation": "gelu"}, "activation is 'gelu': relu or tanh"),
        ({"pooling": "3/3"}, "pooling is '3/3': 3/2 or 2/2"),
        ({"dropout": 1.0}, r"dropout is 1\.0: at least 0 and less than 1"),
        ({"dropout": -0.1}, r"dropout is -0\.1: at least 0 and less than 1"),
        ({"name": "cifar", "dropout": 0.5}, r"dropout is 0\.5: cifar has no layer with dropout"),
        ({"columns": 3}, "columns is 3: 1 or 2"),
        ({"crossings": "none"}, "crossings is 'none': all or last"),
        ({"crossings": "last", "columns": 1}, "crossings is 'last': one column has nothing"),
        ({"norm": {"size": 4}}, "lrn_size is 4: an odd number, at least 1"),
        ({"norm": {"k": 0.0}}, r"lrn_k is 0\.0: more than 0"),
        ({"norm": {"alpha": -1.0}}, r"lrn_alpha is -1\.0: at least 0"),
        ({"norm": {"beta": float("nan")}}, "lrn_beta is nan: at least 0"),
        ({"norm": {"beta": 1.0}, "lrn": False}, r"lrn_beta is 1\.0: it has no effect without lrn"),
        ({"init_std": 0.0}, r"init_std is 0\.0: more than 0"),
        ({"init_scale": 0.0}, r"init_scale is 0\.0: more than 0"),
        ({"classes": 1}, "1 classes: at least 2"),
        ({"crop": 30}, "conv2: nothing is left of a 30-pixel crop"),
        ({"crop": 0}, "conv1: nothing is left of a 0-pixel crop"),
    ],
)
def test_build_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**{"name": "alexnet", "classes": 10} | change)


EVEN, LAST = Layer("a", "conv", 4), Layer("last", "full", 4, activation=None)


@pytest.mark.parametrize(
    ("columns", "layers", "message"),
    [
        (3, (LAST,), "columns is 3: a network has 1 or 2"),
        (2, (LAST, LAST), "two layers of one name in"),
        (2, (Layer("a", "full", 4), Layer("b", "conv", 4), LAST), "b: a convolution cannot follow"),
        (1, (), "the last layer has to be a full one"),
        (1, (Layer("a", "conv", 4),), "the last layer has to be a full one"),
        (1, (Layer("a", "full", 4, pool=Pool()), LAST), "a: a full layer has no maps"),
        (1, (replace(LAST, norms=(Norm(),)),), "last: a full layer has no maps"),
        (1, (replace(EVEN, norms=(Norm(2, spatial=True),)), LAST), "a: a window over positions"),
        (2, (Layer("a", "conv", 5), LAST), "a: 5 maps in 2 columns"),
        (2, (Layer("a", "conv", 4, 9), LAST), "a: nothing is left of a 8-pixel crop"),
        (2, (Layer("a", "conv", 4, crosses=True), LAST), "a: the first layer has nothing to cross"),
    ],
)
def test_network_refuses(columns: int, layers: tuple[Layer, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network("odd", 8, columns, layers)


def test_one_column_is_not_split_over_two_towers() -> None:
    network = build("cifar", 10, columns=1)
    with pytest.raises(ValueError, match="2 towers of a network with 1 column"):
        Tower(network, seed=0, towers=2)
    with pytest.raises(ValueError, match="2 towers of a network with 1 column"):
        describe(network)
