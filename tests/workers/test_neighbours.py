"""`towers neighbours`: the nearest are found, the index is built once, and anew when stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DataError
from datasets.augmentation import centre_crop
from datasets.drawn import CLASSES, write_drawn
from datasets.images import decode
from datasets.rows import Rows
from datasets.shards import open_dataset
from datasets.storage import storage
from workers import feature_index
from workers.cli import main
from workers.config import UserError
from workers.feature_index import FeatureIndex
from workers.neighbours import neighbours
from workers.trained import open_trained


@pytest.fixture(scope="module")
def near() -> str:
    """150 images that lie in this process, where no Ray is needed to read them."""
    write_drawn("memory://near", train=150, val=50)
    return "memory://near"


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return shutil.copytree(trained / "run", f"{tmp_path_factory.mktemp('near')}/run")


def test_the_nearest_are_those_of_the_features(
    run: str, near: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Rows(open_dataset(near), "train").read(np.arange(150))
    pixels = np.stack([centre_crop(decode(r.image, "", 72), 64) for r in records])
    features = open_trained(run).classifier().features(torch.from_numpy(pixels)).double()
    assert features.shape == (150, 1024)
    files = []
    for row in (3, 149):
        files.append(f"{tmp_path}/{row}.jpg")
        Path(files[-1]).write_bytes(records[row].image)
    sheet = f"{tmp_path}/sheet.png"
    options = ["--data", near, "--k", "4", "--output", sheet, "--json"]
    assert main(["neighbours", run, *files, *options]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert (result["step"], result["split"], result["file"]) == (6, "train", sheet)
    for row, one in zip((3, 149), result["images"], strict=True):
        want = (features - features[row]).square().sum(1).sqrt()
        found = one["neighbours"]
        assert [n["row"] for n in found] == want.argsort()[:4].tolist()
        assert found[0]["distance"] == pytest.approx(0, abs=1e-4)  # the image itself
        for n in found:
            assert n["distance"] == pytest.approx(want[n["row"]].item(), abs=1e-4)
            assert n["class"] == n["title"] == CLASSES[n["row"] % 10]
        assert found[1]["place"] in out
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        # The first of a line is the image, the second, the same image, its nearest.
        first, second = (picture.crop((left, 8, left + 144, 152)) for left in (8, 176))
        assert np.abs(np.int16(first) - np.int16(second)).max() == 0


@pytest.mark.usefixtures("cluster")
def test_a_large_index_is_searched_by_the_cluster(
    run: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = f"{tmp_path}/a.png"
    Image.new("RGB", (80, 60), "red").save(image)
    with monkeypatch.context() as large:
        large.setattr(feature_index, "SMALL", 0)
        spread = neighbours(run, [image], data=shards)
    monkeypatch.setattr("ray.is_initialized", None)  # here it needs no Ray
    assert neighbours(run, [image], data=shards) == spread
    assert len(spread["images"][0]["neighbours"]) == 5


def test_the_index_is_kept_until_checkpoint_or_rows_are_others(
    run: str, near: str, tmp_path: Path
) -> None:
    image = f"{tmp_path}/a.png"
    Image.new("RGB", (80, 60), "red").save(image)

    def written(**given: object) -> float:
        neighbours(run, [image], data=near, **given)  # type: ignore[arg-type]
        return Path(f"{run}/neighbours/index.json").stat().st_mtime_ns

    first = written()
    assert written() == first
    other = written(step=3)
    assert first != other != written(step=3, split="val")
    fs, path = storage(near)
    (shard,) = fs.glob(f"{path}/val*.parquet")
    kept = written(step=3, split="val")
    fs.pipe_file(shard, fs.cat_file(shard))  # as many rows, which may be others
    assert written(step=3, split="val") != kept
    with pytest.raises(UserError, match="k is 0: at least 1"):
        neighbours(run, [image], k=0)


def test_an_index_that_another_makes_anew_is_not_taken_for_ones_own(
    run: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = f"{tmp_path}/a.png"
    Image.new("RGB", (80, 60), "red").save(image)
    search = FeatureIndex._search

    def disturbed(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(FeatureIndex, "_search", search)
        neighbours(run, [image], data=near, split="val")
        return search(*given, **more)

    monkeypatch.setattr(FeatureIndex, "_search", disturbed)
    with pytest.raises(UserError, match="neighbours: 0 of 150 rows are there; if no other"):
        neighbours(run, [image], data=near)
    (index,) = Path(run, "neighbours").glob("*/*.parquet")
    index.write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"{index.name}: not readable as Parquet"):
        neighbours(run, [image], data=near, split="val")


def test_an_image_that_is_bad_is_skipped_and_none_overwritten(
    run: str, near: str, tmp_path: Path
) -> None:
    image, bad = f"{tmp_path}/a.png", f"{tmp_path}/b.png"
    Image.new("RGB", (80, 60), "red").save(image)
    Path(bad).write_bytes(b"x")
    found = neighbours(run, [bad, image], data=near, on_error="skip")
    assert [one["image"] for one in found["images"]] == [image]
    with pytest.raises(DataError, match=r"b\.png: the image"):
        neighbours(run, [bad, image], data=near)
    with pytest.raises(UserError, match="no image is left"):
        neighbours(run, [bad], data=near, on_error="skip")
    with pytest.raises(UserError, match=r"a\.png is read by this command"):
        neighbours(run, [image], data=near, output=image)
