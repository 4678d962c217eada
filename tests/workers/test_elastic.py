"""Nodes of augmenters join and leave inside a run, and the towers don't notice; a
node of theirs is lost, and the run goes on as if it had not been.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.workers.waiting import until
from workers.config import configure
from workers.progress import Progress
from workers.run import checkpoints
from workers.supervisor import train

pytestmark = pytest.mark.own_ray
GIVEN = {
    "network": "alexnet-mini",
    "batch": 8,
    "epochs": 1000,
    "log_every": 1,
    "augmenters": "1:2",
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head, and a node for the towers."""
    ray.shutdown()  # the cluster of the other tests here
    # A killed node is missed after 5 checks.
    head = {"num_cpus": 2, "_system_config": {"health_check_period_ms": 1000}}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=2, resources={"towers": 1})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run, "metrics.jsonl") if line["split"] == "train"]


def fleets(run: Path) -> list[dict[str, Any]]:
    return [event for event in lines(run, "events.jsonl") if event["event"] == "fleet"]


class Enough(Exception):
    """The test has seen it."""


class Ending(Progress):
    """Ends a run once it is told to."""

    told = False

    def step(self, report: dict[str, Any]) -> None:
        super().step(report)
        if self.told:
            raise Enough


def test_nodes_join_and_leave(
    nodes: Cluster, shards: str, tmp_path: Path, processes: Callable
) -> None:
    """The case that stalled Ray Data for good: a node of augmenters is removed with many batches
    to go; first by its leave, then killed.
    """
    here = [nodes.add_node(num_cpus=2, resources={"augment": 1})]
    run = tmp_path / "run"
    config = configure({**GIVEN, "shards": shards, "run": str(run)})
    progress, gone = Ending(), []

    def work() -> None:
        with pytest.raises(Enough):
            train(config, progress=progress)

    job = threading.Thread(target=work)  # nodes can only be added from the main thread
    job.start()
    try:
        until(lambda: len(trained(run)) > 20, 240)
        towers = processes("ray::TowerActor")
        for graceful in (True, False):
            here.append(nodes.add_node(num_cpus=2, resources={"augment": 1}))
            # One augmenter may be enough: nobody needs the new node until the other one goes.
            gone.append(here.pop(0))
            left = time.time()
            nodes.remove_node(gone[-1], allow_graceful=graceful)
            until(lambda node=gone[-1]: node.node_id in fleets(run)[-1]["lost"], 240)
            made_by = here[-1].node_id[:8]
            until(lambda by=made_by: any(by in line["made_by"] for line in trained(run)[-20:]), 240)
            # Far more than were made already when it went.
            until(lambda at=left: sum(line["time"] > at for line in trained(run)) > 100, 240)
            assert processes("ray::TowerActor") == towers
    finally:
        progress.told = True
        job.join(120)
    events = [event["event"] for event in lines(run, "events.jsonl")]
    assert events.count("start") == 1
    steps = trained(run)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    epochs = [list(rows) for _, rows in itertools.groupby(steps, key=lambda line: line["epoch"])]
    assert all(sum(sum(line["made_by"].values()) for line in rows) == 150 for rows in epochs[:-1])
    # By the nodes set aside for it, though others had cores to spare.
    augment = {node.node_id[:8] for node in (*here, *gone)}
    assert set().union(*(line["made_by"] for line in steps)) == augment


def test_a_node_is_lost_that_holds_the_towers_and_the_feed(
    longer: str, nodes: Cluster, shards: str, tmp_path: Path
) -> None:
    nodes.add_node(num_cpus=2, resources={"towers": 1})  # where they can go
    run = tmp_path / "run"
    given = {"network": "alexnet-mini", "batch": 64, "epochs": 20, "steps": 30}
    given |= {"augmenters": "1:1", "log_every": 1, "checkpoint_every": 2}
    config = configure({**given, "shards": shards, "run": str(run)})
    result: dict[str, Any] = {}
    job = threading.Thread(target=lambda: result.update(train(config, progress=Progress())))
    job.start()
    try:
        while not checkpoints(str(run)) and job.is_alive():
            time.sleep(0.05)
        groups = ray.util.placement_group_table().values()
        there = [group for group in groups if group["state"] == "CREATED"]
        (home,) = {node for group in there for node in group["bundles_to_node_id"].values()}
        lost = next(node for node in nodes.worker_nodes if node.node_id == home)
        nodes.remove_node(lost, allow_graceful=False)
    finally:
        job.join(300)
    assert result["restarts"] == 1
    assert result["weights_sha256"] == longer
