"""`towers neighbours`: the images whose features are nearest to those of an image (paper, 6.1)."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datasets import DataError
from datasets.augmentation import evaluation_views
from datasets.images import Pixels, decode
from datasets.layout import Dataset
from datasets.rows import Rows
from datasets.shards import open_dataset
from datasets.storage import matching, parquet, remove, storage, write_whole
from workers.cluster import connected
from workers.config import UserError
from workers.data import training_data
from workers.output import check_output, write_output, writing
from workers.predict import BATCH, image_files, open_known, read_image
from workers.progress import Progress
from workers.spread import only_here, spread
from workers.sweep import OnError, Swept, Work, sweep, usable_gpus
from workers.trained import Step, Trained

INDEX, ABOUT = "neighbours", "index.json"  # a folder in the run, and what it says of itself, last
SMALL = 256 << 20  # bytes of features up to which this process searches them itself
SIDE, LINE = 144, 18  # pixels of the contact sheet's images and of a line below them


def neighbours(
    run: str,
    images: Sequence[str],
    *,
    data: str = "",
    split: str = "train",
    k: int = 5,
    step: Step = None,
    output: str = "",
    on_error: OnError = "fail",
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The `k` rows of a split whose features, what the last layer reads, have the least Euclidean
    distance to those of each image; and a contact sheet of them, a PNG, at `output` if it is given.

    `data`: shards, those of the run's training if unset. The features of all rows are computed by
    the workers of the cluster and kept as Parquet in the run until its checkpoint or the rows are
    others. Returns the keys of `towers neighbours --json`. Raises UserError and DataError for what
    the user can mend, RunFailed if rows were lost.
    """
    progress, network = progress or Progress(), open_known(run, step)
    if k < 1:
        raise UserError(f"k is {k}: at least 1")
    dataset = open_dataset(data) if data else training_data(run, network.config)
    if not dataset:
        raise UserError(f"{run}: its training data is gone; name shards by --data")
    if split == "train" and network.config.images and not data:
        dataset = dataset.first(split, network.config.images)
    dataset.shards(split)
    files = [file for place in images for file in image_files(place)]
    size, crop = network.shape
    if output:
        check_output(output, ".png", files)
    classifier, features, shown_files = network.classifier(), [], []
    for first in range(0, len(files), BATCH):
        views = []
        for file in files[first : first + BATCH]:
            try:
                views.append(evaluation_views(read_image(file, size), crop, 1)[0])
            except DataError as error:
                if on_error == "fail":
                    raise
                progress.say(f"skipped: {error}")
            else:
                shown_files.append(file)
        if views:
            features.append(classifier.features(torch.from_numpy(np.stack(views))))
    if not features:
        raise UserError("no image is left to look for")
    wanted = torch.cat(features)
    index = f"{run}/{INDEX}"
    about = _about(network, dataset, split, on_error)
    kept = _kept(index)
    # Where no image was skipped, all are there for who would skip some.
    fresh = kept is not None and kept.get("of") in (about, {**about, "on_error": "fail"})
    small = dataset.rows(split) * wanted.shape[1] * 4 <= SMALL or only_here(index)
    with connected(unless=only_here(dataset.root) or (fresh and small)):
        if not fresh:
            kept = _build(index, about, network, dataset, split, on_error, workers, progress)
        assert kept
        found = _search(index, kept, wanted, k, workers, here=small)
    assert network.classes
    shown = [
        {
            "image": file,
            "neighbours": [
                {
                    "row": row,
                    "place": dataset.place(split, row),
                    "class": dataset.classes[label],
                    "title": _title(network, dataset, label),
                    "distance": distance,
                }
                for distance, row, label in nearest
            ],
        }
        for file, nearest in zip(shown_files, found, strict=True)
    ]
    if output:
        write_output(output, _sheet(shown, dataset, split, size))
    about = {"run": run, "step": network.step, "data": dataset.root, "split": split}
    return {**about, "images": shown, **({"file": output} if output else {})}


def _title(network: Trained, dataset: Dataset, label: int) -> str:
    name = dataset.classes[label]
    known = network.classes
    return known.title(known.names.index(name)) if known and name in known.names else name


def _about(network: Trained, dataset: Dataset, split: str, on_error: OnError) -> dict[str, Any]:
    """What the features of an index depend on."""
    shards = [[shard.state(), list(shard.groups)] for shard in dataset.shards(split)]
    of = {"step": network.step, "data": dataset.root, "split": split}
    return {**of, "shards": shards, "on_error": on_error}


def _kept(index: str) -> dict[str, Any] | None:
    """What the index says of itself; None if there is none that is complete."""
    fs, path = storage(index)
    try:
        return dict(json.loads(fs.cat_file(f"{path}/{ABOUT}")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def _build(
    index: str,
    about: dict[str, Any],
    network: Trained,
    dataset: Dataset,
    split: str,
    on_error: OnError,
    workers: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the features of all rows, a file for each range of rows, into a folder of this build's
    own; returns what the index then says of itself.

    Raises UserError if the run cannot be written.
    """
    folder = uuid.uuid4().hex
    fs, path = storage(index)
    with writing(index):
        if fs.exists(path):
            with suppress(FileNotFoundError):  # first: what is left may be half of it
                fs.rm_file(f"{path}/{ABOUT}")
            remove(fs, path)
        fs.makedirs(f"{path}/{folder}", exist_ok=True)
    check_output(f"{index}/{ABOUT}")
    here = only_here(dataset.root, index)
    gpus = usable_gpus(dataset, [network])
    work = Work(dataset, split, 1, on_error, (network,), None, here, gpus)
    parts = sweep(partial(_index, f"{index}/{folder}"), work, "indexed", workers, progress)
    kept = {"of": about, "folder": folder, "rows": sum(len(part.rows) for part in parts)}
    write_whole(fs, f"{path}/{ABOUT}", json.dumps(kept).encode())
    return kept


def _index(index: str, work: Work, batches: list[NDArray[np.int64]]) -> Iterator[Swept]:
    """Writes the features of a range of rows."""
    (network,) = work.networks
    classifier = network.classifier(work.device)
    loader = work.loader(network.shape)
    tables, skipped, faults = [], 0, []
    for numbers in batches:
        batch = loader.load(numbers, 0, False)
        skipped += batch.skipped
        faults += batch.faults
        if not len(batch.rows):
            continue
        features = classifier.features(torch.from_numpy(batch.crops)).numpy()
        flat = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
        columns = {"row": batch.rows, "label": batch.labels, "features": flat}
        tables.append(pa.table(columns))
    rows = np.empty(0, np.int64)
    if tables:
        rows = np.concatenate([table["row"].to_numpy() for table in tables])
        buffer = io.BytesIO()
        pq.write_table(pa.concat_tables(tables), buffer, compression="zstd")
        fs, path = storage(index)
        write_whole(fs, f"{path}/rows-{batches[0][0]:012d}.parquet", buffer.getvalue())
    yield Swept(rows, skipped, faults)  # in one, once the file is there: none is made of half of it


def _search(
    index: str,
    kept: dict[str, Any],
    features: Tensor,
    k: int,
    workers: int | None,
    *,
    here: bool,
) -> list[list[tuple[float, int, int]]]:
    """Distance, row and label of the k rows nearest to each of the features [n, units].

    Raises UserError if the index is not whole, as where another process makes it anew.
    """
    fs, path = storage(f"{index}/{kept['folder']}")
    files = [str(fs.unstrip_protocol(file)) for file in matching(fs, path, "*.parquet")]
    found: list[list[tuple[float, int, int]]] = [[] for _ in features]
    rows, shared = 0, (features.numpy(), k)
    for _, (count, part) in spread(_nearest, shared, files, workers=workers, here=here):
        rows += count
        found = [sorted(own + more)[:k] for own, more in zip(found, part, strict=True)]
    if rows != kept["rows"]:
        raise UserError(
            f"{index}: {rows} of {kept['rows']} rows are there; if no other `towers neighbours` "
            "makes it anew right now, remove it"
        )
    return found


def _nearest(
    shared: tuple[NDArray[np.float32], int], file: str
) -> Iterator[tuple[int, list[list[tuple[float, int, int]]]]]:
    wanted, k = shared
    with parquet(file) as source:
        table = source.read()
    flat = table["features"].combine_chunks().flatten().to_numpy()
    rows, labels = (table[name].to_numpy() for name in ("row", "label"))
    # Not by products, whose rounding hides how near the nearest are.
    distances = torch.cdist(
        torch.from_numpy(wanted),
        torch.from_numpy(flat.reshape(len(rows), -1).copy()),
        compute_mode="donot_use_mm_for_euclid_dist",
    ).numpy()
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    nearest = [
        [(float(d[n]), int(rows[n]), int(labels[n])) for n in places]
        for d, places in zip(distances, order, strict=True)
    ]
    yield len(rows), nearest


def _font(size: int) -> Any:
    """One with more than English letters, if there is any."""
    for name in ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _sheet(shown: Sequence[dict[str, Any]], dataset: Dataset, split: str, size: int) -> bytes:
    """A PNG of a line for each image: itself, and what is near it by falling likeness."""
    across = 1 + max(len(one["neighbours"]) for one in shown)
    gap, high = 8, SIDE + 2 * LINE + 8
    sheet = Image.new("RGB", (across * (SIDE + gap) + 3 * gap, len(shown) * high + gap), "white")
    draw, font = ImageDraw.Draw(sheet), _font(12)

    def put(line: int, place: int, image: Pixels, *said: str) -> None:
        left, top = gap + place * (SIDE + gap) + (2 * gap if place else 0), gap + line * high
        sheet.paste(Image.fromarray(image).resize((SIDE, SIDE)), (left, top))
        for n, text in enumerate(" ".join(line.split()) for line in said):
            while draw.textlength(text, font) > SIDE:
                text = text[:-2].rstrip() + "\u2026"
            draw.text((left, top + SIDE + 1 + n * LINE), text, "black", font)

    reader = Rows(dataset, split)
    for line, one in enumerate(shown):
        put(line, 0, read_image(one["image"], size), one["image"].rpartition("/")[2])
        near = one["neighbours"]
        records = reader.read(np.array([n["row"] for n in near], np.int64))
        for place, (n, record) in enumerate(zip(near, records, strict=True), 1):
            found = decode(record.image, record.place, size)
            put(line, place, found, n["title"], f"{n['distance']:.4g}")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
