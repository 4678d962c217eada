"""Shards come back as written, foreign Parquet opens, and what is wrong is named."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import DataError
from datasets.images import decode
from datasets.layout import Dataset
from datasets.rows import Rows
from datasets.shards import open_dataset, write_manifest, write_split

DATA = Path(__file__).parents[2].parent / "shared" / "data"
CLASSES = ("cat", "dog", "fox")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def records(n: int) -> Iterator[tuple[bytes, str, int]]:
    return ((b"image %d" % i, f"{i}.jpg", i % 3) for i in range(n))


def write(url: str, train: int = 10, val: int = 3, **options: int) -> Dataset:
    splits = {
        split: write_split(url, split, records(n), CLASSES, **options)
        for split, n in (("train", train), ("val", val))
    }
    write_manifest(url, splits, CLASSES, size=8, skipped={"does not decode": 2})
    return open_dataset(url)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://shards/set"
    fsspec.filesystem("memory").rm("/shards", recursive=True)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 120))
@settings(max_examples=30)
def test_what_was_written_is_read(n: int, rows_per_group: int, shard_bytes: int) -> None:
    url = "memory://shards/any"
    options = {"rows_per_group": rows_per_group, "shard_bytes": shard_bytes}
    dataset = write(url, n, **options)
    assert dataset.rows("train") == n
    assert sum(dataset.groups("train")) == n
    assert max(dataset.groups("train")) == min(n, rows_per_group)
    order = np.random.default_rng(n).permutation(n)
    read = Rows(dataset, "train", cache_groups=1).read(order)
    assert [r.image for r in read] == [b"image %d" % i for i in order]
    assert [r.label for r in read] == (order % 3).tolist()
    assert [r.row for r in read] == order.tolist()
    fsspec.filesystem("memory").rm("/shards", recursive=True)


def test_a_written_set(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), 10, rows_per_group=2, shard_bytes=28)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "dataset.json",
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "val-00000-of-00001.parquet",
    ]
    assert (dataset.classes, dataset.size, dataset.held_out) == (CLASSES, 8, "val")
    assert dataset.groups("train") == (2, 2, 2, 2, 2)
    assert pickle.loads(pickle.dumps(dataset)) == dataset
    place = Rows(dataset, "train").read(np.array([5]))[0].place
    assert place == "train-00001-of-00003.parquet row 1"
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    assert manifest["skipped"] == {"does not decode": 2}
    assert manifest["rows"] == {"train": 10, "val": 3}


def test_shards_are_hugging_faces_layout(tmp_path: Path) -> None:
    ours = write(str(tmp_path))
    table = pq.read_table(tmp_path / "train-00000-of-00001.parquet")
    assert table.schema.field("image").type == IMAGE
    assert table.schema.field("label").type == pa.int64()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"_type": "ClassLabel", "names": list(CLASSES)}
    meta = pq.read_metadata(tmp_path / "train-00000-of-00001.parquet").row_group(0).column(0)
    assert meta.compression == "UNCOMPRESSED"
    assert not meta.is_stats_set
    (tmp_path / "dataset.json").unlink()
    theirs = open_dataset(str(tmp_path))
    assert theirs.size is None
    assert (theirs.classes, theirs.splits) == (ours.classes, ours.splits)


def test_an_interrupted_write_leaves_nothing_to_read(tmp_path: Path) -> None:
    write(str(tmp_path))

    def interrupted() -> Iterator[tuple[bytes, str, int]]:
        yield from records(7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(str(tmp_path), "train", interrupted(), CLASSES, rows_per_group=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "train-00000-of-00001.parquet",
        "val-00000-of-00001.parquet",
    ]


def test_a_shorter_rewrite_leaves_no_old_shard(tmp_path: Path) -> None:
    write(str(tmp_path), 10, rows_per_group=2, shard_bytes=1)
    dataset = write(str(tmp_path), 4, rows_per_group=2)
    assert len(list(tmp_path.glob("train-*"))) == 1
    assert dataset.rows("train") == 4


def test_the_first_images_are_whole_row_groups(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), 50, rows_per_group=5, shard_bytes=70)
    assert len(dataset.shards("train")) > 1
    for rows, kept in ((1, 5), (10, 10), (11, 15), (50, 50), (99, 50)):
        first = dataset.first("train", rows)
        assert first.groups("train") == dataset.groups("train")[: kept // 5]
        found = Rows(first, "train").read(np.arange(kept))
        assert [record.image for record in found] == [image for image, *_ in records(kept)]
        assert first.shards("val") == dataset.shards("val")


def test_memory_url(memory: str) -> None:
    dataset = write(memory)
    assert dataset.splits["train"][0].path.startswith("memory://")
    read = Rows(dataset, "val").read(np.array([2, 0]))
    assert [r.image for r in read] == [b"image 2", b"image 0"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.filesystem("s3").mkdir("shards")
    yield "s3://shards/set"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3_url(bucket: str) -> None:
    dataset = write(bucket, 10, rows_per_group=2, shard_bytes=28)
    assert dataset.splits["train"][1].path == f"{bucket}/train-00001-of-00003.parquet"
    assert [r.label for r in Rows(dataset, "train").read(np.array([9, 4, 5]))] == [0, 1, 2]
    assert write(bucket, 4).rows("train") == 4
    with pytest.raises(DataError, match="s3://shards/none: no such file or folder"):
        open_dataset("s3://shards/none")
    fsspec.filesystem("s3").pipe_file("shards/set/train-00000-of-00001.parquet", b"half")
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet: not readable as Parquet"):
        open_dataset(bucket)


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="../shared/data/cifar10 is not there")
def test_hugging_face_cifar10_opens() -> None:
    dataset = open_dataset(str(DATA / "cifar10"))
    assert (dataset.image, dataset.label) == ("img", "label")
    assert len(dataset.classes) == 10
    assert dataset.classes[0] == "airplane"
    assert dataset.held_out == "test"
    assert dataset.rows("train") == 50_000
    record = Rows(dataset, "train").read(np.array([49_999]))[0]
    assert decode(record.image, record.place).shape == (32, 32, 3)


def parquet(path: Path, schema: pa.Schema | None = None, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path)
    return path


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train-00000-of-00001", "validation-00000-of-00001"], {"train": 1, "val": 1}),
        (["data/train-0", "data/valid-0", "data/test-0"], {"train": 1, "val": 1, "test": 1}),
        (["train/0000", "train/0001", "dev/0000"], {"train": 2, "val": 1}),
        (["unsupervised-0", "train-0"], {"train": 1, "unsupervised": 1}),
        (["cifar10_train", "cifar10_test"], {"train": 1, "test": 1}),
        (["images.train", "images.val", "test/images"], {"train": 1, "val": 1, "test": 1}),
        (["train/crash_test_1", "val/station-train-0"], {"train": 1, "val": 1}),
        (["train-0", ".trash/train-0"], {"train": 1}),
        (["part-00000", "part-00001"], {"train": 2}),
        (["data-00000-of-00001"], {"train": 1}),
        (["some", "more"], {"train": 2}),
        (["default/partial-train/0000", "default/partial-test/0000"], {"train": 1, "test": 1}),
        (["default/train/0000", "default/unlabeled/0000"], {"train": 1, "unlabeled": 1}),
        (["train-0", "data/more"], {"train": 2}),
        ([f"train-{n:05d}-of-00002-{n}f1e2d3c4b5a6978" for n in range(2)], {"train": 2}),
    ],
)
def test_files_are_found_by_split(tmp_path: Path, files: list[str], splits: dict[str, int]) -> None:
    for name in files:
        parquet(tmp_path / f"{name}.parquet", image=[b"x"], label=[2])
    dataset = open_dataset(str(tmp_path))
    assert {split: len(shards) for split, shards in dataset.splits.items()} == splits
    assert dataset.classes == ("0", "1", "2")


def test_a_missing_file_is_noticed_behind_the_hubs_hashes(tmp_path: Path) -> None:
    for number in (0, 2):
        name = f"train-0000{number}-of-00003-{number}f1e2d3c4b5a6978"
        parquet(tmp_path / f"{name}.parquet", image=[b"x"], label=[2])
    with pytest.raises(DataError, match=r"2 of 3 files are there, .*train-00001-of-00003.parquet"):
        open_dataset(str(tmp_path))


def test_one_file_is_a_training_split(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", img=[b"x", b"y"], fine_label=[0, 1], other=[5, 6])
    dataset = open_dataset(str(path))
    assert (dataset.image, dataset.label) == ("img", "fine_label")
    assert (dataset.rows("train"), dataset.held_out) == (2, None)
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        dataset.rows("val")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^nowhere://set: Protocol not known"):
        open_dataset("nowhere://set")
    with pytest.raises(DataError, match=r"/nowhere: no such file or folder"):
        open_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no Parquet files there"):
        open_dataset(str(tmp_path))
    with pytest.raises(DataError, match="no image for split 'train'"):
        write_split(str(tmp_path), "train", [], CLASSES)


def test_labels_outside_the_classes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train a.jpg: label is 3, outside 0 to 2"):
        write_split(str(tmp_path), "train", [(b"x", "a.jpg", 3)], CLASSES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_truncated_parquet_is_named(tmp_path: Path, keep: int) -> None:
    write(str(tmp_path))
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"{path.name}: not readable as Parquet \(.*\); copy") as e:
        open_dataset(str(tmp_path))
    assert "\n" not in str(e.value)


def test_damage_inside_a_file_is_named(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), 200)
    path = tmp_path / "train-00000-of-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 400 + data[404:])
    with pytest.raises(DataError, match=f"{path.name}: not readable as Parquet"):
        Rows(dataset, "train").read(np.arange(10))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["x"], "label": [1]}, "no column of encoded images .*; it has text: string, lab"),
        ({"image": [b"x"], "size": [1]}, "no column of integer labels .*; it has image: binary"),
        ({"image": [b"x"], "label": ["cat"]}, "no column of integer labels .* label: string"),
        ({"image": [b"x"], "label": pa.array([None], pa.int64())}, "'label' holds no label of 0"),
        ({"image": [{"bytes": 1}], "label": [1]}, "no column of encoded images"),
    ],
)
def test_columns_that_are_missing(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    parquet(tmp_path / "train-0.parquet", **columns)
    with pytest.raises(DataError, match=rf"train-0.parquet: {message}"):
        open_dataset(str(tmp_path))


def test_files_that_differ(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", image=[b"x"], label=[1])
    parquet(tmp_path / "train-1.parquet", picture=[b"x"], label=[1])
    with pytest.raises(DataError, match=r"train-1.parquet: no column 'image' as in .*train-0"):
        open_dataset(str(tmp_path))
    parquet(tmp_path / "train-1.parquet", image=[b"x"], label=["one"])
    with pytest.raises(DataError, match=r"train-1.parquet: 'label' is string, no integer"):
        open_dataset(str(tmp_path))
    parquet(tmp_path / "train-1.parquet", image=["x"], label=[1])
    with pytest.raises(DataError, match=r"train-1.parquet: 'image' is string, no encoded images"):
        open_dataset(str(tmp_path))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array([1]), pa.array([2])], ["image", *"yy"])
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0.parquet: 2 columns are called 'y'; rename all"):
        open_dataset(str(tmp_path))


def test_files_whose_classes_differ(tmp_path: Path) -> None:
    def add(name: str, *classes: str) -> None:
        features = {"label": {"_type": "ClassLabel", "names": classes}}
        schema = pa.schema({"image": pa.binary(), "label": pa.int64()}).with_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        parquet(tmp_path / name, schema, image=[b"x"], label=[0])

    parquet(tmp_path / "train-0.parquet", image=[b"x"], label=[0])  # which names none
    add("train-1.parquet", "cat", "dog")
    assert open_dataset(str(tmp_path)).classes == ("cat", "dog")
    add("test-0.parquet", "dog", "cat")
    with pytest.raises(DataError, match=r"test-0.parquet: 'label' has other classes than in .*"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(("names", "classes"), [([4, 5], ("4", "5")), (5, "01"), ("abcd", "01")])
def test_names_of_classes_that_are_no_texts(
    tmp_path: Path, names: object, classes: tuple[str, ...]
) -> None:
    features = {"label": {"_type": "ClassLabel", "names": names}}
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()}).with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    rows = pa.table({"image": [b"x", b"y"], "label": [0, 1]}, schema=schema)
    pq.write_table(rows, tmp_path / "train-0.parquet")
    assert open_dataset(str(tmp_path)).classes == tuple(classes)


def test_numbers_that_are_no_classes(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", image=[b"x"], label=[3_000_000_000])
    with pytest.raises(DataError, match=r"'label' is up to 3000000000 in 1 rows, no classes'"):
        open_dataset(str(tmp_path))
    parquet(tmp_path / "train-0.parquet", image=[b"x"], label=[999])
    assert len(open_dataset(str(tmp_path)).classes) == 1000


def test_a_row_group_in_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Arrow reads one of more than 2 GiB."""
    write(str(tmp_path), 10, rows_per_group=10)
    dataset = open_dataset(str(tmp_path))
    want = Rows(dataset, "train").read(np.arange(10))
    whole = pq.ParquetFile.read_row_group

    def pieces(self: pq.ParquetFile, index: int, **more: object) -> pa.Table:
        table = whole(self, index, **more)
        return pa.concat_tables([table.slice(0, 4), table.slice(4)])

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", pieces)
    assert Rows(dataset, "train").read(np.arange(10)) == want


def test_folders_that_are_links_are_looked_into(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_split(f"{tmp_path}/far/{split}", split, records(4), CLASSES)
        (tmp_path / "near").mkdir(exist_ok=True)
        (tmp_path / "near" / split).symlink_to(tmp_path / "far" / split)
    (tmp_path / "near/train/round").symlink_to(tmp_path / "near")
    found = open_dataset(f"{tmp_path}/near")
    assert {split: found.rows(split) for split in found.splits} == {"train": 4, "val": 4}


def test_manifest_and_files_that_disagree(tmp_path: Path) -> None:
    write(str(tmp_path), 10, rows_per_group=2, shard_bytes=28)
    second = tmp_path / "train-00001-of-00003.parquet"
    data = second.read_bytes()
    second.write_bytes((tmp_path / "train-00002-of-00003.parquet").read_bytes())
    with pytest.raises(
        DataError, match=f"{second.name}: 2 rows in 1 row groups, 4 in 2 by dataset"
    ):
        open_dataset(str(tmp_path))
    second.unlink()
    with pytest.raises(DataError, match=f"{second.name}: no such file"):
        open_dataset(str(tmp_path))
    whole = (tmp_path / "dataset.json").read_text()
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DataError, match=f"2 of 3 files are there, .*{second.name} is not; fetch"):
        open_dataset(str(tmp_path))
    second.write_bytes(data)
    for text, message in (
        ("{", "not a manifest"),
        ("{}", "not a manifest"),
        ("[]", "not a manifest"),
        (whole.replace('"size": 8', '"size": "8"'), "not a manifest"),
        (whole.replace('"groups": [', '"groups": ["x", '), "not a manifest"),
        (whole.replace('"size": 8', '"size": -8'), "not a manifest"),
        (whole.replace('"train": 10', '"train": "10"'), "not a manifest"),
        (whole.replace('"label": "label"', '"label": 1'), "not a manifest"),
        (json.dumps(json.loads(whole) | {"classes": "abc"}), "not a manifest"),
        (json.dumps(json.loads(whole) | {"words": ["a"]}), "not a manifest"),
        (json.dumps(json.loads(whole) | {"prepared": "x"}), "not a manifest"),
    ):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(DataError, match=rf"dataset.json: {message} \(.*\); prepare"):
            open_dataset(str(tmp_path))


def test_a_shard_without_its_columns_is_named(tmp_path: Path) -> None:
    write(str(tmp_path))
    (file,) = tmp_path.glob("train-*.parquet")
    pq.write_table(pq.read_table(file).rename_columns(["picture", "label"]), file)
    with pytest.raises(DataError, match=f"{file.name}: no column 'image' as by dataset.json"):
        open_dataset(str(tmp_path))


def test_a_manifest_of_another_version(tmp_path: Path) -> None:
    write(str(tmp_path))
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(DataError, match=r"dataset.json: format 2; this version reads 1"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (None, 1, "'image' is empty; remove the row"),
        ({"bytes": None, "path": None}, 1, "'image' is empty; remove the row"),
        ({"bytes": None, "path": "a.jpg"}, 1, "'image' holds a path, a.jpg, and no bytes; embed"),
        ({"bytes": b"x", "path": None}, None, "'label' is empty; correct or remove the row"),
        ({"bytes": b"x", "path": None}, -1, "'label' is -1, outside 0 to 2; correct"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, image: object, label: object, message: str) -> None:
    good = {"bytes": b"x", "path": None}
    schema = pa.schema([("image", IMAGE), ("label", pa.int64())])
    parquet(tmp_path / "train-0.parquet", schema, image=[good, image], label=[2, label])
    rows = Rows(open_dataset(str(tmp_path)), "train")
    with pytest.raises(DataError, match=f"^train-0.parquet row 1: {message}"):
        rows.read(np.array([0, 1]))
    faults: list[str] = []
    assert [r.row for r in rows.read(np.array([1, 0]), faults)] == [0]
    assert len(faults) == 1


def test_a_file_that_changed_and_rows_that_are_not_there(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), 10, rows_per_group=5)
    with pytest.raises(IndexError, match="rows 3 to 10 of 10 in train"):
        Rows(dataset, "train").read(np.array([3, 10]))
    write(str(tmp_path), 8, rows_per_group=4)
    with pytest.raises(DataError, match="row group 0 has 4 rows and had 5; the file changed"):
        Rows(dataset, "train").read(np.array([0]))


def test_groups_are_fetched_once_a_call_and_kept_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write(str(tmp_path), 12, rows_per_group=2)
    fetched: list[int] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, **kw: fetched.append(i) or read(self, i, **kw),
    )
    Rows(dataset, "train", cache_groups=1).read(np.array([0, 11, 1, 10, 0]))
    assert fetched == [0, 5]
    rows = Rows(dataset, "train", cache_groups=2)
    rows.read(np.array([0, 2]))
    rows.read(np.array([0, 4]))
    rows.read(np.array([0]))
    assert fetched == [0, 5, 0, 1, 2]
    rows = Rows(dataset, "train", cache_bytes=1)
    rows.read(np.array([0, 2]))
    rows.read(np.array([2]))
    assert fetched == [0, 5, 0, 1, 2, 0, 1]


@given(reads=st.lists(st.lists(st.integers(0, 23), unique=True), min_size=2, max_size=5))
def test_what_comes_early_from_far_away_is_the_same(reads: list[list[int]]) -> None:
    dataset = write("memory://shards/early", 24, rows_per_group=2)
    rows, alone = Rows(dataset, "train", cache_groups=3), Rows(dataset, "train")
    for now, then in pairwise(np.array(r, np.int64) for r in reads):
        assert rows.read(now, then=then) == [alone.read(np.array([row]))[0] for row in now]
    rows._threads.shutdown()  # what still comes would be counted by another test
    fsspec.filesystem("memory").rm("/shards", recursive=True)


def test_row_groups_far_away_are_fetched_together_and_once(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    both, read = threading.Barrier(2, timeout=30), pq.ParquetFile.read_row_group

    def meet(self: pq.ParquetFile, i: int, **more: object) -> pa.Table:
        fetched.append(i)
        both.wait()
        return read(self, i, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", meet)
    rows = Rows(write(memory, 24, rows_per_group=2), "train")
    rows.read(np.arange(8), then=np.arange(4, 20))
    rows.read(np.arange(20))
    assert sorted(fetched) == list(range(10))


def test_what_failed_early_is_asked_for_again_in_its_turn(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store was away then, and is back."""
    rows, away, read = Rows(write(memory, 4, rows_per_group=2), "train"), [True], Rows._fetch

    def fetch(self: Rows, number: int) -> object:
        if number and away[0]:
            raise DataError("the store failed")
        return read(self, number)

    monkeypatch.setattr(Rows, "_fetch", fetch)
    rows.read(np.arange(2), then=np.arange(2, 4))
    rows._threads.shutdown()  # all that was asked for has failed
    rows._threads = ThreadPoolExecutor(1)
    away[0] = False
    assert [record.row for record in rows.read(np.arange(2, 4))] == [2, 3]


def test_what_came_early_and_is_bad_is_said_in_its_turn(memory: str) -> None:
    dataset = write(memory, 4, rows_per_group=2, shard_bytes=1)
    second = dataset.shards("train")[1]
    fsspec.filesystem("memory").rm_file(second.path)
    rows = Rows(dataset, "train")
    early = rows.read(np.arange(2), then=np.arange(4))
    assert [record.label for record in early] == [0, 1]
    with pytest.raises(DataError, match=f"^{second.path}: no such file"):
        rows.read(np.arange(4))
