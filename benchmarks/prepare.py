"""How fast `towers prepare` is, for each core, against a bare loop of Pillow calls, and how its
memory grows with the source.

    python benchmarks/prepare.py ILSVRC2012_img_train.tar

SOURCE is a tar of tars of classes. The peer decodes each photograph, converts it to RGB, scales its
shorter side to 256 (bicubic), cuts the centre and encodes a JPEG of quality 95, in as many
processes as Towers has workers, on the same cores in the same run. A second peer also adds up the
mean image and the covariance of colours in NumPy, which `prepare` does too. Towers further reads
the tar, writes shards and keeps what it needs to go on after a kill.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from table import cores

SIZE, QUALITY = 256, 95


def photographs(source: str) -> list[bytes]:
    """All photographs of a tar of tars."""
    found = []
    with tarfile.open(source) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                files = (inner.extractfile(image) for image in inner)
                found += [file.read() for file in files if file]
    return found


def repeated(images: list[bytes], times: int, path: Path) -> None:
    """A tar of class folders with each image so many times."""
    with tarfile.open(path, "w") as tar:
        for n in range(times):
            for i, data in enumerate(images):
                member = tarfile.TarInfo(f"{i % 10}/{n}-{i}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def bare_loop(images: list[bytes], sums: bool) -> int:
    """The work itself, as a script of one's own would do it."""
    total, pixels, products = 0, np.zeros((SIZE, SIZE, 3)), np.zeros((3, 3))
    for data in images:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        short = min(image.size)
        width, height = (max(SIZE, round(side * SIZE / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        buffer = io.BytesIO()
        image = image.crop((left, top, left + SIZE, top + SIZE))
        image.save(buffer, "JPEG", quality=QUALITY)
        if sums:
            array = np.asarray(image, np.float64)
            pixels += array
            products += array.reshape(-1, 3).T @ array.reshape(-1, 3)
        total += buffer.tell()
    return total


def peer_rate(images: list[bytes], times: int, workers: int, sums: bool) -> float:
    """Images a second of so many bare loops side by side."""
    shares = [images[w::workers] * times for w in range(workers)]
    with multiprocessing.Pool(workers) as pool:
        pool.starmap(bare_loop, [(share[:2], sums) for share in shares])  # started and imported
        start = time.perf_counter()
        pool.starmap(bare_loop, [(share, sums) for share in shares], chunksize=1)
        return len(images) * times / (time.perf_counter() - start)


def own_rate(source: Path, folder: str, workers: int) -> float:
    """Images a second of `prepare`, from its first task to its last shard; Ray runs already."""
    from workers.prepare import prepare
    from workers.progress import Progress

    class Clock(Progress):
        def done(self, what: str, count: int, total: int, start: float) -> None:
            self.rate = count / (time.monotonic() - start)

    clock = Clock(io.StringIO())
    cap = None if workers == cores() else workers
    prepare(str(source), folder, workers=cap, progress=clock)
    return clock.rate


def peak_memory(source: Path, folder: str) -> tuple[int, int]:
    """Bytes at the peak of the process that leads `towers prepare`, and of its largest worker."""
    program = Path(sys.executable).parent / "towers"
    run = subprocess.Popen(
        [str(program), "prepare", str(source), folder, "--workers", "2"],
        env={**os.environ, "RAY_ADDRESS": "local"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peaks = {"driver": 0, "worker": 0}
    while run.poll() is None:
        for folder_of in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder_of / "cmdline").read_bytes()
                status = (folder_of / "status").read_text()
            except OSError:
                continue
            kind = "worker" if title.startswith(b"ray::MapBatches") else None
            kind = "driver" if int(folder_of.name) == run.pid else kind
            if kind and "VmHWM" in status:
                peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
                peaks[kind] = max(peaks[kind], peak)
        time.sleep(0.1)
    assert run.returncode == 0, "prepare failed"
    return peaks["driver"], peaks["worker"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--times", type=int, default=20, help="How often each photograph counts.")
    parser.add_argument("--repeat", type=int, default=2, help="Measurements of each.")
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        help="Of both; with fewer than cores, Ray's "
        "own processes have one for themselves, as on a larger machine they nearly do.",
    )
    parser.add_argument("--no-memory", action="store_true", help="Leave the memory out.")
    args = parser.parse_args()
    images, workers = photographs(args.source), args.workers
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "once.tar"
        repeated(images, args.times, tar)
        ours: list[float] = []
        peers: dict[bool, list[float]] = {sums: [] for sums in (False, True)}
        import ray

        for n in range(args.repeat):
            # The peer's processes begin before Ray's do, so that neither disturbs the other.
            for sums, rates in peers.items():
                rates.append(peer_rate(images, args.times, workers, sums))
            ray.init(address="local", include_dashboard=False, log_to_driver=False)
            ours.append(own_rate(tar, f"{folder}/shards{n}", workers))
            ray.shutdown()
        own = statistics.median(ours)
        print(f"{len(images) * args.times} photographs, {workers} workers, images a second a core:")
        print(f"  towers prepare             {own / workers:7.1f}")
        for sums, rates in peers.items():
            peer = statistics.median(rates)
            name = "with statistics" if sums else "images alone"
            print(f"  bare loop, {name:15} {peer / workers:7.1f}   ratio {own / peer:.2f}")
        if args.no_memory:
            return
        large = Path(folder) / "ten.tar"
        tar.rename(large)
        repeated(images, max(1, args.times // 10), tar)
        small_peaks = peak_memory(tar, f"{folder}/small")
        large_peaks = peak_memory(large, f"{folder}/large")
        print("peak memory, MiB, of a tenth of that source and of all of it:")
        for name, a, b in zip(("driver", "worker"), small_peaks, large_peaks, strict=True):
            print(f"  {name}  {a >> 20:5d} {b >> 20:5d}   grows by {b / a - 1:+.1%}")


if __name__ == "__main__":
    main()
