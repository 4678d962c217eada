"""The tunnel to a cluster ends with whoever opened it. The SSH server is a real one, started by the
client itself: no port of it is open.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SSHD = "/usr/sbin/sshd"
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background is without
from workers.tunnel import tunnel
with tunnel(sys.argv[1]) as address:
    print(address, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def cluster(tmp_path: Path, headed: Callable[..., Path]) -> Path:
    """A cluster file whose head is this machine, behind an SSH server."""
    if missing := [name for name in (SSHD, "ssh", "ssh-keygen") if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(missing)}: Debian's openssh-server")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    key, user = tmp_path / "key", getpass.getuser()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    server = [f"{SSHD} -i -f /dev/null -h {key} -o AuthorizedKeysFile={key}.pub"]
    server += ["StrictModes=no", "PermitRootLogin=prohibit-password", "UsePAM=no"]
    proxy = " -o ".join(server)
    return headed(ssh_user=user, ssh_private_key=str(key), ssh_proxy_command=proxy)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_who_opened_it(number: int, cluster: Path, tmp_path: Path) -> None:
    opened = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(cluster)],
        env=os.environ | {"TMPDIR": str(tmp_path), "RAY_TMPDIR": str(tmp_path)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert opened.stdout
        assert opened.stderr
        address = opened.stdout.readline()
        assert address, opened.stderr.read()
        port = int(address.rsplit(":", 1)[1])
        assert listens(port)
        opened.send_signal(number)
        opened.wait(30)
    finally:
        opened.kill()
    deadline = time.monotonic() + 30
    while listens(port) or str(cluster) in commands():
        assert time.monotonic() < deadline, commands()
        time.sleep(0.1)


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def commands() -> str:
    """The command lines of all processes."""
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return found.stdout
