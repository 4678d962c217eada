"""The cluster files are such as Ray's own loader accepts, pinned as the project is, and closed."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from workers.placement import AUGMENT, TOWERS

ROOT = Path(__file__).parents[1]
CLOUDS = ("cluster.yaml", "clusters/gcp.yaml")
LAUNCHED = (*CLOUDS, "clusters/local.yaml")
# Fields of KubeRay's ray.io/v1 types RayClusterSpec, WorkerGroupSpec and RayJobSpec (1.5) in use.
CLUSTER = {
    "rayVersion": str,
    "authOptions": dict,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
}
GROUP = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": dict,
    "template": dict,
}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


def python() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"]


@pytest.fixture
def kubernetes() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((ROOT / "clusters/kuberay.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_it(name: str) -> None:
    filled = prepare_config(load(name))
    validate_config(filled)
    if name in CLOUDS:
        assert filled["available_node_types"]["augment"]["max_workers"] == 16
    else:
        assert filled["max_workers"] == 2


def test_ray_refuses_what_it_does_not_know() -> None:
    cluster = load("cluster.yaml")
    cluster["available_node_types"]["augment"]["most_workers"] = 3
    with pytest.raises(Exception, match="most_workers"):
        validate_config(cluster)


@pytest.mark.parametrize("name", CLOUDS)
def test_towers_and_augmenters_have_nodes_of_their_own(name: str) -> None:
    cluster = load(name)
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] == "head"
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert TOWERS in kinds["towers"]["resources"]
    assert AUGMENT in kinds["augment"]["resources"]
    assert AUGMENT not in kinds["towers"]["resources"]
    assert kinds["towers"]["min_workers"] == 1
    assert kinds["augment"]["min_workers"] == 0
    assert kinds["augment"]["idle_timeout_s"] < kinds["towers"]["idle_timeout_s"]
    assert sum(kinds[kind]["max_workers"] for kind in (TOWERS, AUGMENT)) == cluster["max_workers"]
    assert "spot" in json.dumps(kinds["augment"]["node_config"]).lower()
    assert "spot" not in json.dumps(kinds["towers"]["node_config"]).lower()


@pytest.mark.parametrize("name", LAUNCHED)
def test_nodes_have_the_versions_that_the_project_is_tested_with(name: str) -> None:
    setup = load(name)["setup_commands"]
    interpreters = re.findall(r"(?:--python |python)(\d\.\d+)", "\n".join(setup))
    assert interpreters == [python()]
    install = next(command for command in setup if "-e ~/towers" in command)
    assert "-c ~/towers/constraints.txt" in install  # which pins ray


@pytest.mark.parametrize("name", LAUNCHED)
def test_who_gets_in_holds_the_token(name: str) -> None:
    cluster = load(name)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    head, worker = (cluster[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert {".git", ".venv", "runs", "shards"} <= set(cluster["rsync_exclude"])


def test_aws_nodes_ask_for_imdsv2_and_have_a_role() -> None:
    for kind, node in load("cluster.yaml")["available_node_types"].items():
        config = node["node_config"]
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        role = "towers-head" if kind == "head" else "towers-node"
        assert config["IamInstanceProfile"]["Name"] == role


def test_the_account_has_what_the_aws_file_names() -> None:
    """Asked of cfn-lint, which knows the resources' published schemas."""
    from cfnlint.api import lint_all

    text = (ROOT / "clusters/aws-account.yaml").read_text()
    assert not [match for match in lint_all(text) if not match.rule.id.startswith("I")]
    cluster = load("cluster.yaml")
    assert f"GroupName: {cluster['provider']['security_group']['GroupName']}\n" in text
    for name in ("towers-head", "towers-node"):
        assert f"InstanceProfileName: {name}," in text
    assert "0.0.0.0/0" not in text


def test_kubernetes_has_the_same_kinds_of_nodes(kubernetes: dict[str, dict[str, Any]]) -> None:
    spec = kubernetes["RayCluster"]["spec"]
    assert kubernetes["RayCluster"]["apiVersion"] == "ray.io/v1"
    assert {field: type(value) for field, value in spec.items()} == CLUSTER
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for name, group in groups.items():
        assert {field: type(value) for field, value in group.items()} == GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        # The shell takes one layer of quotes off.
        resources = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert resources == {name: 1}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert set(groups) == {TOWERS, AUGMENT}
    limits = groups["towers"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] >= 2


def test_kubernetes_pods_have_shared_memory_and_the_projects_versions(
    kubernetes: dict[str, dict[str, Any]],
) -> None:
    spec = kubernetes["RayCluster"]["spec"]
    assert spec["rayVersion"] == pinned("ray")
    tag = f"towers:ray{pinned('ray')}-py{python().replace('.', '')}"
    dockerfile = (ROOT / "clusters/Dockerfile").read_text()
    assert f"FROM python:{python()}-slim" in dockerfile
    assert f"-t {tag} ." in dockerfile
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == kubernetes["ServiceAccount"]["metadata"]["name"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert container["image"] == tag
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        size, memory = (
            int(text.removesuffix("Gi"))
            for text in (
                volume["emptyDir"]["sizeLimit"],
                container["resources"]["limits"]["memory"],
            )
        )
        # Ray's object store takes 30% of a node's memory.
        assert volume["emptyDir"]["medium"] == "Memory"
        assert 0.3 * memory <= size < memory


def test_the_kubernetes_job_runs_on_that_cluster(kubernetes: dict[str, dict[str, Any]]) -> None:
    from workers.cli import parser

    job, name = kubernetes["RayJob"]["spec"], kubernetes["RayCluster"]["metadata"]["name"]
    assert job["clusterSelector"] == {"ray.io/cluster": name}
    program, *arguments = job["entrypoint"].split()
    assert program == "towers"
    assert parser().parse_args(arguments).network == "alexnet"
