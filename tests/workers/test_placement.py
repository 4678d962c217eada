"""Who sits where: decided from the nodes' resources alone."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.mesh import Mesh
from workers.config import Config, UserError, configure
from workers.placement import Lacking, decide, seats, side_by_side

Node = dict[str, float]


def config(**given: object) -> Config:
    return configure({"run": "r", **given})


def test_two_cores_hold_two_towers_and_an_augmenter() -> None:
    where = decide([{"CPU": 2}], config())
    assert (where.mesh.size, where.device, where.threads) == (2, "cpu", 1)
    assert 2 * where.tower["CPU"] + where.augmenter["CPU"] <= 2


@pytest.mark.parametrize("cpus", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("least", [1, 2, 5])
def test_what_is_decided_fits(cpus: int, least: int) -> None:
    where = decide([{"CPU": cpus}], config(augmenters=f"{least}:8"))
    assert 2 * where.tower["CPU"] + least * where.augmenter["CPU"] <= cpus + 1e-9
    assert where.threads >= 1


def test_gpus_hold_a_tower_each() -> None:
    where = decide([{"CPU": 8, "GPU": 2}], config())
    assert (where.device, where.mesh.towers, where.tower["GPU"]) == ("cuda", 2, 1)


def test_one_gpu_holds_both_towers_in_one_process() -> None:
    where = decide([{"CPU": 8, "GPU": 1}], config())
    assert (where.device, where.mesh.size) == ("cuda", 1)


def test_augmenters_go_to_nodes_set_aside_for_them() -> None:
    nodes: list[Node] = [{"CPU": 2}, {"CPU": 16, "augment": 1}]
    where = decide(nodes, config())
    assert "augment" in where.augmenter
    assert "augment" not in where.tower
    assert where.tower["CPU"] == 1
    assert where.apart
    assert not decide([{"CPU": 16, "augment": 1}], config()).apart


def test_towers_go_to_nodes_set_aside_for_them() -> None:
    nodes: list[Node] = [{"CPU": 0}, {"CPU": 8, "towers": 1}, {"CPU": 4, "augment": 1}]
    where = decide(nodes, config())
    assert "towers" in where.tower
    assert where.threads == 4


@pytest.mark.parametrize(
    ("nodes", "threads"),
    [
        ([{"CPU": 4}] * 10, 2),  # both towers on one of them
        ([{"CPU": 16}] * 2, 8),
        ([{"CPU": 16, "GPU": 1}] * 8, 16),
        ([{"CPU": 64, "GPU": 8}], 31),
        ([{"CPU": 1}, {"CPU": 8}], 4),
    ],
)
def test_towers_share_the_cores_of_their_node_alone(nodes: list[Node], threads: int) -> None:
    assert decide(nodes, config()).threads == threads


@pytest.mark.parametrize(
    ("nodes", "given", "cpu"),
    [
        # Not two on the second.
        ([{"CPU": 0.5, "GPU": 1}, {"CPU": 16, "GPU": 1}], {}, 0.5),
        # Three on the first.
        ([{"CPU": 2, "GPU": 4}, {"CPU": 64, "GPU": 1}], {"replicas": 2}, 0.65),
        # Augmenters need no GPU, and may be where there is none.
        ([{"CPU": 2, "GPU": 2}, {"CPU": 64}], {"augmenters": "40:64"}, 1.0),
        ([{"CPU": 2, "towers": 1}, {"CPU": 2}], {"augmenters": "2:8"}, 1.0),
    ],
)
def test_a_tower_has_all_that_it_needs_on_one_node(
    nodes: list[Node], given: dict[str, Any], cpu: float
) -> None:
    where = decide(nodes, config(**given))
    assert where.tower["CPU"] == cpu
    fit = (min(int(node.get(k, 0) / n) for k, n in where.tower.items()) for node in nodes)
    assert sum(fit) >= where.mesh.size
    assert where.threads == max(1, int(cpu))


def test_a_gpu_without_a_cpu_holds_no_tower() -> None:
    nodes: list[Node] = [{"CPU": 0, "GPU": 1}, {"CPU": 16, "GPU": 1}]
    with pytest.raises(Lacking, match=r"at least 0\.15, a tower's beside its GPU, the cluster has"):
        decide(nodes, config())


def test_gpus_of_nodes_set_aside_for_others_do_not_count() -> None:
    nodes: list[Node] = [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1, "augment": 1}]
    where = decide(nodes, config())
    assert (where.device, where.mesh.size) == ("cuda", 1)
    assert decide([{"CPU": 8}, nodes[1]], config()).device == "cpu"


@pytest.mark.parametrize(
    ("given", "runs"),
    [({}, 8), ({"towers": 2}, 4), ({"towers": 2, "stages": 2}, 2), ({"device": "cpu"}, 64)],
)
def test_as_many_runs_as_find_devices_are_side_by_side(given: dict[str, Any], runs: int) -> None:
    nodes: list[Node] = [{"CPU": 32, "GPU": 4}, {"CPU": 32, "GPU": 4}]
    assert side_by_side(nodes, [config(**given)]) == runs
    assert decide(nodes, config(**given), runs).mesh.size * runs == (64 if runs == 64 else 8)


def test_runs_without_gpus_are_side_by_side_on_cpus() -> None:
    nodes: list[Node] = [{"CPU": 6}, {"CPU": 8, "augment": 1}]
    assert side_by_side(nodes, [config()]) == 6
    assert side_by_side(nodes, [config(), config(towers=2)]) == 3
    assert side_by_side([{"CPU": 1}], [config(towers=2)]) == 1


@pytest.mark.parametrize("towers", [None, 1, 2])
@pytest.mark.parametrize("cpus", [1, 2, 3, 16])
@pytest.mark.parametrize("runs", [1, 2, 5])
def test_runs_side_by_side_fit_with_a_fleet_that_takes_no_room(
    runs: int, cpus: int, towers: int | None
) -> None:
    where = decide([{"CPU": cpus}], config(towers=towers), runs)
    assert where.mesh.size == (towers or 1)
    assert runs * where.mesh.size * where.tower["CPU"] <= cpus + 1e-9
    assert where.augmenter["CPU"] == 0
    assert where.threads == max(1, cpus // (runs * where.mesh.size))


@pytest.mark.parametrize(
    ("gpus", "runs", "towers", "share"),
    [
        *((4, 2, 2, 1), (2, 2, 1, 1), (2, 4, 1, 0.5), (1, 3, 1, 0.3), (3, 2, 1, 1)),
        *(
            (2, 3, 1, 0.5),
            (2, 5, 1, 0.3),
            (3, 8, 1, 0.3),
            (1, 20, 1, 0.05),
        ),  # none has parts of two
    ],
)
def test_runs_side_by_side_have_towers_of_their_own_or_fractions_of_a_gpu(
    gpus: int, runs: int, towers: int, share: float
) -> None:
    where = decide([{"CPU": 16, "GPU": gpus}], config(), runs)
    assert (where.device, where.mesh.towers, where.tower["GPU"]) == ("cuda", towers, share)


@pytest.mark.parametrize(
    ("nodes", "given", "message"),
    [
        ([{"CPU": 4, "GPU": 1}], {"towers": 2}, "2 towers need 2 GPUs, the cluster has 1"),
        ([{"CPU": 4}], {"device": "cuda"}, "2 towers need 2 GPUs, the cluster has 0"),
        ([{"CPU": 4, "GPU": 2}], {"replicas": 2}, "4 towers need 4 GPUs, the cluster has 2"),
        (
            [{"CPU": 8}, {"CPU": 8, "GPU": 2, "augment": 1}],
            {"device": "cuda"},
            "2 towers need 2 GPUs, the cluster has 0 on nodes for towers; --towers 1",
        ),
        ([{"CPU": 64, "GPU": 1}], {"runs": 21}, "21 towers do not fit on 1 GPUs, 20 each at most"),
        ([{"CPU": 0}], {}, "2 towers and 1 augmenters need at least 0.15, the cluster has 0"),
        ([{"CPU": 1}], {"augmenters": "30:30"}, "not enough CPUs: 2 towers and 30 augmenters"),
    ],
)
def test_what_is_missing_is_said(nodes: list[Node], given: dict[str, object], message: str) -> None:
    runs = int(str(given.pop("runs", 0)))
    with pytest.raises(UserError, match=message):
        decide(nodes, config(**given), runs)


@pytest.mark.parametrize(
    ("nodes", "mesh", "want"),
    [
        ("ab", Mesh(1, 1, 2), [0, 1]),
        ("abab", Mesh(2, 1, 2), [0, 2, 1, 3]),
        ("abbaab", Mesh(1, 2, 2), [0, 3, 1, 2]),
        ("aabbbb", Mesh(1, 2, 2), [2, 3, 4, 5]),
        ("abcd", Mesh(1, 2, 2), [0, 1, 2, 3]),
    ],
)
def test_pairs_sit_on_one_node_where_they_can(nodes: str, mesh: Mesh, want: list[int]) -> None:
    assert seats(nodes, mesh) == want


@pytest.mark.parametrize("nodes", ["aaabbb", "abcabcabc", "aabbbbcc", "aaaaaaaa"])
@pytest.mark.parametrize("mesh", [Mesh(1, 2, 2), Mesh(2, 1, 2), Mesh(3, 1, 2), Mesh(2, 2, 1)])
def test_every_rank_has_a_seat_of_its_own(nodes: str, mesh: Mesh) -> None:
    if len(nodes) >= mesh.size:
        taken = seats(nodes[: mesh.size], mesh)
        assert sorted(taken) == list(range(mesh.size))


@pytest.mark.parametrize(
    ("nodes", "given", "wishes"),
    [
        ([{"CPU": 4, "GPU": 4}], {"replicas": 4}, [[{"GPU": 1}] * 8]),
        ([{"CPU": 4}], {"device": "cuda", "towers": 1}, [[{"GPU": 1}]]),
        ([{"CPU": 0}], {}, [[{"GPU": 1}] * 2, [{"CPU": 1}] * 3]),
        ([{"CPU": 0}], {"device": "cpu", "stages": 2}, [[{"CPU": 1}] * 5]),
    ],
)
def test_what_a_cluster_is_asked_to_start(
    nodes: list[Node], given: dict[str, object], wishes: list[list[Node]]
) -> None:
    with pytest.raises(Lacking) as lacking:
        decide(nodes, config(**given))
    assert list(lacking.value.wishes) == wishes
