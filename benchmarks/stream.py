"""How fast crops come, against bare loops and other libraries on the same cores and files.

    python benchmarks/stream.py [--json FILE]

Each delivers shuffled batches of 128 random 224x224 crops in uint8, half of them mirrored, from
JPEGs of 256x256 pixels that `towers prepare` made of photographs. Rates are held against those of
bare loops on as many cores, a process each: of Pillow calls, and of the fastest that we know. The
other libraries decode with Pillow. Towers stands there three times: what makes its batches as a
loop too, to tell what Ray takes; decoding each image each time as all others do; and with images
that it has decoded before, as in all epochs but the first. WebDataset and MosaicML Streaming are
left out where they are not installed. MosaicML's pins shut out our NumPy: `pip install --no-deps`
is a way to have it.
"""

from __future__ import annotations

import argparse
import glob
import io
import itertools
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from table import cores as cores_here
from table import publish

from datasets.augmentation import Augmentation, Loader
from datasets.plan import Plan
from datasets.shards import open_dataset
from datasets.statistics import Statistics

PHOTOGRAPHS = "shared/data/imagenet-sample/ILSVRC2012_img_train.tar"  # beside the repository
SIZE, CROP, BATCH = 256, 224, 128
COPIES = 20  # of the photographs: an epoch that is too short shows how epochs begin

RATE = "images a second: "  # what a process that measures says

Batches = Iterator[Any]

# Pillow's pixels are read-only; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def source(folder: str) -> str:
    """Photographs for `towers prepare`: ILSVRC's where they are at hand, else drawn ones."""
    found = Path(__file__).resolve().parents[2] / PHOTOGRAPHS
    if found.exists():
        return str(found)
    rng = np.random.default_rng(0)
    for number in range(500):
        place = Path(folder, "photographs", f"class{number % 10}")
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(place / f"{number}.jpg", quality=90)
    return f"{folder}/photographs"


def prepare(folder: str) -> str:
    """Shards that hold the photographs `COPIES` times, with their statistics."""
    shards = f"{folder}/shards"
    command = [sys.executable, "-m", "workers.cli", "prepare", source(folder), f"{folder}/once"]
    alone = {**os.environ, "RAY_ADDRESS": "local"}
    subprocess.run(command, check=True, capture_output=True, env=alone)
    os.makedirs(shards)
    files = sorted(glob.glob(f"{folder}/once/train-*.parquet"))
    for number, path in enumerate(files * COPIES):
        os.link(path, f"{shards}/train-{number:05d}-of-{len(files) * COPIES:05d}.parquet")
    os.link(f"{folder}/once/statistics.npz", f"{shards}/statistics.npz")
    return shards


def encoded(path: str) -> list[bytes]:
    """The JPEGs in a shard."""
    return [row["bytes"] for row in pq.read_table(path, columns=["image"])["image"].to_pylist()]


def shuffled(shards: str) -> Iterator[bytes]:
    """JPEGs without end: files in random order, images within eight files."""
    files = glob.glob(f"{shards}/*.parquet")
    while True:
        random.shuffle(files)
        for first in range(0, len(files), 8):
            images = [data for path in files[first : first + 8] for data in encoded(path)]
            random.shuffle(images)
            yield from images


def pillow_crop(data: bytes) -> np.ndarray:
    """A random crop, as people write it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top = random.randint(0, SIZE - CROP), random.randint(0, SIZE - CROP)
    image = image.crop((left, top, left + CROP, top + CROP))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def pillow_loop(shards: str, cores: int) -> Batches:
    images = shuffled(shards)
    while True:
        batch = np.empty((BATCH, CROP, CROP, 3), np.uint8)
        for crop in batch:
            crop[:] = pillow_crop(next(images))
        yield batch


def best_loop(shards: str, cores: int) -> Batches:
    import simplejpeg

    images = shuffled(shards)
    pixels = np.empty((SIZE, SIZE, 3), np.uint8)
    while True:
        batch = np.empty((BATCH, CROP, CROP, 3), np.uint8)
        for crop in batch:
            mirrored = random.random() < 0.5
            simplejpeg.decode_jpeg(next(images), "BGR" if mirrored else "RGB", buffer=pixels)
            left, top = random.randint(0, SIZE - CROP), random.randint(0, SIZE - CROP)
            rows = pixels[top : top + CROP, left : left + CROP].reshape(CROP, -1)
            if mirrored:  # the bytes in reverse, eight at a time: many times as fast as one by one
                crop.reshape(CROP, -1).view(">u8")[:] = rows.view("<u8")[:, ::-1]
            else:
                crop.reshape(CROP, -1)[:] = rows
        yield batch


def loader_loop(shards: str, cores: int) -> Batches:
    dataset, statistics = open_dataset(shards), Statistics.load(f"{shards}/statistics.npz")
    loader = Loader(dataset, "train", Augmentation(SIZE, CROP), statistics.colour(), seed=0)
    for epoch in itertools.count():
        plan = Plan(dataset.groups("train"), BATCH, seed=0, epoch=epoch)
        for number in range(plan.batches):
            yield loader.load(plan.batch_rows(number), epoch, train=True).crops


class Photographs:
    """What torch's DataLoader takes: any image by its number."""

    def __init__(self, shards: str) -> None:
        self.images = [data for path in glob.glob(f"{shards}/*.parquet") for data in encoded(path)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return pillow_crop(self.images[index])


def data_loader(shards: str, cores: int) -> Batches:
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        Photographs(shards),  # type: ignore[arg-type]
        BATCH,
        shuffle=True,
        num_workers=cores,
        persistent_workers=True,
        drop_last=True,
    )
    while True:
        yield from loader


def web_dataset(shards: str, cores: int) -> Batches:
    import webdataset

    folder, urls = tempfile.mkdtemp(dir=Path(shards).parent), []
    for number, path in enumerate(glob.glob(f"{shards}/*.parquet")):
        urls.append(f"{folder}/{number:05d}.tar")
        with tarfile.open(urls[-1], "w") as tar:
            for index, data in enumerate(encoded(path)):
                member = tarfile.TarInfo(f"{number:05d}{index:05d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    data = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(500)
    data = data.to_tuple("jpg").map_tuple(pillow_crop).batched(BATCH, partial=False)
    for (batch,) in webdataset.WebLoader(data, batch_size=None, num_workers=cores):
        yield batch


def mosaic(shards: str, cores: int) -> Batches:
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    folder = tempfile.mkdtemp(dir=Path(shards).parent)
    with MDSWriter(out=folder, columns={"image": "bytes"}) as writer:
        for path in glob.glob(f"{shards}/*.parquet"):
            for data in encoded(path):
                writer.write({"image": data})

    class Crops(StreamingDataset):
        def __getitem__(self, index: int) -> np.ndarray:
            return pillow_crop(super().__getitem__(index)["image"])

    data = Crops(local=folder, shuffle=True, batch_size=BATCH)
    loader: Any = DataLoader(
        data, BATCH, num_workers=cores, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def ray_data(shards: str, cores: int) -> Batches:
    import ray

    ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def crops(batch: dict[str, Any]) -> dict[str, Any]:
        images = random.sample(list(batch["image"]), len(batch["image"]))
        return {"crop": np.stack([pillow_crop(image["bytes"]) for image in images])}

    while True:
        images = ray.data.read_parquet(shards, file_extensions=["parquet"], shuffle="files")
        crop = images.map_batches(crops, batch_size=BATCH)
        for batch in crop.iter_batches(batch_size=BATCH, drop_last=True):
            yield batch["crop"]


def fleet(shards: str, cores: int, cache: float = 0.0) -> Batches:
    import ray
    from fleet import feed_of, parts

    ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    feed, batches = feed_of(shards, f"{cores}:{cores}", epochs=100, network="alexnet", cache=cache)
    first = batches // 100 if cache else 0  # the epoch in which images are decoded
    for number, (_, part) in enumerate(parts(feed, 0, batches)):
        if number >= first:
            yield part.batch.crops


class LeftOut(Exception):
    """A stream that is not what its name says."""


def cached(shards: str, cores: int) -> Batches:
    with tempfile.TemporaryDirectory(dir=Path(shards).parent) as place:
        # Ray's own files stay where its sockets' names are short enough.
        os.environ |= {"RAY_TMPDIR": os.environ.get("RAY_TMPDIR", "/tmp"), "TMPDIR": place}
        for batch in fleet(shards, cores, cache=2.0):
            if place and disk_bytes(place) < 0.9 * rows(shards) * SIZE**2 * 3:
                raise LeftOut("the disk has no room to keep its images")
            place = ""  # it was looked at
            yield batch


def disk_bytes(folder: str) -> int:
    """Bytes on the disk of the files in a folder."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())


def rows(shards: str) -> int:
    return sum(pq.read_metadata(path).num_rows for path in glob.glob(f"{shards}/*.parquet"))


STREAMS: dict[str, Callable[[str, int], Batches]] = {
    "bare loop, Pillow": pillow_loop,
    "bare loop, the best we know": best_loop,
    "Towers' loader in a loop, without Ray": loader_loop,
    "torch DataLoader": data_loader,
    "WebDataset": web_dataset,
    "MosaicML Streaming": mosaic,
    "Ray Data": ray_data,
    "Towers": fleet,
    "Towers, once all images are decoded": cached,
}
LOOPS = list(STREAMS)[:3]  # in one process; the others use all cores


def rate(name: str, shards: str, cores: int, seconds: float) -> float | None:
    """Images a second, once it flows; None without its package."""
    random.seed(0)
    first = start = 0.0
    images = 0
    try:
        for batch in STREAMS[name](shards, cores):
            assert tuple(batch.shape[1:]) == (CROP, CROP, 3)
            int(batch[:, ::CROP, ::CROP].sum())  # somebody looks at it
            now = time.perf_counter()
            first = first or now
            if start:
                images += len(batch)
                if now - start > seconds:
                    break
            elif now - first > seconds / 2:  # what was made ahead is gone, all workers run
                start = now
    except (ImportError, LeftOut) as error:
        print(f"{name}: left out ({error})", file=sys.stderr)
        return None
    return images / (time.perf_counter() - start)


def measured(name: str, shards: str, seconds: float, processes: int = 1) -> float:
    """Images a second of so many processes at once, each of which delivers; 0 without the package,
    or if one failed.

    Processes of their own, so that none inherits what another left behind.
    """
    command = [sys.executable, __file__, "--one", name, shards, "--seconds", str(seconds)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        print(f"{name}: left out (it failed)", file=sys.stderr)
        return 0.0
    # Ray says more than that, at times after it.
    return sum(float(text.rpartition(RATE)[2].split()[0]) for text in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each turn of each")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(STREAMS), help="these alone")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, and FILE.md")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cores = cores_here()
    if args.one:
        name, shards = args.one
        print(f"{RATE}{rate(name, shards, cores, args.seconds) or 0}")
        return
    runs = [(name, processes) for name in args.only if name in LOOPS for processes in {1, cores}]
    runs += [(name, 1) for name in args.only if name not in LOOPS]
    best: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory(prefix="towers-") as folder:
        shards = prepare(folder)
        for _ in range(args.turns):
            for name, processes in runs:
                got = measured(name, shards, args.seconds, processes)
                best[name, processes] = max(got, best.get((name, processes), 0.0))
    table = []
    for (name, processes), found in best.items():
        used = processes if name in LOOPS else cores
        row = {"stream": name, "cores": used, "images/s": found, "a core": found / used}
        # Two cores are seldom twice one: what uses all of them is held against loops that do.
        for loop, column in zip(LOOPS[:2], ("x Pillow", "x the best loop"), strict=True):
            limit = best.get((loop, used))
            row[column] = found / limit if limit else None
        table.append(row)
    table = [row for row in table if row["images/s"]]
    publish("Crops of 224x224 pixels from JPEGs of 256x256, best of turns", table, args.json)


if __name__ == "__main__":
    main()
