"""Ray's autoscaler with the node types of cluster.yaml, none of them there: nodes for the towers,
then for the fleet alone, and these go.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.util import get_node_ip_address

pytestmark = pytest.mark.own_ray
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# What Ray learns from AWS of the types' machines, but for their size.
MACHINES = {
    "towers": {"CPU": 2, "GPU": 4, "memory": 2**31},
    "augment": {"CPU": 2, "memory": 2**31},
}
AUGMENT_NODES = 2  # at most, not 16: each is a few processes on this machine
# Tells the types of the cluster's nodes, a line a look.
WATCH = """
import sys, time
from ray.autoscaler.v2.sdk import get_cluster_status

while True:
    try:
        status = get_cluster_status(sys.argv[1])
        nodes = status.active_nodes + status.idle_nodes
        print(*(node.ray_node_type_name for node in nodes), flush=True)
    except Exception:
        print(flush=True)
    time.sleep(0.3)
"""

# Where runs of one and of eight pairs of towers go.
PLACE = """
import ray
from workers.config import UserError, configure
from workers.room import place

ray.init(log_to_driver=False)
for replicas in 1, 8:
    given = {"run": "r", "shards": "s", "device": "cuda", "replicas": replicas}
    try:
        where = place(configure(given), lambda line: print(line, flush=True))
        print(where.mesh.size, where.tower)
    except UserError as error:
        print(error)
"""


class Nodes(FakeMultiNodeProvider):
    """Ray's provider for tests, whose nodes are processes here; none before a file is there."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        while not Path(self.provider_config["gate"]).exists():
            time.sleep(0.1)
        own = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, own, labels)


def cluster_file(gcs: str, gate: str) -> dict[str, Any]:
    """cluster.yaml with nodes that are processes here, fewer, and less patience for idle ones."""
    file = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    kinds = file["available_node_types"]
    for name, kind in kinds.items():
        kind["node_config"] = {}
        kind["resources"] |= MACHINES.get(name, {})
    kinds["towers"]["min_workers"] = 0
    kinds["augment"]["max_workers"] = AUGMENT_NODES
    kinds["augment"]["idle_timeout_s"] /= 40
    kinds[FAKE_HEAD_NODE_TYPE] = kinds.pop(file["head_node_type"])
    commands = ("initialization", "setup", "head_setup", "worker_setup")
    return file | {
        "provider": {
            "type": "external",
            "module": f"{__name__}.{Nodes.__name__}",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "gcs_address": gcs,
            "gate": gate,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in commands},
    }


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """What a user's shell on the head has: the cluster's address and token."""
    with socket.socket() as s:
        s.bind(("", 0))
        address = f"{get_node_ip_address()}:{s.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        file = cluster_file(address, f"{folder}/gate")
        (Path(folder) / "cluster.yaml").write_text(yaml.safe_dump(file))
        yield {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CUDA_"))} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
        }


@pytest.fixture
def nodes(environment: dict[str, str]) -> Iterator[Callable[[int], None]]:
    """Waits until so many augment nodes are there, beside the head and one towers node; more there
    must never be.
    """
    address, folder = environment["RAY_ADDRESS"], environment["RAY_TMPDIR"]
    command = [f"{BIN}/ray", "start", "--block", "--head", f"--port={address.split(':')[1]}"]
    command += ["--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"]
    command += [f"--autoscaling-config={folder}/cluster.yaml", "--dashboard-agent-listen-port=0"]
    # As `ray up` starts it, and for a provider whose nodes know themselves by Ray's own names.
    given = environment | {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "RAY_FAKE_CLUSTER": "1",
        "PYTHONPATH": str(ROOT),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1",
    }
    with (Path(folder) / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=given, stdout=log, stderr=log, start_new_session=True)
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH, address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def until(augmenting: int) -> None:
        # Ray Data's own request would stand for 180 s after its process was killed.
        deadline = time.monotonic() + (400 if augmenting else 150)
        assert watch.stdout
        for line in watch.stdout:
            found = line.split()
            assert found.count("towers") <= 1
            assert found.count("augment") <= AUGMENT_NODES
            if found.count("towers") == 1 and found.count("augment") == augmenting:
                return
            if time.monotonic() > deadline:
                command = [f"{BIN}/ray", "status", "-v", f"--address={address}"]
                pytest.fail(
                    subprocess.run(command, env=environment, capture_output=True, text=True).stdout
                )

    try:
        assert watch.stdout
        deadline = time.monotonic() + 200
        while not watch.stdout.readline().strip():  # the head is not there
            assert time.monotonic() < deadline, (Path(folder) / "head.log").read_text()
        yield until
    finally:
        watch.kill()
        watch.wait()
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)


def test_a_run_gets_nodes_for_towers_and_a_starved_one_for_augmenters_which_go_when_it_ends(
    nodes: Callable[[int], None], environment: dict[str, str], large_shards: str, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PLACE],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as asked:
        try:
            assert asked.stdout
            waiting = "waiting for nodes that the cluster is starting\n"
            assert asked.stdout.readline() == waiting
            Path(environment["RAY_TMPDIR"], "gate").touch()
            nodes(0)
            assert asked.stdout.readline() == "2 {'CPU': 0.65, 'GPU': 1, 'towers': 0.001}\n"
            assert asked.stdout.readline() == waiting
            lacking = "not enough devices: 16 towers need 16 GPUs, the cluster has 4 on nodes for"
            assert asked.stdout.read().startswith(lacking)
        finally:
            asked.kill()
    options = ["--network", "alexnet-mini", "--batch", "8", "--epochs", "1000", "--device", "cpu"]
    # Without a cache one augmenter is too few in later epochs too.
    options += ["--augmenters", "1:9", "--cache", "0", "--log-every", "1"]
    options += ["--run", str(tmp_path / "run")]
    with subprocess.Popen(
        [f"{BIN}/towers", "train", large_shards, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        try:
            nodes(AUGMENT_NODES)
            run.terminate()
            assert run.stdout
            assert "stopped by SIGTERM" in run.stdout.read()
        finally:
            run.kill()
    nodes(0)
