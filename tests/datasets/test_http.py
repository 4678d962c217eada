"""Sources on a web server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import made
import pytest

from datasets import DataError
from datasets.fetch import entries_of, fetch
from datasets.scanning import scan
from datasets.sources import Source, find_source


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the folder `tmp_path`."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    made = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


def images(source: Source) -> list[bytes | str]:
    """All that a source has."""
    found: list[bytes | str] = []
    for part in source.parts:
        table = scan(source, part)[0]
        numbers = table["label"].combine_chunks().indices
        found += fetch(entries_of(table.set_column(6, "label", numbers)), None, "")
    return found


def test_a_folder_of_links(server: str, tmp_path: Path) -> None:
    made.make("folder", tmp_path)
    found = images(find_source(f"{server}/photos/"))
    assert sorted(map(bytes, found)) == sorted(data for *_, data in made.images())


def test_classes_are_named_as_their_folders_are(server: str, tmp_path: Path) -> None:
    for name in ("great white", "käse", "100% wool"):
        (tmp_path / "my photos" / name).mkdir(parents=True)
        (tmp_path / "my photos" / name / "a 1.png").write_bytes(made.encoded(0))
    source = find_source(f"{server}/my%20photos")
    named = {scan(source, part)[0]["name"][0].as_py() for part in source.parts}
    assert named == {"great white/a 1.png", "käse/a 1.png", "100% wool/a 1.png"}
    assert images(source) == [made.encoded(0)] * 3


def test_a_list_names_images_on_several_stores(server: str, tmp_path: Path) -> None:
    made.make("csv", tmp_path)
    head, first, second, *_ = (tmp_path / "list.csv").read_text().splitlines()
    (tmp_path / "list.csv").write_text("\n".join([head, first, f"{server}/{second}", first]))
    expected = [made.encoded(n) for n in (0, 1, 0)]
    assert images(find_source(f"{tmp_path}/list.csv")) == expected


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.storage.PAUSE", 0.0)
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:9/x\.tar: the store failed, again"):
        find_source("http://127.0.0.1:9/x.tar")
