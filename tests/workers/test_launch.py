"""`ray up clusters/local.yaml`, really run: hosts with a network, processes and an SSH server each.

A host is a few Linux namespaces with files of its own over this machine's, so that all is as in the
file, its addresses too, and all of it ends with the host. Where they may not be made, tests skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import native

pytestmark = pytest.mark.own_ray

ROOT = Path(__file__).parents[2]
NETWORK = "192.0.2"  # of the file
NEEDED = ("unshare", "nsenter", "ip", "pkill", "ssh", "ssh-keygen", "/usr/sbin/sshd", "rsync")
SPACES = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
PROGRAM = """
set -e
mount --bind {shared} /mnt; mount --bind {root} /srv; mount -t tmpfs tmpfs /tmp
mkdir -p {root}; mount --move /srv {root}  # which may lie in /tmp
for folder in /home /run /var/log /dev/shm; do mount -t tmpfs tmpfs $folder; done
mkdir -m 755 /run/sshd; mkdir -p /home/ubuntu/.ssh; cd /home/ubuntu
echo 'ubuntu:*:0:0::/home/ubuntu:/bin/bash' | cat - /etc/passwd > /run/passwd
mount --bind /run/passwd /etc/passwd
hostname {name}; echo '127.0.0.1 localhost {name}' > /run/hosts; mount --bind /run/hosts /etc/hosts
true > /run/names; mount --bind /run/names /etc/resolv.conf  # or each name is waited for
cp /mnt/key .ssh/id_ed25519; cp /mnt/key.pub .ssh/authorized_keys; chmod -R go= .ssh
ln -s {venv} venv; ln -s /mnt/cache .cache; echo {role} > towers.role
echo export AUTOSCALER_UPDATE_INTERVAL_S=1 > .bashrc  # else every 5 s
ip link set lo up
echo ready
read -r network  # there now
/usr/sbin/sshd -D -e -f /dev/null -h /home/ubuntu/.ssh/id_ed25519 -o PidFile=none \
    -o PermitRootLogin=prohibit-password -o StrictModes=no \
    -o Subsystem='sftp internal-sftp' 2> /mnt/sshd-{name}.log &
read -r end || true  # until the test closes it, or ends; this shell is the host's process 1
"""


class Host:
    """A machine of the test. The first one has the bridge that the others are plugged into."""

    def __init__(self, number: int, shared: Path, role: str = "") -> None:
        self.address = f"{NETWORK}.{number}"
        program = PROGRAM.format(
            name=f"host{number}", shared=shared, root=ROOT, venv=sys.prefix, role=role
        )
        self.process = subprocess.Popen(
            [*SPACES, "--kill-child", "bash", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def plug(self, switch: Host) -> None:
        """Gives it its address, on the bridge of `switch`, once its files are there."""
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        self.pid = int(Path(children).read_text())
        inside = ("nsenter", f"--target={switch.pid}", "--net", "ip")
        if self is switch:
            _do(*inside, "link", "add", "eth0", "type", "bridge")
        else:
            end = f"to{self.address.rsplit('.', 1)[1]}"
            peer = ("peer", "name", "eth0", "netns", str(self.pid))
            _do(*inside, "link", "add", end, "type", "veth", *peer)
            _do(*inside, "link", "set", end, "master", "eth0", "up")
        own = ("nsenter", f"--target={self.pid}", "--net", "ip")
        _do(*own, "address", "add", f"{self.address}/24", "dev", "eth0")
        _do(*own, "link", "set", "eth0", "up")
        _do(*own, "route", "add", "default", "dev", "eth0")  # by which Ray finds its own address
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def start(self, command: str, **given: Any) -> subprocess.Popen[str]:
        """Starts what its user types into a login shell."""
        clean = ("env", "-i", "HOME=/home/ubuntu", "USER=ubuntu", "LANG=C.UTF-8")
        path = f"PATH={sys.prefix}/bin:{os.environ['PATH']}"
        line = f"cd {ROOT}; export RAY_AUTH_MODE=token; {command}"
        return subprocess.Popen(
            [*("nsenter", f"--target={self.pid}", "--all"), *clean, path, "bash", "-c", line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **given,
        )

    @property
    def home(self) -> Path:
        return Path(f"/proc/{self.pid}/root/home/ubuntu")

    def run(self, command: str, timeout: float = 120) -> str:
        """What the command says. It must succeed."""
        with self.start(command) as process:
            try:
                said, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                said = "it took too long: " + process.communicate()[0]
        assert process.returncode == 0, said
        return said

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Callable[..., Host]]]:
    """A folder that all hosts have as /mnt, and what adds a host. The first is the user's own."""
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        pytest.skip(
            f"needs {', '.join(missing)}: Debian's openssh-server, iproute2, procps and rsync"
        )
    if why := subprocess.run([*SPACES, "true"], capture_output=True, text=True).stderr:
        pytest.skip(f"may not make hosts here: {why.strip()}")
    shared = tmp_path_factory.mktemp("shared")
    shutil.copytree(native._cache(), shared / "cache/towers")  # what is compiled once a machine
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(shared / "key"))
    made: list[Host] = []
    with ExitStack() as stack:

        def add(number: int, role: str = "") -> Host:
            host = Host(number, shared, role)
            stack.callback(host.end)
            made.append(host)
            host.plug(made[0])
            return host

        yield shared, add


def _until(seen: Callable[[], Any], what: str, seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := seen()):
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return found


def _fleet(run: Path) -> set[str]:
    """The nodes whose batches the run has had."""
    file = run / "events.jsonl"
    events = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {node for event in events if event["event"] == "fleet" for node in event["nodes"]}


def test_ray_up_train_join_and_ray_down(
    hosts: tuple[Path, Callable[..., Host]], large_shards: str
) -> None:
    shared, add = hosts
    run = shared / "run"
    shutil.copytree(large_shards, shared / "shards")
    user = add(10)
    head, worker, helper = add(1), add(2, "towers"), add(3)
    # As it is, but for the installation, which is there, and the machine that joins later.
    file = yaml.safe_load((ROOT / "clusters/local.yaml").read_text())
    assert file["provider"]["head_ip"] == head.address
    assert file["provider"]["worker_ips"] == [worker.address, helper.address]
    file["provider"]["worker_ips"] = [worker.address]
    file["setup_commands"] = [c for c in file["setup_commands"] if "pip install" not in c]
    (shared / "local.yaml").write_text(yaml.safe_dump(file))

    user.run("ray get-auth-token --generate")
    shutil.copy(user.home / ".ray/auth_token", shared)
    user.run("ray up --yes /mnt/local.yaml")
    # At once: the towers' machine is still on its way. Without a cache, or one augmenter would do.
    job = user.start(
        "towers submit --cluster /mnt/local.yaml -- train /mnt/shards --run /mnt/run"
        " --network alexnet-mini --batch 8 --epochs 1000 --augmenters 1:2 --cache 0 --log-every 1"
    )
    with job:
        try:
            assert job.stdout
            name = job.stdout.readline().split(":")[0]
            said = [next(line for line in job.stdout if " images/s " in line)]
            first = _until(lambda: _fleet(run), "no fleet")
            # A machine joins, as the file says; it has the token as the others have.
            helper.run("mkdir -m 700 ~/.ray && cp /mnt/auth_token ~/.ray")
            helper.run(f"ray start --address={head.address}:6379 --resources='{{\"augment\": 1}}'")
            user.run("pkill -x ssh")  # the tunnel
            _until(lambda: _fleet(run) - first, "no batch of the machine that joined")
            assert "told to stop" in user.run(f"towers stop {name} --cluster /mnt/local.yaml")
            said += job.stdout
            assert job.wait(60) == 1  # it is not done
            assert re.search(r"stopped by SIGTERM at .*--resume goes on from there", said[-1])
        finally:
            job.kill()
    # Nothing of the log is missing or twice, though the tunnel went.
    assert "".join(said) in user.run(f"towers logs {name} --cluster /mnt/local.yaml")
    user.run("ray down --yes /mnt/local.yaml")
    assert not head.run("pgrep raylet || true")
