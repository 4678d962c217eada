"""`towers predict`: files, folders and URLs through a real network; mistakes are one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.augmentation import ten_crops
from datasets.drawn import draw
from datasets.images import decode
from pipeline.network import build
from pipeline.tower import Tower
from workers.cli import main
from workers.commands.results import prediction
from workers.trained import open_trained
from workers.weights import import_


@pytest.fixture(scope="module")
def run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("predict")
    tower = Tower(build("alexnet-mini", 10), seed=3)
    torch.save({name: p.detach() for name, p in tower.weights().items()}, folder / "w.pt")
    given = {"network": "alexnet-mini", "shards": shards}
    import_(f"{folder}/w.pt", f"{folder}/run", given)
    import_(f"{folder}/w.pt", f"{folder}/bare", {"network": "alexnet-mini"})
    return f"{folder}/run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of another size and mode, one in a folder of the folder, beside other files."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(draw(0, "x", 0)[0]).resize((200, 150)).save(folder / "a.png")
    Image.fromarray(draw(0, "x", 1)[0]).convert("L").resize((40, 50)).save(folder / "more/b.jpg")
    (folder / "notes.txt").write_text("no image")
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def server(photos: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=photos)) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_files_folders_and_urls(
    run: str, photos: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"{photos}/photos", f"{photos}/photos/a.png", f"{server}/photos/a.png"]
    assert main(["predict", run, *places, "--crops", "10", "--json"]) == 0
    out = capsys.readouterr().out
    images = json.loads(out.splitlines()[-1])["images"]
    names = ["a.png", "more/b.jpg"]
    assert [i["image"] for i in images] == [*(f"{photos}/photos/{n}" for n in names), *places[1:]]
    # A file computed in another batch differs in rounding alone.
    chances = [[one["probability"] for one in image["classes"]] for image in images]
    assert chances[0] == pytest.approx(chances[2], rel=1e-5)
    assert chances[0] == pytest.approx(chances[3], rel=1e-5)
    assert chances[0] == sorted(chances[0], reverse=True)
    network = open_trained(run)
    pixels = decode((photos / "photos/a.png").read_bytes(), "a.png", 72)
    crops = torch.from_numpy(ten_crops(pixels, 64)[np.newaxis])
    expected = network.classifier().probabilities(crops)[0]
    assert network.classes
    for one in images[0]["classes"]:
        number = network.classes.names.index(one["class"])
        assert one["probability"] == pytest.approx(expected[number].item(), rel=1e-5)
    assert "█" not in out  # no terminal


def test_a_terminal_has_bars() -> None:
    classes = [{"title": "cat", "probability": 0.5}, {"title": "dog", "probability": 0.01}]
    shown = prediction({"image": "a.jpg", "classes": classes}, "#")
    assert shown == "a.jpg\n  cat   50.0%  " + "#" * 20 + "\n  dog    1.0%"


def test_what_is_no_image_is_skipped_or_ends_it_after_the_others(
    run: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = f"{photos}/photos/a.png", f"{photos}/broken.jpg"
    files = [good, bad, good]
    assert main(["predict", run, *files]) == 2
    out, err = capsys.readouterr()
    assert out.count(good) == 1
    assert f"{bad}: the image" in err
    assert main(["predict", run, *files, "--on-error", "skip", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert (result["skipped"], len(result["images"])) == (1, 2)
    assert err.startswith(f"skipped: {bad}: the image")


@pytest.mark.parametrize(
    ("run_name", "image", "message"),
    [
        ("run", "broken.jpg", "broken.jpg: the image (8 bytes) does not decode"),
        ("run", "empty", "empty: no image in this folder"),
        ("run", "nowhere.jpg", "nowhere.jpg: no such file"),
        ("nothing", "photos", "is no run"),
        ("bare", "photos", "does not know the classes and the mean of its training images"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    run_name: str, image: str, message: str, run: str, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["predict", f"{Path(run).parent}/{run_name}", f"{photos}/{image}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
