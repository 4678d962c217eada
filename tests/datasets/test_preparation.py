"""Every kind of source becomes the same shards, whoever makes them, killed or not."""

from __future__ import annotations

import io
import json
import math
import resource
import shutil
import signal
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import plan, prepare, rows
from PIL import Image

from datasets import DataError
from datasets.assignment import hold_out
from datasets.images import decode
from datasets.kept import Options, complete, finished
from datasets.listing import read_labels, read_words
from datasets.preparation import finish, make_shard
from datasets.scanning import ENTRIES, scan
from datasets.shards import open_dataset
from datasets.sources import find_source
from datasets.statistics import Statistics
from datasets.validation import Findings, check_shard


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of so few images that a few hundred make several shards."""
    monkeypatch.setattr("datasets.preparation.GROUP_ROWS", (16, 64))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", made.KINDS)
def test_every_kind_of_source(kind: str, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    manifest = prepare(made.make(kind, tmp_path / "source"), shards, Options(keep=True, size=16))
    assert manifest["classes"] == list(made.CLASSES)
    found = rows(shards, "train") + (rows(shards, "val") if "val" in manifest["splits"] else [])
    assert sorted(found) == sorted((c, data) for c, _, data in made.images())


def test_images_are_brought_to_size_and_split_by_class(tmp_path: Path) -> None:
    manifest = prepare(made.make("tar", tmp_path / "source"), tmp_path / "shards")
    assert manifest["rows"] == {"train": 9, "val": 3}
    assert sorted(c for c, _ in rows(tmp_path / "shards", "val")) == sorted(made.CLASSES)
    for _, image in rows(tmp_path / "shards", "train"):
        assert decode(image, "x").shape == (16, 16, 3)
    statistics = Statistics.load(f"{tmp_path}/shards/statistics.npz")
    assert (statistics.images, statistics.mean_image.shape) == (9, (16, 16, 3))
    assert not (tmp_path / "shards" / ".prepare").exists()


def test_an_image_of_the_right_size_is_not_encoded_again(tmp_path: Path) -> None:
    data = {}
    for number, (kind, mode) in enumerate([("JPEG", "RGB"), ("PNG", "L"), ("JPEG", "L")]):
        buffer = io.BytesIO()
        made.picture(number, mode, (16, 16)).save(buffer, kind)
        data[f"{'ab'[number % 2]}/{number}.jpg"] = buffer.getvalue()
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(list(data.items())))
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards", Options(size=16, holdout=0))
    assert sorted(i for _, i in rows(tmp_path / "shards", "train")) == sorted(data.values())


def test_rows_are_shuffled(tmp_path: Path) -> None:
    source = made.make("tar", tmp_path / "source", 60)
    prepare(source, tmp_path / "shards", Options(size=16, keep=True, holdout=0))
    given = [(c, data) for c, _, data in made.images(60)]
    by_class = sorted(given, key=lambda row: row[0])  # as they stand in the archive, or sorted
    found = rows(tmp_path / "shards", "train")
    assert found not in (given, by_class)
    assert sorted(found) == sorted(given)


def test_a_shard_takes_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.preparation.SHARD_BYTES", 2000)
    manifest = prepare(made.make("tar", tmp_path / "source"), tmp_path / "shards")
    stored = sum(len(image) for _, image in rows(tmp_path / "shards", "train"))
    assert len(manifest["splits"]["train"]) == math.ceil(stored / 2000) > 1


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_any_order_and_a_second_time_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    source = made.make(kind, tmp_path / "source", 400)
    prepare(source, tmp_path / "one")
    prepared = plan(source, tmp_path / "two")
    items = [(split, n) for split, count in prepared.shards.items() for n in range(count)]
    assert len(items) > 4
    for item in reversed(items):
        list(make_shard(prepared, *item))
    finish(prepared)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert complete(plan(source, tmp_path / "two"))


def test_what_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = made.make("zip", tmp_path / "source", 400)
    prepare(source, tmp_path / "one")
    prepared = plan(source, tmp_path / "two")
    list(make_shard(prepared, "train", 0))
    half = make_shard(prepared, "train", 1)
    next(half)
    shutil.copytree(tmp_path / "two", tmp_path / "killed")  # as if power had gone
    half.close()
    with pytest.raises(DataError, match="its preparation has not ended; run `towers prepare`"):
        open_dataset(f"{tmp_path}/killed")
    again = plan(source, tmp_path / "killed")
    todo = [(s, n) for s, c in again.shards.items() for n in range(c) if not finished(again, s, n)]
    assert ("train", 0) not in todo
    assert ("train", 1) in todo
    for item in todo:
        list(make_shard(again, *item))
    finish(again)
    assert contents(tmp_path / "one") == contents(tmp_path / "killed")


def test_what_lies_there_is_not_overwritten(tmp_path: Path) -> None:
    source = made.make("tar", tmp_path / "source")
    prepare(source, tmp_path / "done")
    with pytest.raises(DataError, match="already holds a split 'train', prepared from something"):
        plan(source, tmp_path / "done", Options(size=24, holdout=0.25))
    plan(source, tmp_path / "begun")
    with pytest.raises(DataError, match="an unfinished preparation of something else lies there"):
        plan(source, tmp_path / "begun", Options(size=24))
    (tmp_path / "own").mkdir()
    own = tmp_path / "own/train-00000-of-00001.parquet"
    own.write_bytes(b"precious")
    with pytest.raises(DataError, match=f"{own.name} is there, and no data set of ours has it"):
        prepare(source, tmp_path / "own")
    assert own.read_bytes() == b"precious"


def test_a_split_is_added_with_the_classes_that_are_there(tmp_path: Path) -> None:
    train = made.make("ilsvrc", tmp_path / "train")
    flat = [(f"val_{n:04d}.jpg", made.encoded(100 + n)) for n in range(4)]
    (tmp_path / "val.tar").write_bytes(made.tar_bytes(flat))
    words = tmp_path / "words.txt"
    words.write_text("dog a hound\nbird a feathered one\ncat a mouser\n")
    prepare(train, tmp_path / "shards", split="train", words=read_words(str(words)))
    truth = tmp_path / "truth.txt"
    truth.write_text("1\n3\n2\n1\n")
    labels = read_labels(str(truth), list(read_words(str(words))))
    manifest = prepare(f"{tmp_path}/val.tar", tmp_path / "shards", split="val", labels=labels)
    assert manifest["rows"] == {"train": 12, "val": 4}
    assert manifest["words"]["cat"] == "a mouser"
    assert sorted(c for c, _ in rows(tmp_path / "shards", "val")) == ["bird", "cat", "dog", "dog"]


@pytest.mark.parametrize(
    "text",
    [
        "val_0.jpg 1\nval_1.jpg 2\n",
        "val_0.jpg cat\nval_1.jpg dog\n",
        "ImageId,PredictionString\nval_0,cat 1 2 3 4\nval_1,dog 5 6 7 8 dog 1 2 3 4\n",
        "label\tfile\ncat\ta/val_0.png\ndog\tval_1.jpg\n",
    ],
)
def test_lists_of_labels(text: str, tmp_path: Path) -> None:
    flat = [(f"val_{n}.jpg", made.encoded(n)) for n in range(2)]
    (tmp_path / "val.tar").write_bytes(made.tar_bytes(flat))
    (tmp_path / "list.txt").write_text(text)
    keep = Options(keep=True)
    prepare(made.make("tar", tmp_path / "source"), tmp_path / "shards", keep, split="train")
    labels = read_labels(f"{tmp_path}/list.txt", [])
    prepare(f"{tmp_path}/val.tar", tmp_path / "shards", keep, split="val", labels=labels)
    assert sorted(rows(tmp_path / "shards", "val")) == [
        ("cat", made.encoded(0)),
        ("dog", made.encoded(1)),
    ]


def write_images(folder: Path, *names: str) -> str:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.encoded(number))
    return str(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # As Tiny ImageNet and Kaggle's cats and dogs come.
        (
            ("train/n01/images/a.jpg", "train/n02/images/b.jpg", "val/images/c.jpg"),
            "val .*'images'",
        ),
        (("train/cat/a.jpg", "train/dog/b.jpg", "test/test1/c.jpg"), "test .*'test1'"),
        (("train/cat/a.jpg", "train/dog/b.jpg", "val/Cat/c.jpg", "val/dog/d.jpg"), "val .*'Cat'"),
    ],
)
def test_a_class_that_training_never_shows_is_refused(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    source = write_images(tmp_path / "source", *names)
    with pytest.raises(DataError, match=f"{message}, and train has none; say what .* by --labels"):
        prepare(source, tmp_path / "shards")
    manifest = prepare(source, tmp_path / "shards", split="train")
    assert list(manifest["rows"]) == ["train"]


def test_a_list_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.csv").write_text("path,label\na.jpg,cat\nb.jpg,dog\na.jpg,dog\n")
    with pytest.raises(DataError, match=r"list\.csv: a\.jpg is 'cat' and 'dog'; remove a line"):
        prepare(f"{tmp_path}/list.csv", tmp_path / "shards")


def test_one_size_holds_for_all_splits(tmp_path: Path) -> None:
    source, shards = made.make("tar", tmp_path / "source"), tmp_path / "shards"
    prepare(source, shards, Options(size=16), split="train")
    for options in (Options(size=24), Options(size=16, keep=True)):
        with pytest.raises(DataError, match="train was prepared by --size 16; say so here too"):
            prepare(source, shards, options, split="val")
    prepare(source, shards, Options(size=16), split="val")


def test_numbers_are_names_where_classes_are_numbered(tmp_path: Path) -> None:
    train = write_images(tmp_path / "train", *(f"{n:03}/a.jpg" for n in (1, 2, 3)))
    val = write_images(tmp_path / "val", "1/a.jpg", "2/a.jpg")
    prepare(train, tmp_path / "shards", split="train")
    with pytest.raises(DataError, match="class '1' is none of the 3"):
        prepare(val, tmp_path / "shards", split="val")


def test_labels_by_order_label_rows_in_theirs(tmp_path: Path) -> None:
    """Not in that of their names, in which row 10 comes before row 2."""
    table = {"image": [made.encoded(n) for n in range(12)], "label": [None, *[11] * 11]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    labels = [str(n) for n in range(12)]
    (tmp_path / "labels.txt").write_text("".join(f"{n + 1}\n" for n in range(12)))
    told = read_labels(f"{tmp_path}/labels.txt", labels)
    assert told == labels
    source = f"{tmp_path}/a.parquet"
    prepare(source, tmp_path / "shards", Options(keep=True), split="train", labels=told)
    want = [(str(n), made.encoded(n)) for n in range(12)]
    assert sorted(rows(tmp_path / "shards", "train")) == sorted(want)


def test_folders_named_like_splits_are_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        made.make("folder", tmp_path / split)
        (tmp_path / split / "photos").rename(tmp_path / "x")
        (tmp_path / split).rmdir()
        (tmp_path / "x").rename(tmp_path / split)
    manifest = prepare(str(tmp_path), tmp_path.parent / f"{tmp_path.name}-shards")
    assert manifest["rows"] == {"train": 12, "val": 12}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("1", "PNG")],
)
def test_every_mode_becomes_rgb(mode: str, kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    image = made.picture(1)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(buffer, kind)
    members = [(f"{c}/{n}.{kind}", buffer.getvalue()) for c in "ab" for n in range(2)]
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(members))
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards")
    with Image.open(io.BytesIO(rows(tmp_path / "shards", "train")[0][1])) as stored:
        assert (stored.mode, stored.size) == ("RGB", (16, 16))


def test_bad_images_are_named_or_counted(tmp_path: Path) -> None:
    members = [(f"{c}/{n}.jpg", made.encoded(n)) for c in "ab" for n in range(6)]
    members[3] = ("a/3.jpg", made.encoded(3)[:300])
    members[5] = ("a/5.jpg", b"")
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(members))
    with pytest.raises(DataError, match=r"a/[35].jpg: the image \(\d+ bytes\) does not decode"):
        prepare(f"{tmp_path}/x.tar", tmp_path / "shards")
    # The same preparation goes on, now leaving them out.
    manifest = prepare(
        f"{tmp_path}/x.tar", tmp_path / "shards", Options(16, holdout=0.25, on_error="skip")
    )
    assert sum(manifest["rows"].values()) == 10
    assert manifest["skipped"] == {"the image does not decode": 2}


def test_names_in_archives_lead_nowhere(tmp_path: Path) -> None:
    members = [("../../up/a.jpg", made.encoded(1)), ("/root/b/b.jpg", made.encoded(2))]
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(members))
    before = set(tmp_path.parent.parent.rglob("*.jpg"))
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards", Options(16, holdout=0))
    assert set(tmp_path.parent.parent.rglob("*.jpg")) == before
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar", "shards"}


def test_links_and_files_that_are_no_images_are_passed_by(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        made.add(tar, "a/1.jpg", made.encoded(1))
        made.add(tar, "b/README.txt", b"words")
        made.add(tar, "b/._2.jpg", b"a Mac's")
        made.add(tar, "b/2.jpg", made.encoded(2))
        link = tarfile.TarInfo("b/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = find_source(f"{tmp_path}/x.tar")
    table, passed = scan(source, source.parts[0])
    assert table["name"].to_pylist() == ["a/1.jpg", "b/2.jpg"]
    assert passed == ["b/README.txt", "b/._2.jpg"]


def test_a_deflated_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.jpg", made.encoded(1))
        archive.writestr("b/1.jpg", made.encoded(2))
        archive.writestr("b/bomb.jpg", bytes(200 << 20))
    with pytest.raises(DataError, match=r"b/bomb.jpg: more than 128 MiB; is it an image\?"):
        prepare(f"{tmp_path}/x.zip", tmp_path / "shards")


def test_a_very_long_image_takes_little_memory(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (60_000, 2)).save(buffer, "PNG")
    members = [("a/1.png", buffer.getvalue()), ("b/1.jpg", made.encoded(1))]
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(members))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards", Options(256, holdout=0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.tar", made.class_tar()[:5000], "ends inside|is truncated"),
        ("x.tar", made.tar_bytes([]), "no images there"),
        ("x.tar", b"no tar at all" * 100, "x.tar: (not readable as tar|damaged at byte 0)"),
        ("x.zip", b"no zip", "x.zip: not readable as zip"),
        ("x.csv", b"path,label\na.jpg,1\nb.jpg\n", "x.csv line 3: 1 fields; path and label?"),
        ("x.csv", b"path,label\na.jpg,\n", "x.csv line 2: an empty path or label"),
        ("x.csv", b"path,label\nnone.jpg,1\nnone2.jpg,2\n", "no such file .*none"),
        ("x.tar", made.tar_bytes([("1.jpg", b"x")]), "1.jpg: in no class folder; say what images"),
        ("x.tar.gz", b"x", "compressed as a whole, so that no image can be read alone"),
        ("x.mp4", b"x", "no source of images; a tar or zip"),
    ],
)
def test_a_bad_source_is_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        prepare(f"{tmp_path}/{name}", tmp_path / "shards")


def test_a_full_disk_leaves_no_shard(tmp_path: Path) -> None:
    prepared = plan(made.make("tar", tmp_path / "source", 300), tmp_path / "shards")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match=r"shards: cannot be written: .*File too large"):
            list(make_shard(prepared, "train", 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert finished(prepared, "train", 0) is None
    assert not list((tmp_path / "shards").glob("*.parquet"))
    assert not list((tmp_path / "shards").rglob("*.partial"))


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=200),
    st.floats(0, 0.99),
    st.integers(0, 5),
)
@settings(max_examples=60)
def test_hold_out_is_stratified(labels: list[int], share: float, seed: int) -> None:
    array = np.array(labels)
    chosen = hold_out(array, share, seed)
    for label in set(labels):
        count, taken = int((array == label).sum()), int(chosen[array == label].sum())
        assert abs(taken - share * count) <= 1 or taken == count - 1
        assert taken < count
    assert (chosen == hold_out(array, share, seed)).all()


def test_another_seed_holds_out_other_images() -> None:
    one, other = (hold_out(np.zeros(100, np.int64), 0.1, seed) for seed in (0, 1))
    assert one.sum() == other.sum() == 10
    assert (one != other).any()


def check(folder: Path) -> tuple[list[str], list[str]]:
    dataset = open_dataset(str(folder), check=False)
    findings, faults = Findings(dataset), []
    for split in dataset.splits:
        for number in range(len(dataset.shards(split))):
            for part in check_shard(dataset, (split, number)):
                findings.add(part)
                faults += part.faults
    more, notes = findings.judge()
    return faults + more, notes


def test_validation_finds_what_is_wrong(tmp_path: Path) -> None:
    source = made.make("tar", tmp_path / "source", 400)
    prepare(source, tmp_path / "shards")
    assert check(tmp_path / "shards") == ([], [])
    shards = tmp_path / "shards"

    def with_damage(name: str) -> Path:
        shutil.copytree(shards, tmp_path / name)
        return tmp_path / name

    file = with_damage("flipped") / "train-00001-of-00004.parquet"
    whole = bytearray(file.read_bytes())
    whole[whole.index(b"\xff\xd8\xff") + 1] ^= 255
    file.write_bytes(whole)
    assert "train-00001-of-00004.parquet row 0: the image" in check(tmp_path / "flipped")[0][0]
    # A group that cannot be read at all hides none of what follows.
    footer = pq.ParquetFile(file).metadata
    start = footer.row_group(0).column(0).data_page_offset
    whole[start : start + 64] = bytes(64)
    last = whole.rindex(b"\xff\xd8\xff")
    whole[last + 1] ^= 255
    file.write_bytes(whole)
    found = "\n".join(check(tmp_path / "flipped")[0])
    assert "parquet: not readable" in found
    assert f"parquet row {footer.num_rows - 1}: the image" in found

    (with_damage("short") / "train-00002-of-00004.parquet").write_bytes(whole[:1000])
    assert "train-00002-of-00004.parquet: not readable" in check(tmp_path / "short")[0][0]

    folder = with_damage("stray")
    shutil.copy(folder / "val-00000-of-00001.parquet", folder / "val-00001-of-00002.parquet")
    assert "val-00001-of-00002.parquet: not in dataset.json" in check(folder)[0][0]

    folder = with_damage("statistics")
    prepare(made.make("tar", tmp_path / "source2"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "statistics.npz", folder)
    assert "statistics.npz: of 9 other images" in check(folder)[0][0]

    folder = with_damage("mean")  # of as many images, but others
    kept = Statistics.load(f"{folder}/statistics.npz")
    replace(kept, mean_image=kept.mean_image + 20).save(f"{folder}/statistics.npz")
    assert f"statistics.npz: of {kept.images} other images" in check(folder)[0][0]

    folder = with_damage("counts")
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["val"][0]["groups"] = [7]
    (folder / "dataset.json").write_text(json.dumps(manifest))
    assert any("7 in 1 by dataset.json" in fault for fault in check(folder)[0])


def test_validation_finds_leakage_and_duplicates(tmp_path: Path) -> None:
    members = [
        (f"{s}/{c}/{n}.jpg", made.encoded(n))
        for s in ("train", "val")
        for c, n in [("a", 1), ("b", 2 if s == "train" else 3)]
    ]
    members += [(f"train/a/again{n}.jpg", made.encoded(1)) for n in range(2)]
    members.append(("val/b/also.jpg", made.encoded(1)))
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(members))
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards")
    faults, notes = check(tmp_path / "shards")
    assert len(faults) == 2
    for fault in faults:
        assert "val-00000-of-00001.parquet row" in fault
        assert "the image is also in train-00000-of-00001.parquet row" in fault
    assert notes == [f"{split}: 1 image(s) are there more than once" for split in ("train", "val")]


def test_validation_goes_on_beside_a_split_that_cannot_be_read(tmp_path: Path) -> None:
    members = [
        (f"{s}/{c}/{c}.jpg", made.encoded(n))
        for s in ("train", "val")
        for n, c in [(1, "a"), (2, "b")]
    ]
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(members))
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards")
    for file in (tmp_path / "shards").glob("train-*"):
        pq.write_table(pq.read_table(file).rename_columns(["picture", "label"]), file)
    faults, notes = check(tmp_path / "shards")
    assert notes == ["train: 2 of 2 classes have no image"]
    assert not [fault for fault in faults if "is also in" in fault]


def test_entries_are_small(tmp_path: Path) -> None:
    """What the one process that lays out has to hold: tens of bytes an image, not the images."""
    source = find_source(made.make("tar", tmp_path / "source", 300))
    table = scan(source, source.parts[0])[0]
    assert table.schema == ENTRIES
    assert table.nbytes < 100 * 300
