"""Sources of every kind that hold the same images, and what they become, for tests."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from datasets.kept import Options, Preparation
from datasets.preparation import finish, lay_out, make_shard
from datasets.rows import Rows
from datasets.scanning import scan
from datasets.shards import open_dataset
from datasets.sources import find_source

CLASSES = ("bird", "cat", "dog")
IMAGES = 12
SMALL = Options(size=16, holdout=0.25)


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth image that no other number gives."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(number: int, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(number, mode).save(buffer, kind, **options)
    return buffer.getvalue()


def images(count: int = IMAGES) -> list[tuple[str, str, bytes]]:
    """Class, file name and bytes of each."""
    return [(CLASSES[n % 3], f"{n:04d}.jpg", encoded(n)) for n in range(count)]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            add(tar, name, data)
    return buffer.getvalue()


def class_tar(count: int = IMAGES, prefix: str = "photos/") -> bytes:
    return tar_bytes([(f"{prefix}{c}/{name}", data) for c, name, data in images(count)])


def make(kind: str, folder: Path, count: int = IMAGES) -> str:
    """A source of this kind in `folder`; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    found = images(count)
    if kind == "ilsvrc":
        inner = [
            (f"{c}.tar", tar_bytes([(name, d) for k, name, d in found if k == c])) for c in CLASSES
        ]
        (folder / "train.tar").write_bytes(tar_bytes(inner))
        return str(folder / "train.tar")
    if kind == "class tars":
        for c in CLASSES:
            inside = tar_bytes([(name, d) for k, name, d in found if k == c])
            (folder / f"{c}.tar").write_bytes(inside)
        return str(folder)
    if kind == "tar":
        (folder / "photos.tar").write_bytes(class_tar(count))
        return str(folder / "photos.tar")
    if kind in ("zip", "stored zip"):
        method = zipfile.ZIP_DEFLATED if kind == "zip" else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / "photos.zip", "w", method) as archive:
            for c, name, data in found:
                archive.writestr(f"photos/{c}/{name}", data)
        return str(folder / "photos.zip")
    if kind == "webdataset":
        samples = []
        for n, (c, _, data) in enumerate(found):
            samples += [
                (f"{n:04d}.jpg", data),
                (f"{n:04d}.json", json.dumps({"label": c}).encode()),
            ]
        for part, half in enumerate((samples[: len(samples) // 2], samples[len(samples) // 2 :])):
            (folder / f"photos-{part:06d}.tar").write_bytes(tar_bytes(half))
        return str(folder)
    if kind == "parquet":
        feature = {
            "picture": {"_type": "Image"},
            "kind": {"_type": "ClassLabel", "names": list(CLASSES)},
        }
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema(
            [("picture", image), ("kind", pa.int64())],
            {"huggingface": json.dumps({"info": {"features": feature}})},
        )
        rows = {
            "picture": [{"bytes": d, "path": name} for _, name, d in found],
            "kind": [CLASSES.index(c) for c, _, _ in found],
        }
        pq.write_table(pa.table(rows, schema=schema), folder / "data.parquet", row_group_size=5)
        return str(folder)
    for c, name, data in found:
        (folder / "photos" / c).mkdir(parents=True, exist_ok=True)
        (folder / "photos" / c / name).write_bytes(data)
    if kind == "folder":
        return str(folder / "photos")
    lines = [(f"photos/{c}/{name}", c) for c, name, _ in found]
    if kind == "csv":
        text = "\n".join(["filename,label", *(f"{path},{c}" for path, c in lines)])
        (folder / "list.csv").write_text(text)
        return str(folder / "list.csv")
    assert kind == "parquet list"
    paths, labels = zip(*lines, strict=True)
    pq.write_table(pa.table({"path": paths, "label": labels}), folder / "list.parquet")
    return str(folder / "list.parquet")


KINDS = (
    *("ilsvrc", "class tars", "tar", "zip", "stored zip", "webdataset", "parquet", "folder"),
    *("csv", "parquet list"),
)


def plan(source: str, shards: Path, options: Options = SMALL, **more: Any) -> Preparation:
    """What shards a source would become."""
    found = find_source(source)
    tables = [scan(found, part)[0] for part in found.parts]
    entries = pa.concat_tables(tables).unify_dictionaries()
    return lay_out(str(shards), found, entries, options, **more)


def prepare(source: str, shards: Path, options: Options = SMALL, **more: Any) -> dict[str, Any]:
    """Makes a source's shards; their manifest."""
    prepared = plan(source, shards, options, **more)
    for split, count in prepared.shards.items():
        for number in range(count):
            list(make_shard(prepared, split, number))
    return finish(prepared)


def rows(folder: Path, split: str) -> list[tuple[str, bytes]]:
    """Class and image of each row."""
    dataset = open_dataset(str(folder))
    read = Rows(dataset, split).read(np.arange(dataset.rows(split)))
    return [(dataset.classes[r.label], r.image) for r in read]
