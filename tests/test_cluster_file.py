"""`cluster.yaml` is one that Ray's own loader accepts, and has the three kinds of nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from workers.placement import AUGMENT, TOWERS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    filled = prepare_config(cluster)
    validate_config(filled)
    assert filled["available_node_types"]["augment"]["max_workers"] == 16


def test_ray_refuses_what_it_does_not_know(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["augment"]["most_workers"] = 3
    with pytest.raises(Exception, match="most_workers"):
        validate_config(cluster)


def test_towers_and_augmenters_have_nodes_of_their_own(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert TOWERS in kinds["towers"]["resources"]
    assert AUGMENT in kinds["augment"]["resources"]
    assert AUGMENT not in kinds["towers"]["resources"]


def test_nodes_run_the_ray_that_the_project_is_tested_with(cluster: dict[str, Any]) -> None:
    pinned = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:5] == "ray=="
    )
    assert any(pinned.split("==")[1] in command for command in cluster["setup_commands"])
