"""`ray up cluster.yaml` against a server that speaks AWS's protocols, in the account of
clusters/aws-account.yaml: as far as the head, an instance that no SSH leads to.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.ec2.models.instance_types import InstanceTypeBackend
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SSH_FROM = "203.0.113.7/32"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Makes clients of a server of our own, where the account's stack is deployed."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
        monkeypatch.delenv(name)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the key
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # and what it has asked AWS
    file = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    # Of 1,400 types of machines those of the file: the server takes seconds to describe all.
    wanted = [kind["node_config"]["InstanceType"] for kind in file["available_node_types"].values()]
    known = [kind for kind in InstanceTypeBackend.instance_types if kind["InstanceType"] in wanted]
    monkeypatch.setattr(InstanceTypeBackend, "instance_types", known)
    region = file["provider"]["region"]
    boto3.client("cloudformation", region_name=region).create_stack(
        StackName="towers",
        TemplateBody=(ROOT / "clusters/aws-account.yaml").read_text(),
        Parameters=[{"ParameterKey": "SshFrom", "ParameterValue": SSH_FROM}],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    yield lambda service: boto3.client(service, region_name=region)
    server.stop()


def test_ray_up_starts_the_head_that_the_file_describes(
    client: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    ec2, log = client("ec2"), tmp_path / "log"
    with log.open("w") as out:
        up = subprocess.Popen(
            [f"{BIN}/ray", "up", "--yes", "cluster.yaml"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while "Launched a new head node" not in log.read_text():
            assert up.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(up.pid, signal.SIGKILL)
        up.wait()
    (reservation,) = ec2.describe_instances()["Reservations"]
    (instance,) = reservation["Instances"]
    kinds = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    wanted = kinds["head"]["node_config"]
    for name in ("InstanceType", "ImageId"):
        assert instance[name] == wanted[name]
    tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    assert tags["ray-cluster-name"] == "towers"  # by which the head's role may end nodes
    assert (tags["ray-node-type"], tags["ray-user-node-type"]) == ("head", "head")
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert instance["IamInstanceProfile"]["Arn"].endswith("instance-profile/towers-head")
    (disk,) = instance["BlockDeviceMappings"]
    (volume,) = ec2.describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"]
    assert (volume["Encrypted"], volume["Size"]) == (True, 200)
    # The key that Ray made is here, and nobody else's to read.
    key = tmp_path / ".ssh" / f"{instance['KeyName']}.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    # The stack's group as it was: SSH from one place, all else from the group's own members.
    (group,) = instance["SecurityGroups"]
    assert group["GroupName"] == "towers"
    (found,) = ec2.describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"]
    ssh, inside = sorted(found["IpPermissions"], key=lambda rule: -rule.get("FromPort", -1))
    assert (ssh["FromPort"], ssh["ToPort"]) == (22, 22)
    assert [place["CidrIp"] for place in ssh["IpRanges"]] == [SSH_FROM]
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group["GroupId"]]
    assert not inside["IpRanges"]
    # What Ray has learned of the others' machines, and that AWS knows all that is said of them.
    learned = json.loads(next(tmp_path.glob("ray-config-*")).read_text())["config"]
    types = learned["available_node_types"]
    assert types["towers"]["resources"]["GPU"] >= 2
    assert "GPU" not in types["augment"]["resources"]
    for kind, market in (("towers", None), ("augment", "spot")):
        described = kinds[kind]["node_config"]
        (node,) = ec2.run_instances(MinCount=1, MaxCount=1, **described)["Instances"]
        assert node["InstanceType"] == described["InstanceType"]
        assert node.get("InstanceLifecycle") == market
