"""What images show, as people lay them out: nothing is lost, mixed up or guessed in silence."""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import plan, prepare, rows

from datasets import DataError, fetch
from datasets.kept import Options, complete, finished
from datasets.listing import read_labels, read_list, read_words
from datasets.preparation import make_shard
from datasets.rows import Rows
from datasets.shards import open_dataset, write_manifest, write_split
from datasets.sources import find_source

WHOLE = Options(size=16, holdout=0, keep=True)


def files(folder: Path, *names: str) -> Path:
    """An image at each of these places, the n-th with the number n."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(made.encoded(number))
    return folder


def tarred(path: Path, *names: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.tar_bytes([(name, made.encoded(n)) for n, name in enumerate(names)]))
    return str(path)


def test_labels_of_images_that_share_a_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    source = tarred(tmp_path / "x.tar", "./a/0.jpg", "./a/1.jpg", "./b/0.jpg", "./b/1.jpg")
    given = tmp_path / "labels.csv"
    given.write_text(
        "file,label,split\na/0.jpg,cat,\na/1.jpg,cat,\nb/0.jpg,dog,\nb/1.jpg,dog,val\n"
    )
    manifest = prepare(source, tmp_path / "shards", WHOLE, labels=read_labels(str(given), []))
    assert manifest["rows"] == {"train": 3, "val": 1}
    found = rows(tmp_path / "shards", "train") + rows(tmp_path / "shards", "val")
    assert sorted(found) == sorted(
        (label, made.encoded(n)) for n, label in enumerate(["cat", "cat", "dog", "dog"])
    )
    given.write_text("0.jpg,cat\n1.jpg,cat\n")
    prepare(source, tmp_path / "alike", WHOLE, labels=read_labels(str(given), []))
    given.write_text("a/0.jpg,cat\na/1.jpg,cat\nb/0.jpg,cat\n")
    with pytest.raises(DataError, match=r"b/1.jpg: the list of labels has no such path, nor one"):
        prepare(source, tmp_path / "few", WHOLE, labels=read_labels(str(given), []))
    given.write_text("x/0.jpg,cat\nx/1.jpg,cat\ny/0.jpg,dog\n")
    with pytest.raises(DataError, match=r"/0.jpg: the list of labels has no such path, nor one la"):
        prepare(source, tmp_path / "none", WHOLE, labels=read_labels(str(given), []))
    given.write_text("0.jpg,cat\n./0.jpg,dog\n")
    with pytest.raises(DataError, match=r"labels.csv: 0.jpg is 'cat' and 'dog'; remove a line"):
        read_labels(str(given), [])


@pytest.mark.parametrize("inner", ["cat/{}.jpg", "./top/cat/{}.jpg"])
def test_tars_of_class_folders_are_splits(inner: str, tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        names = [inner.format(n) for n in range(count)]
        tarred(tmp_path / f"tars/{split}.tar", *names, inner.replace("cat", "dog").format(9))
    manifest = prepare(f"{tmp_path}/tars", tmp_path / "shards", WHOLE)
    assert manifest["classes"] == ["cat", "dog"]
    assert manifest["rows"] == {"train": 4, "val": 3}
    for piece in ("photos-0", "photos-1"):
        tarred(tmp_path / f"pieces/{piece}.tar", inner.format(1), inner.replace("cat", piece))
    pieces = prepare(f"{tmp_path}/pieces", tmp_path / "pieced", WHOLE)
    assert pieces["classes"] == ["cat", "photos-0", "photos-1"]
    for name, place in (("train/cat", "x/1.jpg"), ("train/dog", "1.jpg"), ("val/cat", "2.jpg")):
        tarred(tmp_path / f"classes/{name}.tar", place)
    classed = prepare(f"{tmp_path}/classes", tmp_path / "classed", WHOLE)
    assert (classed["classes"], classed["rows"]) == (["cat", "dog"], {"train": 2, "val": 1})
    for name in ("class-0", "class-1"):
        tarred(tmp_path / f"named/{name}.tar", "images/1.jpg", "images/2.jpg")
    assert prepare(f"{tmp_path}/named", tmp_path / "n", WHOLE)["classes"] == ["class-0", "class-1"]
    for name in ("0", "1"):
        tarred(tmp_path / f"numbers/{name}.tar", "x/1.jpg", "y/2.jpg")
    assert prepare(f"{tmp_path}/numbers", tmp_path / "m", WHOLE)["classes"] == ["0", "1"]
    tarred(tmp_path / "flat/train.tar", "1.jpg")
    tarred(tmp_path / "flat/test.tar", "2.jpg")
    with pytest.raises(DataError, match=r"\d.jpg: in no class folder"):
        prepare(f"{tmp_path}/flat", tmp_path / "none", WHOLE)


def test_where_the_source_lies_makes_no_split(tmp_path: Path) -> None:
    for split in "train", "val":
        for kind in "cat", "dog":
            tarred(tmp_path / f"dev/photos-{split}-{kind}.tar", f"{kind}/{split}.jpg")
    manifest = prepare(f"{tmp_path}/dev", tmp_path / "shards", WHOLE)
    assert manifest["rows"] == {"train": 2, "val": 2}
    assert prepare(f"{tmp_path}/dev/*.tar", tmp_path / "again", WHOLE) == manifest


def test_a_tar_of_tars_is_not_all_that_is_taken_of_several(tmp_path: Path) -> None:
    inner = made.tar_bytes([("1.jpg", made.encoded(1))])
    (tmp_path / "all").mkdir()
    (tmp_path / "all/a_train.tar").write_bytes(made.tar_bytes([("n1.tar", inner)]))
    tarred(tmp_path / "all/b_val.tar", "1.jpg")
    said = r"a_train.tar is a tar of tars, and there are 1 more; prepare them one by one"
    with pytest.raises(DataError, match=said):
        prepare(f"{tmp_path}/all", tmp_path / "shards", WHOLE)


def test_tars_beside_folders_of_images_are_not_all_that_is_taken(tmp_path: Path) -> None:
    tarred(tmp_path / "all/cat.tar", "1.jpg")
    tarred(tmp_path / "all/bird.tar", "1.jpg")
    (tmp_path / "all/devkit").mkdir()
    (tmp_path / "all/devkit/readme.txt").write_text("about")
    both = find_source(f"{tmp_path}/all")
    (tmp_path / "all/dog").mkdir()
    (tmp_path / "all/dog/2.jpg").write_bytes(made.encoded(2))
    with pytest.raises(DataError, match=r"all: bird\.tar is a tar, and dog a folder of images"):
        find_source(f"{tmp_path}/all")
    assert find_source(f"{tmp_path}/all/*.tar").parts == both.parts


def test_an_empty_image_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store would send the whole tar for it."""
    (tmp_path / "in").mkdir()
    images = [("cat/1.jpg", made.encoded(1)), ("cat/2.jpg", b""), ("dog/3.jpg", made.encoded(3))]
    (tmp_path / "in/t.tar").write_bytes(made.tar_bytes(images))
    asked, get = list[int](), fetch._get

    def noted(fs: Any, paths: list[str], bounds: list[tuple[int, int]]) -> Any:
        asked.extend(stop - start for start, stop in bounds)
        return get(fs, paths, bounds)

    monkeypatch.setattr(fetch, "_get", noted)
    skipping = replace(WHOLE, on_error="skip")
    assert prepare(f"{tmp_path}/in/t.tar", tmp_path / "out", skipping)["rows"] == {"train": 2}
    assert asked
    assert all(asked)


def test_a_plan_does_not_name_all_files_in_each_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.preparation.SHARD_BYTES", 10_000)
    folder = files(tmp_path / "in", *(f"{kind}/{n:04}.jpg" for kind in "ab" for n in range(40)))
    shards = plan(str(folder), tmp_path / "out", WHOLE).shards["train"]
    (kept,) = (tmp_path / "out").rglob("train.parquet")
    with pq.ParquetFile(kept) as file:
        groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
    assert len(groups) == shards > 4
    each = len(f"{folder}/a/0000.jpg") + 4
    assert max(g.column(0).total_uncompressed_size for g in groups) < 2 * each * 80 / shards


def test_parquet_of_large_images_is_shuffled_in_smaller_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that each row group is read once: `Rows` keeps a window."""
    names = ["cat", "dog"]
    records = [(made.encoded(n), f"{n}.jpg", n % 2) for n in range(60)]
    written = write_split(f"{tmp_path}/in", "train", records, names, rows_per_group=4)
    monkeypatch.setattr(
        "datasets.assignment.WINDOW_BYTES", 8 * sum(len(image) for image, *_ in records) // 60
    )
    write_manifest(f"{tmp_path}/in", {"train": written}, names)
    read, groups = Rows._fetch, list[int]()

    def noted(self: Rows, number: int) -> Any:
        groups.append(number)
        return read(self, number)

    monkeypatch.setattr(Rows, "_fetch", noted)
    monkeypatch.setattr(fetch, "Rows", partial(Rows, cache_groups=3))
    prepare(f"{tmp_path}/in", tmp_path / "out", WHOLE)
    found = [image for _, image in rows(tmp_path / "out", "train")]
    assert sorted(found) == sorted(image for image, *_ in records)
    assert len(groups) < 3 * 15  # for a mean, and once for the images


def test_parquet_of_images_and_their_names_is_no_list(tmp_path: Path) -> None:
    table = {"image": [made.encoded(n) for n in range(4)], "filename": list("abcd")}
    table |= {"label": [0, 1, 0, 1]}
    pq.write_table(pa.table(table), tmp_path / "all.parquet")
    assert prepare(f"{tmp_path}/all.parquet", tmp_path / "out", WHOLE)["rows"] == {"train": 4}


@pytest.mark.parametrize("loose", ["test/1.jpg", "train/cover.jpg", "cover.jpg"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_image_beside_class_folders_is_named(kind: str, loose: str, tmp_path: Path) -> None:
    source = files(tmp_path / "x", "train/a/0.jpg", "train/b/0.jpg", "val/a/1.jpg", loose)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in sorted(source.rglob("*.jpg")):
                archive.write(file, file.relative_to(source))
        source = tmp_path / "x.zip"
    with pytest.raises(DataError, match=f"{loose}: in no class folder; say what"):
        prepare(str(source), tmp_path / "shards", WHOLE)


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("seg_train/seg_train", "seg_test/seg_test")]
)
def test_folders_may_call_splits_otherwise(names: tuple[str, str], tmp_path: Path) -> None:
    source = files(tmp_path / "x", *(f"{s}/{c}/0.jpg" for s in names for c in "ab"))
    manifest = prepare(str(source), tmp_path / "shards", WHOLE)
    assert (manifest["rows"], manifest["classes"]) == ({"train": 2, "test": 2}, ["a", "b"])
    files(source, "seg_pred/0.jpg")
    with pytest.raises(DataError, match=r"^seg_pred: a folder beside those of the splits"):
        prepare(str(source), tmp_path / "other", WHOLE)


def test_a_class_may_be_called_like_its_split(tmp_path: Path) -> None:
    names = [f"{split}/{label}/0.jpg" for split in ("train", "test") for label in ("train", "car")]
    source = files(tmp_path / "x", *names)
    manifest = prepare(str(source), tmp_path / "shards", WHOLE)
    assert (manifest["rows"], manifest["classes"]) == ({"train": 2, "test": 2}, ["car", "train"])


def test_classes_may_have_a_splits_name_in_theirs(tmp_path: Path) -> None:
    source = files(tmp_path / "x", "train_station/1/0.jpg", "test_tube/2/0.jpg")
    manifest = prepare(str(source), tmp_path / "shards", WHOLE)
    assert manifest["classes"] == ["test_tube", "train_station"]


def test_a_list_whose_columns_tell_no_path_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg")
    (tmp_path / "x.csv").write_text("photo_of,label,split\na.jpg,cat,train\n")
    with pytest.raises(DataError, match=r"x.csv line 1: names columns, but not both path and la"):
        prepare(f"{tmp_path}/x.csv", tmp_path / "shards", WHOLE)


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    source = files(tmp_path / "x", "train/0.jpg", "val/0.jpg", "train/1.jpg")
    assert prepare(str(source), tmp_path / "shards", WHOLE)["classes"] == ["train", "val"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder_beside_splits_is_named_and_hidden_ones_are_none(
    kind: str, tmp_path: Path
) -> None:
    places = [f"{split}/{label}/0.jpg" for split in ("train", "val") for label in "ab"]
    hidden = (".cache/a/0.jpg", "train/.ipynb_checkpoints/0.jpg", "__MACOSX/train/a/._0.jpg")
    source = files(tmp_path / "x", *places, *hidden)

    def packed() -> str:
        if kind == "folder":
            return str(source)
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in sorted(source.rglob("*.jpg")):
                archive.write(file, file.relative_to(source))
        return f"{tmp_path}/x.zip"

    manifest = prepare(packed(), tmp_path / "shards", WHOLE)
    assert (manifest["rows"], manifest["classes"]) == ({"train": 2, "val": 2}, ["a", "b"])
    files(source, "sample/x.jpg")
    with pytest.raises(DataError, match=r"^sample: a folder beside those of the splits"):
        prepare(packed(), tmp_path / "other", WHOLE)


@pytest.mark.parametrize("folder", ["plain_text/train-0", "default/train/0000", "Train/a"])
def test_parquet_is_found_as_deep_as_training_finds_it(folder: str, tmp_path: Path) -> None:
    made.make("parquet", tmp_path / "one")
    file = tmp_path / f"hub/{folder}.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes((tmp_path / "one/data.parquet").read_bytes())
    files(tmp_path / "hub", "zoo/assets/0.jpg")
    (tmp_path / "hub/a").mkdir()
    assert open_dataset(f"{tmp_path}/hub").rows("train") == made.IMAGES
    manifest = prepare(f"{tmp_path}/hub", tmp_path / "shards", WHOLE)
    assert manifest["rows"] == {"train": made.IMAGES}


def test_names_may_hold_what_fsspec_has_a_meaning_for(tmp_path: Path) -> None:
    source = files(tmp_path / "x", "a::b/0::0.jpg", "c/1.jpg")
    assert prepare(str(source), tmp_path / "s", WHOLE)["classes"] == ["a::b", "c"]


def test_a_flat_folder_takes_labels(tmp_path: Path) -> None:
    source = files(tmp_path / "x", "0.jpg", "1.jpg")
    (tmp_path / "labels.txt").write_text("0.jpg cat\n1.jpg dog\n")
    labels = read_labels(f"{tmp_path}/labels.txt", [])
    prepare(str(source), tmp_path / "shards", WHOLE, labels=labels)
    assert sorted(c for c, _ in rows(tmp_path / "shards", "train")) == ["cat", "dog"]


def test_links_on_a_disk_lead_on(tmp_path: Path) -> None:
    files(tmp_path / "elsewhere", "b/1.jpg", "deep/2.jpg")
    source = files(tmp_path / "x", "a/0.jpg")
    (source / "b").symlink_to(tmp_path / "elsewhere/b")
    (source / "a/more").symlink_to(tmp_path / "elsewhere/deep")
    (source / "a/round").symlink_to(source)
    (source / "a/nowhere.jpg").symlink_to(tmp_path / "gone")
    (source / "a/itself.jpg").symlink_to("itself.jpg")
    (source / "a/through.jpg").symlink_to("0.jpg/x.jpg")
    (source / "a/more/back").symlink_to(source / "a")
    manifest = prepare(str(source), tmp_path / "shards", WHOLE)
    assert (manifest["classes"], manifest["rows"]) == (["a", "b"], {"train": 3})
    tarred(tmp_path / "elsewhere/c.tar", "3.jpg")
    tarred(tmp_path / "tars/d.tar", "4.jpg")
    (tmp_path / "tars/c.tar").symlink_to(tmp_path / "elsewhere/c.tar")
    assert prepare(f"{tmp_path}/tars", tmp_path / "more", WHOLE)["classes"] == ["c", "d"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="loop: a link that leads to itself"):
        open_dataset(f"{tmp_path}/loop")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    source = files(tmp_path / "x", "a/0.jpg", "b/1.jpg")
    (source / "b").chmod(0)
    try:
        with pytest.raises(DataError, match=r"x/b: may not be read"):
            prepare(str(source), tmp_path / "shards", WHOLE)
    finally:
        (source / "b").chmod(0o755)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_a_tar_are_images(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        made.add(tar, "top/a/0.jpg", made.encoded(0))
        made.add(tar, "top/b/1.jpg", made.encoded(1))
        for name, target in (("top/b/2.jpg", "top/a/0.jpg"), ("top/a/3.jpg", "top/b/1.jpg")):
            link = tarfile.TarInfo(name)
            link.type = kind
            link.linkname = target if kind == tarfile.LNKTYPE else target.replace("top", "..")
            tar.addfile(link)
        chain = tarfile.TarInfo("top/b/4.jpg")
        chain.type, chain.linkname = tarfile.SYMTYPE, "2.jpg"
        tar.addfile(chain)
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards", WHOLE)
    want = [("a", 0), ("a", 1), ("b", 0), ("b", 0), ("b", 1)]
    assert sorted(rows(tmp_path / "shards", "train")) == sorted(
        (label, made.encoded(n)) for label, n in want
    )


def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        made.add(tar, "caf\xe9/0.jpg", made.encoded(0))
    with pytest.raises(DataError, match=r"x.tar: 'caf.udce9/0.jpg' is no UTF-8; rename it"):
        prepare(f"{tmp_path}/x.tar", tmp_path / "shards", WHOLE)


def test_a_photograph_is_told_from_its_mask_and_a_label_from_none(tmp_path: Path) -> None:
    members = []
    for n, label in enumerate(["cat", "dog"]):
        told = json.dumps({"label": None, "class": label}).encode()
        photo, mask = made.encoded(n), made.encoded(9, "PNG")
        order = [(f"{n}.jpg", photo), (f"{n}.seg.png", mask)]
        members += [(f"{n}.json", told), *(order if n else order[::-1])]
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(members))
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards", WHOLE)
    assert sorted(rows(tmp_path / "shards", "train")) == [
        ("cat", made.encoded(0)),
        ("dog", made.encoded(1)),
    ]


def test_a_link_stands_beside_its_label(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        made.add(tar, "0.jpg", made.encoded(0))
        made.add(tar, "0.cls", b"cat")
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
        tar.addfile(link)
        made.add(tar, "1.cls", b"dog")
    prepare(f"{tmp_path}/x.tar", tmp_path / "shards", WHOLE)
    assert sorted(rows(tmp_path / "shards", "train")) == [
        ("cat", made.encoded(0)),
        ("dog", made.encoded(0)),
    ]


def test_words_about_a_tar_of_class_folders_make_it_no_webdataset(tmp_path: Path) -> None:
    members = [("root/info.json", b"{}"), ("root/a/0.jpg", made.encoded(0))]
    members.append(("root/b/1.jpg", made.encoded(1)))
    (tmp_path / "x.tar").write_bytes(made.tar_bytes(members))
    assert prepare(f"{tmp_path}/x.tar", tmp_path / "shards", WHOLE)["classes"] == ["a", "b"]


def test_an_empty_split_in_a_list_is_train(tmp_path: Path) -> None:
    files(tmp_path, "0.jpg", "1.jpg", "2.jpg", "3.jpg")
    lines = "file,label,split\n0.jpg,a,\n1.jpg,b,train\n2.jpg,a,val\n3.jpg,b,\n"
    (tmp_path / "x.csv").write_text(lines)
    source = f"{tmp_path}/x.csv"
    assert prepare(source, tmp_path / "all", WHOLE)["rows"] == {"train": 3, "val": 1}
    assert plan(source, tmp_path / "one", WHOLE, split="train").images == {"train": 3}


def test_empty_lines_and_tabs(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\n\nlabel,file\n\ncat,a.jpg\n")
    assert list(read_list(f"{tmp_path}/x.csv")) == [("a.jpg", "cat", "")]
    (tmp_path / "x.csv").write_text("\nlabel,file\ncat\n")
    with pytest.raises(DataError, match=r"x.csv line 3: 1 fields"):
        list(read_list(f"{tmp_path}/x.csv"))
    (tmp_path / "words.txt").write_text("n01\tgoldfish, Carassius\nn02 a dog\nn03\n")
    words = {"n01": "goldfish, Carassius", "n02": "a dog", "n03": ""}
    assert read_words(f"{tmp_path}/words.txt") == words


def test_what_was_skipped_is_counted_by_its_reason(tmp_path: Path) -> None:
    files(tmp_path, "0.jpg", "1.jpg")
    names = [f"{n}.jpg" for n in range(6)]
    (tmp_path / "x.csv").write_text("".join(f"{name},{name[0] in '024'}\n" for name in names))
    options = Options(size=16, holdout=0, on_error="skip")
    assert prepare(f"{tmp_path}/x.csv", tmp_path / "s", options)["skipped"] == {"no such file": 4}
    files(tmp_path / "y", "a/0.jpg", "b/1.jpg")
    for name in ("one: a", "two: b"):
        (tmp_path / f"y/a/{name}.jpg").write_bytes(b"none")
    skipped = prepare(f"{tmp_path}/y", tmp_path / "t", options)["skipped"]
    assert list(skipped.values()) == [2]


def test_unfinished_plans_and_finished_ones_stand_in_nobodys_way(tmp_path: Path) -> None:
    source = made.make("tar", tmp_path / "source")
    prepared = plan(source, tmp_path / "shards")
    note = tmp_path / "shards/.prepare/plan.json"
    note.write_text("")  # as a kill may leave it
    prepare(source, tmp_path / "shards")
    # Of something else, and nothing says so any more.
    other = made.make("zip", tmp_path / "other", 30)
    begun = plan(source, tmp_path / "both")
    for split, number in (("train", 0), ("val", 0)):
        list(make_shard(begun, split, number))
    (tmp_path / "both/.prepare/plan.json").write_text("")
    assert prepare(other, tmp_path / "both") == prepare(other, tmp_path / "fresh")
    assert rows(tmp_path / "both", "train") == rows(tmp_path / "fresh", "train")
    # Killed between the manifest and the removal.
    note.parent.mkdir()
    note.write_text(json.dumps({"digest": prepared.digest}))
    manifest = prepare(source, tmp_path / "shards", split="test")
    assert list(manifest["rows"]) == ["train", "val", "test"]
    assert not note.parent.exists()
    # What another split has begun is not in the way of one that is complete, and stays.
    prepare(source, tmp_path / "two", split="train")
    added = plan(source, tmp_path / "two", split="val")
    list(make_shard(added, "val", 0))
    assert complete(plan(source, tmp_path / "two", split="train"))
    assert finished(added, "val", 0)


def test_several_data_sets_below_one_folder_are_not_mixed(tmp_path: Path) -> None:
    made.make("parquet", tmp_path / "one")
    data = pq.read_table(tmp_path / "one/data.parquet")
    for name in ("full", "small"):
        (tmp_path / f"hub/{name}/train").mkdir(parents=True)
        pq.write_table(data, tmp_path / f"hub/{name}/train/0000.parquet")
    with pytest.raises(DataError, match=r"several data sets have a train split \(full, small\)"):
        open_dataset(f"{tmp_path}/hub")
    assert open_dataset(f"{tmp_path}/hub/full").rows("train") == made.IMAGES
    for name in ("0", "1"):
        (tmp_path / f"chunks/train/{name}").mkdir(parents=True)
        pq.write_table(data, tmp_path / f"chunks/train/{name}/a.parquet")
    assert open_dataset(f"{tmp_path}/chunks").rows("train") == 2 * made.IMAGES


def test_rows_of_parquet_keep_their_splits(tmp_path: Path) -> None:
    source = made.make("parquet", tmp_path / "source")
    lines = [f"data.parquet row {n},cat,{'train' if n else 'val'}" for n in range(made.IMAGES)]
    (tmp_path / "x.csv").write_text("\n".join(["file,label,split", *lines]))
    with pytest.raises(DataError, match="Parquet has its own splits; leave the column out"):
        plan(source, tmp_path / "shards", labels=read_labels(f"{tmp_path}/x.csv", []))
