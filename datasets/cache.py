"""What a machine keeps of a split: images once they are decoded, and row groups from far away.

A cache is in the system's folder for temporary files, and all processes that read a split share
it. Memory holds of it what the system finds room for. It outlives a run: the next one on the same
data starts with it, and the first on other data removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from datasets.images import Pixels
from datasets.layout import Dataset, Shard

BOOT = "/proc/sys/kernel/random/boot_id"
"""A crash may leave other things in a file than were written: each start has files of its own."""

FREE = 0.1
"""Of a disk, which is left to others."""

SLACK = 1 / 256
"""Of what row groups may take: as much as a process writes until it looks again what there is."""

PIXELS, GROUPS, PART, LOCK = ".pixels", ".groups", ".part", "lock"


class PixelCache:
    """The first images of a split as they are once decoded and fitted, with their labels.

    `size`: side in pixels; `least`: the least that an image may have had; `most`: bytes that the
    file may take. It holds nothing where it may not, or where the disk is full.
    """

    def __init__(
        self, dataset: Dataset, split: str, size: int, most: float, *, least: int = 0
    ) -> None:
        self._shape = size, size, 3
        self._each = size * size * 3
        rows = int(min(self.whole(dataset, split, size), most) / (self._each + 8))
        self._labels = np.zeros(0, np.int64)  # plus one; 0 for an image that is not there
        self._full = False
        with suppress(OSError):
            if rows:
                name = _identity(dataset, split, rows, f"{size} {least}")
                self._open(_folder() / f"{name}{PIXELS}", rows)

    @staticmethod
    def whole(dataset: Dataset, split: str, size: int) -> int:
        """Bytes that all of a split takes."""
        return dataset.rows(split) * (size * size * 3 + 8)

    def _open(self, path: Path, rows: int) -> None:
        length = rows * (self._each + 8)
        self._file = _locked(path, fcntl.LOCK_SH, buffering=0)
        self._at = self._file.fileno()
        if os.fstat(self._at).st_size != length:
            _sweep(path)
            os.ftruncate(self._at, length)  # takes no room yet
        # Of a hole in memory, as /tmp may be, even a read needs room, or ends the process.
        os.posix_fallocate(self._at, 0, 8 * rows)
        seen = mmap.mmap(self._at, length, prot=mmap.PROT_READ)
        self._labels = np.frombuffer(seen, np.int64, rows)
        self._pixels = np.frombuffer(seen, np.uint8, offset=8 * rows).reshape(rows, *self._shape)

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of `rows` (int64 [n], within the split), int64 [n]; -1 for images not kept."""
        found = np.full(len(rows), -1)
        inside = rows < len(self._labels)
        found[inside] = self._labels[rows[inside]] - 1
        return found

    def pixels(self, row: int) -> Pixels:
        """An image that is kept, uint8 [size, size, 3], read-only."""
        return self._pixels[row]

    def has_room(self, row: int) -> bool:
        """Whether an image would be kept."""
        return row < len(self._labels) and not self._full

    def keep(self, row: int, label: int, pixels: Pixels) -> None:
        """Keeps an image, if there is room for it."""
        if not self.has_room(row):
            return
        try:
            _check_free(self._at)
            # By calls, as a store to mapped memory that finds the disk full would end the process.
            # The label last: whoever sees it may have the pixels.
            self._write(np.ascontiguousarray(pixels).data, 8 * len(self._labels) + row * self._each)
            self._write((label + 1).to_bytes(8, sys.byteorder), 8 * row)
        except OSError:
            self._full = True

    def _write(self, data: bytes | memoryview, at: int) -> None:
        if os.pwrite(self._at, data, at) < memoryview(data).nbytes:
            raise OSError(errno.ENOSPC, "written in part")


class GroupCache:
    """Row groups of shards far away, each of which a machine fetches once.

    `columns`: those that are read; `most`: bytes that they may take, but for the last that other
    processes wrote. The oldest make room. It keeps nothing where it may not, or where the disk is
    full.
    """

    def __init__(self, dataset: Dataset, split: str, columns: Sequence[str], most: float) -> None:
        self._most, self._unseen = most, most  # of a former run there may be more
        self._marks: dict[str, str] = {}
        self._folder: Path | None = None
        self._full = False
        with suppress(OSError):
            if most:
                paths = (shard.path for shard in dataset.shards(split))
                name = _hash([Path(BOOT).read_text(), *columns, *paths])
                self._open(_folder() / f"{name}{GROUPS}")

    def _open(self, folder: Path) -> None:
        new = not folder.exists()
        folder.mkdir(mode=0o700, exist_ok=True)
        self._lock = _locked(folder / LOCK, fcntl.LOCK_SH)
        if new:
            _sweep(folder)
        self._folder = folder

    def table(self, shard: Shard, index: int, fetch: Callable[[], Any]) -> Any:
        """Row group `index` of `shard`, an Arrow table: as it is kept, or as `fetch` returns it,
        which one process does while others wait. Raises what `fetch` raises.
        """
        path = self._path(shard, index)
        if path is None:
            return fetch()
        found = _mapped(path)
        if found is None and (turn := self._turn(path)):
            with turn:
                found = _mapped(path)  # by whoever had the turn before
                if found is None:
                    found = self._keep(fetch(), turn, path)
                else:
                    os.unlink(f"{path}{PART}")
        return fetch() if found is None else found

    def _path(self, shard: Shard, index: int) -> Path | None:
        """Where a row group of the shard as it is now belongs."""
        if self._folder and shard.path not in self._marks:
            with suppress(Exception):  # whoever reads it says what is wrong with it
                self._marks[shard.path] = _hash([shard.state()])
        mark = self._marks.get(shard.path)
        return self._folder / f"{mark}.{index}" if self._folder and mark else None

    def _turn(self, path: Path) -> BinaryIO | None:
        """The file to write a row group to, once no other process does."""
        if self._full:
            return None
        try:
            return _locked(Path(f"{path}{PART}"), fcntl.LOCK_EX)
        except OSError:
            self._full = True
            return None

    def _keep(self, table: Any, file: BinaryIO, path: Path) -> Any:
        """The table as it is kept then, if it can be."""
        if table.nbytes > self._most:
            return table
        try:
            _check_free(file.fileno())
            file.truncate(0)  # somebody may have ended while writing
            with pa.ipc.new_file(file, table.schema) as out:
                out.write_table(table)
            file.flush()
            os.rename(f"{path}{PART}", path)
            self._make_room(table.nbytes)
        except OSError:
            self._full = True
        kept = _mapped(path)  # whose memory the processes share
        return table if kept is None else kept

    def _make_room(self, written: int) -> None:
        """Removes the oldest, if there are too many; looks only now and then, as it takes long."""
        self._unseen += written
        if self._unseen < SLACK * self._most or not self._folder:
            return
        self._unseen = 0
        kept = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                seen = path.stat()
                kept.append((seen.st_mtime_ns, seen.st_size, path))
        excess = sum(size for _, size, _ in kept) - self._most
        for _, size, path in sorted(kept):
            if excess > 0 and path.suffix != PART and path.name != LOCK:
                path.unlink(missing_ok=True)
                excess -= size


def _mapped(path: Path) -> Any:
    """The Arrow table in a file, without a copy; None if there is no such file, or no whole one."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


def _locked(path: Path, how: int, buffering: int = -1) -> BinaryIO:
    """The file of this name, made if there is none, with a lock for as long as it is open."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering)
        fcntl.flock(file, how)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # while it waited the file got another name, or was removed


def _identity(dataset: Dataset, split: str, rows: int, how: str) -> str:
    """A name that no other images, labels or decoders share.

    Raises OSError if a file cannot be seen or the system has no mark of its start.
    """
    parts = [how, split, str(rows), dataset.image, dataset.label, str(len(dataset.classes))]
    parts += [PIL.__version__, simplejpeg.__version__, Path(BOOT).read_text()]
    for shard in dataset.shards(split):
        if rows > 0:
            try:
                parts += [shard.state(), str(shard.groups)]
            except Exception as error:  # whoever reads it says what is wrong with it
                raise OSError from error
        rows -= shard.rows
    return _hash(parts)


def _hash(parts: list[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _check_free(file: int) -> None:
    """Raises OSError if its disk is almost full."""
    disk = os.fstatvfs(file)
    if disk.f_bavail < FREE * disk.f_blocks:
        raise OSError(errno.ENOSPC, "kept free")


def _folder() -> Path:
    """This user's folder of caches. Raises OSError if it is somebody else's."""
    folder = Path(tempfile.gettempdir(), f"towers-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user")
    return folder


def _sweep(own: Path) -> None:
    """Removes caches that no process uses."""
    for path in own.parent.iterdir():
        if path == own or path.suffix not in (PIXELS, GROUPS):
            continue
        with suppress(OSError), (path / LOCK if path.is_dir() else path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
