"""A job on a cluster that runs already: `ray start`, a node of augmenters, `ray job submit`."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus

from workers.cli import main
from workers.config import UserError
from workers.jobs import Unwritten, follow, package_size, submit

pytestmark = pytest.mark.own_ray
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PYTHON = '"{}.{}.'.format(*sys.version_info)  # as the dashboard begins to tell it


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """What a user's shell has: the project's programs first, and the cluster's token.

    Ray's files lie apart, so that it does not look for this cluster after the test.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield kept | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": folder,
        }


@pytest.fixture(scope="module")
def dashboard(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A head and a node that takes augmenters, started as a user starts them."""
    logs = tmp_path_factory.mktemp("ray")
    gcs, http = free_port(), free_port()
    head = ("--head", f"--port={gcs}", f"--dashboard-port={http}", "--include-dashboard=true")
    # A node whose agent finds its usual port taken, as by another Ray here, takes no jobs.
    agent = "--dashboard-agent-listen-port=0"
    node = (f"--address=127.0.0.1:{gcs}", "--resources", '{"augment": 1}')
    # Nodes unpack a job's folder below their own: a second one there would do so amid the job.
    node += (f"--temp-dir={environment['RAY_TMPDIR']}/node",)
    started = []

    def start(name: str, *options: str) -> None:
        with (logs / name).open("w") as log:
            command = [f"{BIN}/ray", "start", "--block", "--num-cpus=2", agent, *options]
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    url = f"http://127.0.0.1:{http}"
    try:
        start("head.log", *head)
        _wait(url, environment["RAY_AUTH_TOKEN"], lambda nodes: nodes >= 1)
        start("node.log", *node)
        _wait(url, environment["RAY_AUTH_TOKEN"], lambda nodes: nodes >= 2)
        yield url
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, token: str, enough) -> None:  # type: ignore[no-untyped-def]
    request = urllib.request.Request(
        f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if enough(len(json.load(answer)["data"]["summary"])):
                    return
        except (urllib.error.URLError, OSError, KeyError):
            pass
        assert time.monotonic() < deadline, "the cluster did not come up"
        time.sleep(0.5)


def test_a_submitted_job_trains(
    dashboard: str, environment: dict[str, str], shards: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ["--network", "alexnet-mini", "--batch", "64", "--epochs", "1", "--run", str(run)]
    options += ["--augmenters", "1:1"]
    command = [
        *(f"{BIN}/ray", "job", "submit", "--address", dashboard, "--working-dir", "."),
        *("--", "towers", "train", shards, *options, "--json"),
    ]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        # Ray answers before the node's agent is up, which takes a while on few cores.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "top-1 error" in done.stdout
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events if event["event"] not in ("fleet", "stall")]
    assert kinds == ["start", "checkpoint", "end"]
    assert events[-1]["weights_sha256"] in done.stdout
    assert (run / "checkpoints" / "step-00000003" / ".metadata").exists()
    # Two nodes of two cores, one of them set aside: the towers have the other for themselves.
    assert "1 thread(s) each" in done.stdout


def towers(environment: dict[str, str], folder: Path, *arguments: str) -> Any:
    return subprocess.run(
        [f"{BIN}/towers", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


class Way:
    """A port of this machine that leads to another one while it is open; some of what comes from
    there may be replaced.
    """

    def __init__(self, target: int, replaced: tuple[str, str] = ("", "")) -> None:
        self.target, self.port = target, free_port()
        self.text, self.other = (text.encode() for text in replaced)
        self.ends: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def cut(self) -> int:
        """Closes it, and what goes through it; returns how many connections did."""
        count = len(self.ends) // 2
        for end in (self.listener, *self.ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.ends.clear()
        return count

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self.ends += (near, far)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data.replace(self.text, self.other))
            target.shutdown(socket.SHUT_WR)


def last(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The object that --json prints."""
    return json.loads(done.stdout.splitlines()[-1])


def test_towers_submit_sends_follows_and_returns_the_code(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "big").write_bytes(secrets.token_bytes(2**21))
    known = environment | {"RAY_API_SERVER_ADDRESS": dashboard}
    # As to a cluster of a newer Python, which is told and does no harm.
    newer = f"{sys.version_info.major}.{sys.version_info.minor + 1}"
    way = Way(int(dashboard.rsplit(":", 1)[1]), (PYTHON, f'"{newer}.'))
    to = ("--address", f"http://127.0.0.1:{way.port}", "--")
    done = towers(known, tmp_path, "submit", *to, "describe", "--network", "cifar")
    way.cut()
    assert done.returncode == 0, done.stdout + done.stderr
    note, sent = done.stderr.splitlines()
    assert f"PYTHON=python{newer}" in note
    assert done.stdout.count("conv1 ") == 1  # the log, once
    assert "a package of 0.00 MiB" in sent  # without the run
    job = sent.split(":")[0]

    mistake = towers(known, tmp_path, "submit", "--json", "--", "describe", "--network", "lenet")
    assert mistake.returncode == 2
    assert "network is 'lenet': one of" in mistake.stdout
    assert last(mistake) == {"job": mistake.stderr.split(":")[0], "exit_code": 2}

    listed = towers(known, tmp_path, "jobs").stdout
    assert job in listed
    assert "SUCCEEDED" in listed
    assert "FAILED" in listed
    log = towers(known, tmp_path, "logs", job, "--json")
    assert "conv1" in log.stdout
    assert last(log) == {"job": job, "state": "SUCCEEDED"}
    stopped = towers(known, tmp_path, "stop", job, "--json")
    assert "had ended already" in stopped.stdout
    assert last(stopped) == {"job": job, "stopping": False}


def test_a_log_goes_on_where_a_connection_dropped(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    lines = [f"line {number} é" for number in range(60)]
    program = f"""
import pathlib, time

lines = {lines}
print(*lines[:25], sep="\\n", flush=True)
for name, part in (("cut", lines[25:40]), ("again", lines[40:])):
    while not pathlib.Path({str(tmp_path)!r}, name).exists(): time.sleep(0.1)
    print(*part, sep="\\n", end="\\n" if name == "cut" else "", flush=True)
"""
    (tmp_path / "program.py").write_text(program)
    way = Way(int(dashboard.rsplit(":", 1)[1]))
    command = [f"{BIN}/ray", "job", "submit", "--no-wait", "--submission-id=long"]
    command += [f"--address={dashboard}", "--", sys.executable, str(tmp_path / "program.py")]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    address = f"--address=http://127.0.0.1:{way.port}"
    with subprocess.Popen(
        [f"{BIN}/towers", "logs", "long", "--follow", address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as following:
        try:
            assert following.stdout
            got = []
            while not got or got[-1] != f"{lines[24]}\n":  # after what Ray itself says
                got.append(next(following.stdout))
            assert way.cut() >= 1
            (tmp_path / "cut").touch()  # what is said meanwhile comes too
            with pytest.raises(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{way.port}")
            way.open()
            got += [next(following.stdout) for _ in lines[25:40]]
            assert way.cut() >= 1
            (tmp_path / "again").touch()
            way.open()
            got += following.stdout
            assert following.wait(60) == 0
        finally:
            following.kill()
            way.cut()
    assert [said for said in got if said.startswith("line")] == [f"{line}\n" for line in lines], got
    assert len(got) == len(set(got))


@pytest.mark.parametrize("command", [("logs", "none"), ("stop", "none"), ("stop", "01000000")])
def test_an_unknown_job_is_named(
    command: tuple[str, str], dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = towers(environment, tmp_path, *command, "--address", dashboard)
    assert done.returncode == 2
    assert done.stderr == f"towers: {command[1]}: no such job; `towers jobs` lists them\n"


def test_who_has_no_token_is_told(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    for token, said in ((None, "Authentication required"), ("0" * 64, "Authentication failed")):
        given = {k: v for k, v in environment.items() if k != "RAY_AUTH_TOKEN"}
        given |= {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        done = towers(given, tmp_path, "jobs", "--address", dashboard)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "RAY_AUTH_TOKEN" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        (
            (f'"{ray.__version__}"', f'"{ray.__version__[:-1]}9"'),
            rf"cluster has Ray {ray.__version__[:-1]}9, this machine {ray.__version__}: install",
        ),
        ((PYTHON, '"3.10.'), r"cluster has Python 3\.10\.\d+, Towers needs >=3\.11: name such"),
    ],
)
def test_a_cluster_of_another_version_is_told(
    replaced: tuple[str, str],
    said: str,
    dashboard: str,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    way = Way(int(dashboard.rsplit(":", 1)[1]), replaced)
    address = f"http://127.0.0.1:{way.port}"
    done = towers(environment, tmp_path, "submit", "--address", address, "--", "describe")
    way.cut()
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(said, done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is home to nobody's credentials, nor to the cluster files that Ray keeps."""
    for name in ("HOME", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # which those commands drop
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logging.disable(logging.NOTSET)  # which those commands do for all of their process


class Failing(BaseHTTPRequestHandler):
    """A dashboard that tells its version, and no more."""

    def do_GET(self) -> None:
        found = {"ray_version": ray.__version__, "ray_commit": "", "version": "4"}
        body = json.dumps(found | {"session_name": "", "data": {}, "msg": "no more"}).encode()
        self.send_response(200 if self.path.endswith("version") else 500)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("command", [("jobs",), ("submit", "--", "describe")])
def test_a_cluster_that_fails_later_is_told(
    command: tuple[str, ...], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert main([command[0], "--address", address, *command[1:]]) == 1
        server.shutdown()
    said = capfd.readouterr().err
    assert said.startswith(f"towers: {address}: the cluster failed: ")
    assert said.count("\n") == 1


class Done:
    """Stands for the client of a cluster whose job is done."""

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=JobStatus.SUCCEEDED, submission_id=job)

    def get_job_logs(self, job: str) -> str:
        return "a line"


def test_a_log_that_nobody_reads_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `towers logs JOB --follow | head`."""
    reader, pipe = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, suppress(OSError), os.fdopen(pipe, "w") as out:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(Unwritten) as told:
            follow(Done(), "job")  # type: ignore[arg-type]
    assert isinstance(told.value.args[0], BrokenPipeError)


def test_a_job_that_is_stopped_has_time_for_its_checkpoint() -> None:
    given: dict[str, Any] = {}
    submit(SimpleNamespace(submit_job=lambda **options: given.update(options)), ".", "towers train")  # type: ignore[arg-type]
    assert given["entrypoint"] == "towers train"
    assert given["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}


def test_a_package_that_ray_does_not_take_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.pt").write_bytes(os.urandom(2 << 20))
    assert package_size(f"{tmp_path}") > 2 << 20
    monkeypatch.setattr("ray._private.runtime_env.packaging.GCS_STORAGE_MAX_SIZE", 1 << 20)
    with pytest.raises(UserError, match="makes a package of 2 MiB, and Ray takes less than 1: "):
        package_size(f"{tmp_path}")
    (tmp_path / "unreadable").symlink_to("/proc/self/mem")  # for root too
    with pytest.raises(UserError, match=f"{tmp_path} cannot be packed: .*Input/output error"):
        package_size(f"{tmp_path}")


def test_a_cluster_that_is_not_there_is_told(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    assert main(["jobs", "--address", address.removeprefix("http://")]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"towers: no Ray cluster at {address}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "{file}: No such file or directory; give the file of `ray up`"),
        ("a: [b", "{file}: no YAML: while parsing a flow sequence"),
        ("cluster_name: c", "{file}: no cluster file, it lacks auth, provider"),
        ("kuberay", "{file}: no cluster file, it lacks auth, cluster_name, provider"),
        ("aws", "no way to the cluster of {file}: Unable to locate credentials"),
        ("local", "no way to the cluster of {file}: Head node of cluster (towers) not found!"),
    ],
)
def test_a_cluster_file_that_leads_nowhere_is_told(
    text: str | None, said: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = here / "cluster.yaml"
    files = {name: ROOT / f"clusters/{name}.yaml" for name in ("local", "kuberay")}
    files["aws"] = ROOT / "cluster.yaml"
    if text:
        file.write_text(files[text].read_text() if text in files else text)
    assert main(["submit", "--cluster", str(file), "--", "describe"]) == 2
    told = capfd.readouterr().err
    assert told.startswith("towers: " + said.format(file=file))
    assert told.count("\n") == 1


def test_a_head_that_lets_nobody_in_is_told(
    environment: dict[str, str], tmp_path: Path, headed: Callable[..., Path]
) -> None:
    """Where no SSH server listens, or the key is none of its."""
    file = headed()
    given = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}
    given |= {"PYTHONUNBUFFERED": ""}  # as it mostly is
    done = towers(environment | given, tmp_path, "jobs", "--cluster", str(file))
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"towers: no way to the cluster of .*: .*127\.0\.0\.1.*(refused|denied).*\n", done.stderr
    )
