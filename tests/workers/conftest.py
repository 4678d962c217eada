"""A small data set that many tests use, a run of it, and one Ray for those that need no other."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml

from benchmarks.chaos import below
from datasets.drawn import draw, write_drawn
from datasets.images import encode
from datasets.shards import write_manifest, write_split
from workers.config import configure
from workers.evaluate import evaluate
from workers.progress import Progress
from workers.supervisor import train
from workers.weights import export, import_

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those last that end the one Ray which the others share."""
    items.sort(key=lambda item: item.get_closest_marker("own_ray") is not None)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """150 training and 50 validation images of 72 pixels: three batches of 64, one short."""
    folder: Path = tmp_path_factory.mktemp("shards")
    write_drawn(str(folder), train=150, val=50)
    return str(folder)


@pytest.fixture(scope="session")
def large_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 photographs so large that one augmenter decodes fewer than two small towers train on."""
    folder, names = str(tmp_path_factory.mktemp("large")), [str(label) for label in range(10)]
    drawn = (draw(0, "train", number) for number in range(40))
    records = [
        (encode(pixels.repeat(24, 0).repeat(24, 1)), str(number), label)
        for number, (pixels, label) in enumerate(drawn)
    ]
    written = write_split(folder, "train", records, names, rows_per_group=4)
    write_manifest(folder, {"train": written}, names)
    return folder


def small_ray() -> None:
    """Ray in this process, unless there is one: as a module before left it, or asked for it."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)


@pytest.fixture(scope="module")
def cluster() -> None:
    small_ray()


@pytest.fixture(scope="module", autouse=True)
def _own(request: pytest.FixtureRequest) -> None:
    """Ends that one Ray, which would take its share of the cores."""
    if request.node.get_closest_marker("own_ray"):
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _end() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tests here are of towers on CPUs
        # Each Ray of this process but the first would leave a thread that sends it metrics when it
        # is gone, and may end the process by SIGSEGV.
        patch.setenv("RAY_enable_open_telemetry", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # which clusters send to Ray's makers
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, six steps of two towers of which one was killed after an epoch, its
    `result.json`, and `other`, made of its weights of step 3; both evaluated, and their average.
    """
    folder = tmp_path_factory.mktemp("trained")

    class Killer(Progress):
        killed = False

        def evaluation(self, report: dict) -> None:
            if not self.killed:
                self.killed = True
                kill(processes_below("ray::TowerActor")[:1])

    given = {"network": "alexnet-mini", "shards": shards}
    small_ray()
    more = {"batch": 64, "epochs": 2, "augmenters": "1:1", "run": f"{folder}/run"}
    result = train(configure({**given, **more}), progress=Killer())
    assert result["restarts"] == 1
    (folder / "result.json").write_text(json.dumps(result))
    export(f"{folder}/run", f"{folder}/w.safetensors", 3)
    import_(f"{folder}/w.safetensors", f"{folder}/other", given)
    evaluate([f"{folder}/run", f"{folder}/other"], weights=[3, 1])
    return folder


@pytest.fixture(scope="session")
def longer(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights after the first 30 steps of 20 epochs in peace, by towers of one thread."""
    small_ray()
    given = {"network": "alexnet-mini", "shards": shards, "batch": 64, "epochs": 20, "steps": 30}
    given |= {
        "augmenters": "1:1",
        "run": str(tmp_path_factory.mktemp("longer") / "run"),
    }
    return train(configure(given))["weights_sha256"]


@pytest.fixture
def headed(tmp_path: Path) -> Callable[..., Path]:
    """Makes a cluster file whose head is this machine, as `ray up` leaves it to who has `tmp_path`
    for RAY_TMPDIR; `auth` in place of the file's own.
    """

    def make(**auth: str) -> Path:
        cluster = yaml.safe_load((ROOT / "clusters/local.yaml").read_text())
        cluster["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
        cluster["auth"] = auth or cluster["auth"]
        file = tmp_path / "cluster.yaml"
        file.write_text(yaml.safe_dump(cluster))
        tags = {"ray-node-type": "head", "ray-node-status": "up-to-date"}
        (tmp_path / "ray").mkdir()
        state = {"127.0.0.1": {"tags": tags, "state": "running"}}
        (tmp_path / "ray" / "cluster-towers.state").write_text(json.dumps(state))
        return file

    return make


def kill(processes: list[int]) -> None:
    assert processes
    for process in processes:
        os.kill(process, signal.SIGKILL)


def processes_below(title: str) -> list[int]:
    """The ids of this process's descendants, those of its Ray among them, that have a title such as
    "ray::TowerActor".
    """
    return sorted(n for n, (_, line) in below(os.getpid()).items() if line.startswith(title))


@pytest.fixture(scope="session")
def kill_own() -> Callable[[str], None]:
    """Kills the processes below this one that have a title; there must be one."""
    return lambda title: kill(processes_below(title))


@pytest.fixture(scope="session")
def processes() -> Callable[[str], list[int]]:
    return processes_below
