"""`towers predict --data`: every row once, as the network sees it, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datasets import DataError
from datasets.augmentation import ten_crops
from datasets.drawn import draw, write_drawn
from datasets.images import decode, encode
from datasets.shards import open_dataset, write_manifest, write_split
from datasets.statistics import Statistics
from pipeline.evaluation import Verdicts
from pipeline.tower import Tower
from workers import prediction_file
from workers.cli import main
from workers.config import configure
from workers.data import classes_of
from workers.evaluation_file import EXAMPLES, details
from workers.prediction_file import predict_rows
from workers.sweep import Work
from workers.trained import Trained, open_trained

ROWS = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images in row groups of 90: two ranges of rows, the last batches short."""
    folder = str(tmp_path_factory.mktemp("data"))
    drawn = (draw(7, "test", n) for n in range(ROWS))
    records = ((encode(pixels), f"{n}.jpg", label) for n, (pixels, label) in enumerate(drawn))
    classes = tuple(f"{n}" for n in range(10))
    shards = write_split(folder, "test", records, classes, rows_per_group=90)
    write_manifest(folder, {"test": shards}, classes, size=72)
    return folder


@pytest.mark.usefixtures("cluster")
def test_every_row_is_there_as_the_network_sees_it(
    trained: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, files = str(trained / "run"), [tmp_path / f"{n}.parquet" for n in (1, 2)]
    for workers, file in zip("12", files, strict=True):
        options = ["--data", data, "--output", str(file), "--crops", "10", "--workers", workers]
        assert main(["predict", run, *options, "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result.pop("file") == str(file)
        about = {"run": run, "step": 6, "data": data, "split": "test", "crops": 10}
        assert result == {**about, "rows": ROWS, "skipped": 0}
    table = pq.read_table(files[0])
    assert table.equals(pq.read_table(files[1]))
    assert table.schema.names == ["row", "path", "classes", "probabilities"]
    assert table["row"].to_pylist() == list(range(ROWS))
    assert table["path"].to_pylist() == [f"{n}.jpg" for n in range(ROWS)]
    network = open_trained(run)
    assert network.classes
    images = pq.read_table(open_dataset(data).shards("test")[0].path, columns=["image"])
    for n in (0, 91, ROWS - 1):
        pixels = decode(images["image"][n]["bytes"].as_py(), "", 72)
        crops = torch.from_numpy(ten_crops(pixels, 64)[np.newaxis])
        expected = network.classifier().probabilities(crops)[0]
        classes, chances = table["classes"][n].as_py(), table["probabilities"][n].as_py()
        assert len(classes) == 5
        assert chances == sorted(chances, reverse=True)
        assert chances[0] == pytest.approx(expected.max().item(), rel=1e-5)
        for name, chance in zip(classes, chances, strict=True):
            number = network.classes.names.index(name)
            assert chance == pytest.approx(expected[number].item(), rel=1e-5)


def test_an_evaluations_mistakes_are_those_with_the_greatest_loss(tmp_path: Path) -> None:
    data = write_drawn(f"{tmp_path}", train=20, val=40)
    config = configure({"network": "alexnet-mini"})
    tower = Tower(config.build(10), seed=0)
    weights = {name: p.detach().numpy() for name, p in tower.weights().items()}
    statistics = Statistics.load(f"{tmp_path}/statistics.npz")
    network = Trained("r", 0, config, weights, classes_of(data), statistics)
    work = Work(data, "val", 1, "fail", (network,), None)
    # Every other one of the last thirty rows is right, however great its loss.
    rows, labels = np.arange(10, 40), torch.arange(10, 40) % 10
    wrong = torch.arange(30) % 2
    losses = torch.randperm(30, generator=torch.Generator().manual_seed(0)).double()
    found = details(network, work, rows, Verdicts(labels, (labels + wrong) % 10, wrong, losses))
    falling = sorted(range(1, 30, 2), key=lambda at: -losses[at])[:EXAMPLES]
    assert [mistake["row"] for mistake in found["mistakes"]] == [10 + at for at in falling]
    assert [mistake["label"] for mistake in found["mistakes"]] == [at % 10 for at in falling]


def test_rows_are_written_as_they_come(
    trained: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_file, "GROUP", 100)
    fsspec.filesystem("memory").put(data, "/grouped", recursive=True)
    file = tmp_path / "p.parquet"
    assert predict_rows(str(trained / "run"), "memory://grouped", str(file))["rows"] == ROWS
    assert list(tmp_path.iterdir()) == [file]
    found = pq.ParquetFile(file)
    # Batches of 64 rows at most, of ranges of 270 and 30.
    assert [found.metadata.row_group(n).num_rows for n in range(3)] == [128, 128, 44]
    assert found.read()["row"].to_pylist() == list(range(ROWS))


@pytest.fixture
def unlabelled() -> str:
    """A test split without labels as Hugging Face has it, one of its images bad, and one nameless;
    it lies in this process, where no Ray is needed to read it.
    """
    url = "memory://unlabelled"
    images = [{"bytes": encode(draw(0, "x", n)[0]), "path": f"{n}.jpg"} for n in range(4)]
    images[2]["bytes"], images[3]["path"] = b"no image", None
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(images, kind), "label": pa.array([-1] * 4, pa.int64())}
    feature = {"label": {"_type": "ClassLabel", "names": [f"{n}" for n in range(10)]}}
    metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
    with fsspec.open(f"{url}/test-00000-of-00001.parquet", "wb") as file:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file)
    return url


def test_rows_need_no_label_and_bad_ones_are_skipped(
    trained: Path, unlabelled: str, tmp_path: Path
) -> None:
    file = f"{tmp_path}/p.parquet"
    result = predict_rows(str(trained / "run"), unlabelled, file, on_error="skip")
    assert (result["rows"], result["skipped"]) == (3, 1)
    table = pq.read_table(file)
    assert table["row"].to_pylist() == [0, 1, 3]
    assert table["path"].to_pylist() == ["0.jpg", "1.jpg", None]


def test_shards_need_no_label_column(trained: Path, tmp_path: Path) -> None:
    url, output = "memory://bare", f"{tmp_path}/p.parquet"
    images = [{"bytes": encode(draw(0, "x", n)[0]), "path": f"{n}.jpg"} for n in range(3)]
    with fsspec.open(f"{url}/test.parquet", "wb") as file:
        pq.write_table(pa.table({"image": images}), file)
    assert predict_rows(str(trained / "run"), url, output)["rows"] == 3
    with pytest.raises(DataError, match="no column of integer labels"):
        open_dataset(url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no image to predict: name files, folders or URLs, or shards by --data"),
        (["a.jpg", "--data", "DATA"], "a.jpg: name images or --data, not both"),
        (["--data", "DATA"], "--data needs --output FILE.parquet"),
        (["a.jpg", "--output", "x"], "--output has no effect without --data"),
        (["--data", "DATA", "--output", "no/x.parquet"], "no/x.parquet cannot be written: No such"),
        (["--data", "DATA", "--output", "SHARD"], "is read by this command; name another file"),
        (["--data", "DATA", "--output", "x"], "x: a name that ends in .parquet is wanted"),
        (
            ["--data", "DATA", "--output", "x.parquet", "--split", "val"],
            "no split 'val'; it has test",
        ),
        (["--data", "DATA", "--output", "x.parquet", "--workers", "0"], "workers is 0: at least 1"),
        (["--data", "DATA", "--output", "x.parquet"], "row 2: the image (8 bytes) does not decode"),
    ],
)
def test_a_mistake_is_one_line_exit_2_and_no_file(
    options: list[str],
    message: str,
    trained: Path,
    unlabelled: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (shard,) = open_dataset(unlabelled, labelled=False).shards("test")
    known = {"DATA": unlabelled, "SHARD": shard.path}
    given = [known.get(option, option) for option in options]
    assert main(["predict", str(trained / "run"), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
