"""`towers prepare` and `validate` as users run them: any workers, killed, on a store that fails."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import made
import numpy as np
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from datasets.drawn import draw
from datasets.images import decode, encode
from datasets.kept import Options
from datasets.rows import Rows
from datasets.shards import open_dataset
from datasets.storage import StoreFailed, whole
from workers.cli import main
from workers.output import alone
from workers.prepare import prepare
from workers.validate import validate

IMAGES = 1500
SMALL = Options(size=48, holdout=0.1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tar of 72-pixel images, which have to be scaled, in ten class folders."""
    path = tmp_path_factory.mktemp("source") / "shapes.tar"
    drawn = [draw(0, "train", n) for n in range(IMAGES)]
    members = [(f"{label}/{n}.jpg", encode(pixels)) for n, (pixels, label) in enumerate(drawn)]
    path.write_bytes(made.tar_bytes(members))
    return str(path)


@pytest.fixture(scope="module")
def prepared(source: str, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    result = prepare(source, str(folder), SMALL, workers=1)
    assert result["splits"] == {"train": 1350, "val": 150}
    assert result["skipped"] == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_any_number_of_workers_makes_the_same_bytes(
    source: str, prepared: Path, tmp_path: Path
) -> None:
    prepare(source, f"{tmp_path}/shards", SMALL)
    assert len(contents(prepared)) > 6
    assert contents(tmp_path / "shards") == contents(prepared)


def test_memory_is_a_source_and_a_place_for_shards(source: str, prepared: Path) -> None:
    """Other processes don't see it, so this one does the work; the bytes are the same."""
    fs = fsspec.filesystem("memory")
    fs.pipe("/prepared/shapes.tar", Path(source).read_bytes())
    try:
        prepare("memory://prepared/shapes.tar", "memory://prepared/shards", SMALL)
        assert validate("memory://prepared/shards")["faults"] == 0
        for name in contents(prepared).keys() - {"dataset.json"}:  # which says of which source
            assert fs.cat(f"/prepared/shards/{name}") == (prepared / name).read_bytes(), name
    finally:
        fs.rm("/prepared", recursive=True)


def test_a_second_run_finds_it_done(
    source: str, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in prepared.iterdir()}
    options = ["--size", "48", "--holdout", "0.1", "--json"]
    assert main(["prepare", source, str(prepared), *options]) == 0
    out, err = capsys.readouterr()
    assert "is complete already" in err
    result = json.loads(out.splitlines()[-1])
    assert (result["rows"], result["classes"], result["skipped"]) == (1500, 10, 0)
    assert {p: p.stat().st_mtime_ns for p in prepared.iterdir()} == before


def test_a_killed_worker_loses_nothing(
    source: str, prepared: Path, tmp_path: Path, processes: Callable[[str], list[int]]
) -> None:
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            begun = list((tmp_path / "shards" / ".prepare").glob("*.partial"))
            for process in processes("ray::MapBatches(_call)") if begun else []:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    prepare(source, f"{tmp_path}/shards", SMALL, workers=2)
    killer.join()
    assert killed
    assert contents(tmp_path / "shards") == contents(prepared)


def test_a_killed_run_goes_on_to_the_same_bytes(
    source: str, prepared: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    program = Path(sys.executable).parent / "towers"
    options = ["--size", "48", "--holdout", "0.1", "--workers", "1"]
    command = [str(program), "prepare", source, str(shards), *options]
    # A Ray of its own, which ends with it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["RAY_ADDRESS"] = "local"
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(shards.glob(".prepare/*.npz")):
            assert run.poll() is None, run.stderr
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert not (shards / "dataset.json").exists()
    prepare(source, str(shards), SMALL)
    assert contents(shards) == contents(prepared)


def test_two_commands_do_not_work_in_one_folder(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(f"{tmp_path}/shards"):
        assert main(["prepare", source, f"{tmp_path}/shards"]) == 2
    assert "shards: another process works there" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()  # nothing was made


def test_the_options_of_the_command_do_what_they_say(cluster: None, tmp_path: Path) -> None:
    flat = {f"val_{n}.jpg": made.encoded(n) for n in range(4)}
    (tmp_path / "val.tar").write_bytes(made.tar_bytes(list(flat.items())))
    (tmp_path / "words.txt").write_text("n01 a hound\nn02 a mouser\n")
    (tmp_path / "truth.txt").write_text("2\n1\n2\n2\n")
    known = ["--labels", f"{tmp_path}/truth.txt", "--synsets", f"{tmp_path}/words.txt"]
    found = {}
    for name, options in (("kept", ["--keep"]), ("small", ["--size", "20", "--quality", "10"])):
        command = ["prepare", f"{tmp_path}/val.tar", f"{tmp_path}/{name}", "--split", "val"]
        assert main([*command, *known, *options]) == 0
        dataset = open_dataset(f"{tmp_path}/{name}")
        assert dataset.classes == ("n01", "n02")
        records = Rows(dataset, "val").read(np.arange(4))
        found[name] = {record.image: record.label for record in records}
    assert found["kept"] == dict(zip(flat.values(), (1, 0, 1, 1), strict=True))
    for image in found["small"]:
        assert decode(image, "", 20).shape == (20, 20, 3)
        assert len(image) < min(map(len, flat.values()))


def test_what_was_prepared_is_valid_until_it_is_damaged(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(prepared)]) == 0
    assert "1500 rows, no faults" in capsys.readouterr().out
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = sorted(tmp_path.glob("train-*"))[0]
    data = bytearray(victim.read_bytes())
    data[data.index(b"\xff\xd8\xff") + 1] = 0
    victim.write_bytes(data)
    assert main(["validate", str(tmp_path), "--json"]) == 1
    out = capsys.readouterr().out
    assert f"{victim.name} row 0: the image" in out
    assert json.loads(out.splitlines()[-1])["faults"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere", "out"], "nowhere: no such file or folder"),
        (["SOURCE", "out", "--size", "0"], "size is 0: 1 to 4096"),
        (["SOURCE", "out", "--quality", "101"], "quality is 101: 1 to 100"),
        (["SOURCE", "out", "--workers", "0"], "workers is 0: at least 1"),
        (["SOURCE", "out", "--labels", "none.txt"], "none.txt: no such file"),
        (["SOURCE", "SOURCE"], "is where the images are; name another folder"),
        (["SOURCE", "SOURCE/out"], "/out lies inside "),
        (["gs+nothing://x", "out"], "Protocol not known"),
        (["SOURCE", "out", "--split", "../up"], "a split '../up': letters, digits, - and _ are"),
        (["abfs://container/x", "out"], "abfs://container/x: Install adlfs to access"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    options: list[str],
    message: str,
    source: str,
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *(o.replace("SOURCE", source) for o in options)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("towers: ")
    assert message in error
    assert not list(tmp_path.rglob("*.parquet"))


class Failing:
    """An S3 server that answers some of what it is asked with a server's error."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.share, self.refused, self.copies, self.draws = 0.0, 0, 0, random.Random(0)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        self.copies += "HTTP_X_AMZ_COPY_SOURCE" in environ
        if self.draws.random() < self.share:
            self.refused += 1
            start("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return self.app(environ, start)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    """A failing S3 server with a bucket."""
    app = Failing()
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
    yield app
    fsspec.filesystem("s3").clear_instance_cache()
    # moto keeps one store a process, whichever server shows it.
    app.share = 0.0
    reset = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", b"")
    urllib.request.urlopen(reset, timeout=30).close()
    server.shutdown()


@pytest.fixture
def ray_of_the_store(store: Failing) -> Iterator[None]:
    """A Ray whose workers know the store: they have the environment that they are started in."""
    import ray

    ray.shutdown()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_an_upload_that_breaks_off_leaves_nothing(store: Failing) -> None:
    fs = fsspec.filesystem("s3")
    for broken in (True, False):
        with suppress(InterruptedError), whole(fs, "bucket/large", "bucket") as file:
            file.write(bytes(fs.default_block_size + 1))  # so that a part of it is there already
            assert fs.call_s3("list_multipart_uploads", Bucket="bucket")["Uploads"]
            if broken:
                raise InterruptedError
        assert "Uploads" not in fs.call_s3("list_multipart_uploads", Bucket="bucket")
        assert fs.ls("bucket", refresh=True) == ([] if broken else ["bucket/large"])
    assert fs.size("bucket/large") == fs.default_block_size + 1


def test_a_store_that_goes_on_failing_is_named(
    cluster: None,
    store: Failing,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.storage.PAUSE", 0.0)
    fsspec.filesystem("s3").put(source, "bucket/source/shapes.tar")
    store.share = 1.0
    with pytest.raises(
        StoreFailed, match=r"s3://bucket/source/shapes\.tar: the store failed, again"
    ):
        prepare("s3://bucket/source/shapes.tar", f"{tmp_path}/shards", SMALL)


@pytest.mark.own_ray
def test_a_store_that_fails_now_and_then(
    ray_of_the_store: None, store: Failing, tmp_path: Path
) -> None:
    source = made.make("tar", tmp_path, 150)
    made.prepare(source, tmp_path / "shards", SMALL)
    fsspec.filesystem("s3").put(source, "bucket/source/shapes.tar")
    store.share = 0.1
    prepare("s3://bucket/source/shapes.tar", "s3://bucket/shards", SMALL)
    assert store.refused > 5
    assert store.copies == 0  # a rename would be one
    store.share = 0.0
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    stored = {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find("bucket/shards")}
    there = contents(tmp_path / "shards")
    # The manifest holds a digest of where the images came from.
    assert stored.keys() == there.keys()
    assert all(stored[name] == there[name] for name in there if name.endswith(".parquet"))
    assert validate("s3://bucket/shards")["faults"] == 0


def test_what_a_folder_holds_in_vain_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    source, shards = "memory://vain/photos", "memory://vain/shards"  # in this process
    fs = fsspec.filesystem("memory")
    for name in ("cat/a.jpg", "cat/b.jpg", "dog/c.jpg", "dog/d.heic", "bird/e.txt"):
        fs.pipe_file(f"/vain/photos/{name}", encode(draw(0, "train", len(name))[0]))
    assert prepare(source, shards, Options(48, holdout=0.0))["rows"] == 3
    said = capsys.readouterr().err
    assert "passed by 2 file(s) that are no images by name: " in said
    assert "dog/d.heic\n" in said
    assert "no image in 1 of the folders or archives: " in said
    assert "photos/bird\n" in said
    fs.rm("/vain", recursive=True)
