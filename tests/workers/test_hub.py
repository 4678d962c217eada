"""Sources on the Hugging Face hub, whose protocol a server of our own speaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import made
import numpy as np
import pytest

from datasets.kept import Options
from datasets.rows import Rows
from datasets.shards import open_dataset
from workers.cli import main
from workers.prepare import prepare

TRAIN = "data/train-00000-of-00001.parquet"


class Hub(BaseHTTPRequestHandler):
    """A hub with the repositories `ann/shapes`, `ann/private`, which takes a token, and
    `ann/gated`, which shows what it has and gives nothing; the same `files` in each.
    """

    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        parts = [unquote(part) for part in asked.path.removeprefix("/api").split("/", 6)]
        repository, rest = "/".join(parts[1:4]), parts[4:]
        what, revision, inside = (*rest, *("revision", "main", "")[len(rest) :])
        if repository not in {f"datasets/ann/{name}" for name in ("shapes", "private", "gated")}:
            self.answer(404, code="RepoNotFound")
        elif "private" in repository and self.headers["Authorization"] != "Bearer hf_ann":
            self.answer(401, code="RepoNotFound")
        elif revision not in ("main", "v2", "refs/convert/parquet"):
            self.answer(404, code="RevisionNotFound")
        elif what == "revision":
            self.answer(200, {"id": "ann/shapes", "sha": "0" * 40, "siblings": []})
        elif what == "tree":
            self.tree(inside, "recursive=true" in asked.query.lower())
        elif "gated" in repository:
            self.answer(403, code="GatedRepo")
        elif inside in self.files:
            self.send(inside)
        else:
            self.answer(404, code="EntryNotFound")

    def tree(self, folder: str, recursive: bool) -> None:
        """What lies in a folder."""
        inside = [Path(name) for name in self.files if Path(folder) in Path(name).parents]
        folders = {path.parent for path in inside} - {Path(folder)}
        found: list[dict[str, Any]] = [{"type": "directory", "path": f"{f}"} for f in folders]
        found += [
            {"type": "file", "path": f"{path}"}
            for path in inside
            if recursive or path.parent == Path(folder)
        ]
        for entry in found:
            entry |= {"oid": "0" * 40, "size": len(self.files.get(entry["path"], b""))}
        self.answer(200, found) if found else self.answer(404, code="EntryNotFound")

    def send(self, name: str) -> None:
        """A file, or the bytes of it that are asked for."""
        data, status = self.files[name], 200
        if wanted := self.headers["Range"]:
            first, last = wanted.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.answer(status, data)

    def answer(self, status: int, body: Any = b"", code: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("hub")
    shard = Path(made.make("parquet", folder), "data.parquet").read_bytes()
    tar = Path(made.make("tar", folder)).read_bytes()
    Hub.files = {"README.md": b"Shapes", TRAIN: shard, TRAIN.replace("train", "test"): shard}
    Hub.files["tars/photos.tar"] = tar
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def hub(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub is, for this process, which has read HF_ENDPOINT before it was there."""
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})


def images(url: str, split: str) -> list[bytes]:
    dataset = open_dataset(url)
    return sorted(r.image for r in Rows(dataset, split).read(np.arange(dataset.rows(split))))


def test_the_command_reads_a_private_repository(endpoint: str) -> None:
    program = Path(sys.executable).parent / "towers"
    # To memory, so that it needs no Ray.
    command = ["prepare", "hf://datasets/ann/private@v2/data", "memory://shards", "--json"]
    run = subprocess.run(
        [str(program), *command],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_ann"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["classes"], result["splits"]) == (3, {"train": 12, "test": 12})


@pytest.mark.parametrize(
    ("inside", "splits"),
    [
        ("", {"train": 12, "test": 12}),
        ("@refs/convert/parquet", {"train": 12, "test": 12}),
        (f"/{TRAIN}", {"train": 12}),
        ("/tars", {"train": 12}),
    ],
)
def test_revisions_folders_and_files(inside: str, splits: dict[str, int], hub: None) -> None:
    options = Options(keep=True, size=16, holdout=0)
    try:
        result = prepare(f"hf://datasets/ann/shapes{inside}", "memory://hub", options)
        assert result["splits"] == splits
        assert images("memory://hub", "train") == sorted(d for *_, d in made.images())
    finally:
        fsspec.filesystem("memory").rm("/hub", recursive=True)


def test_training_reads_it_as_it_is(hub: None) -> None:
    dataset = open_dataset("hf://datasets/ann/shapes@v2")
    assert (dataset.image, dataset.label, dataset.classes) == ("picture", "kind", made.CLASSES)
    assert images("hf://datasets/ann/shapes@v2", "test") == sorted(d for *_, d in made.images())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ann/none", "no such file or folder (repository not found). If the repo is private"),
        ("ann/private", "no such file or folder (repository not found). If the repo is private"),
        ("ann/shapes@none", "no such file or folder (revision not found)"),
        ("ann/shapes/none", "no such file or folder"),
        ("ann", "Invalid HF URI 'hf://datasets/ann'"),
        ("ann/gated", f"{TRAIN}: may not be read (403 Client Error. Cannot access gated repo"),
    ],
)
def test_what_is_not_to_be_had_is_named(
    source: str, message: str, hub: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", f"hf://datasets/{source}", f"{tmp_path}/shards"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"towers: hf://datasets/{source}")
    assert message in error
