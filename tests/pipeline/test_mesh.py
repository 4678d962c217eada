"""Every rank has one place in the mesh, and a mesh that cannot be is refused."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks, devices

from pipeline import host
from pipeline.mesh import Mesh


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 2))
def test_every_place_has_one_rank_and_towers_are_neighbours(
    replicas: int, stages: int, towers: int
) -> None:
    mesh = Mesh(replicas, stages, towers)
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert places == [
        (r, s, t) for r in range(replicas) for s in range(stages) for t in range(towers)
    ]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"replicas": 0}, "replicas is 0: at least 1"),
        ({"stages": 0}, "stages is 0: at least 1"),
        ({"towers": 3}, "towers is 3: 1 or 2"),
        ({"towers": 0}, "towers is 0: 1 or 2"),
    ],
)
def test_mesh_refuses(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh(**axes)


def test_a_mesh_prints_as_its_axes() -> None:
    assert str(Mesh(4, 1, 2)) == "4x1x2"
    assert Mesh() == Mesh(1, 1, 2)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 60))
def test_a_batch_divides_or_is_refused(replicas: int, microbatches: int, batch: int) -> None:
    mesh, parts = Mesh(replicas), replicas * microbatches
    if batch % parts == 0:
        mesh.check_batch(batch, microbatches)
        return
    message = (
        f"a batch of {batch} does not divide over {replicas} replicas x "
        f"{microbatches} micro-batches: take a multiple of {parts}"
    )
    with pytest.raises(ValueError, match=message):
        mesh.check_batch(batch, microbatches)


@pytest.mark.parametrize(("batch", "microbatches"), [(0, 1), (-4, 1), (8, 0), (8, -1)])
def test_no_batch_and_no_micro_batch_are_refused(batch: int, microbatches: int) -> None:
    with pytest.raises(ValueError, match=f"a batch of {batch} does not divide over 2 replicas x"):
        Mesh(2).check_batch(batch, microbatches)


def members(mesh: Mesh) -> tuple[int, list[int], list[int]]:
    """This rank, its pair and its replicas."""
    groups = devices(mesh)
    assert groups
    pair, replicas = (
        dist.get_process_group_ranks(groups.get_group(axis)) for axis in ("tower", "replica")
    )
    return dist.get_rank(), pair, replicas


def test_groups_are_the_pairs_and_the_replicas_of_each_tower(four: Ranks) -> None:
    assert four.run(members, Mesh(2, 1, 2)) == [
        (0, [0, 1], [0, 2]),
        (1, [0, 1], [1, 3]),
        (2, [2, 3], [0, 2]),
        (3, [2, 3], [1, 3]),
    ]


def problem(mesh: Mesh) -> str:
    try:
        mesh.groups("cpu")
    except ValueError as problem:
        return str(problem)
    return ""


def test_a_mesh_of_another_size_than_the_ranks_is_refused(pair: Ranks) -> None:
    assert pair.run(problem, Mesh(2, 1, 2)) == ["2 ranks for a mesh of 4"] * 2


def test_a_single_rank_needs_no_groups() -> None:
    assert Mesh(towers=1).groups("cpu") is None


def keep_memory() -> bool:
    return host.keep_memory()


def test_keeping_memory_says_whether_it_could(pair: Ranks) -> None:
    assert pair.run(keep_memory) == [platform.libc_ver()[0] == "glibc"] * 2
