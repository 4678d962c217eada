"""Decoded images kept on this machine, so that an image that is seen often is decoded once.

A cache is a file in the system's folder for temporary ones, which all processes that read a split
share. Memory holds of it what the system finds room for. It outlives a run: the next one on the
same data starts with it, and the first on other data removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray

from datasets.images import Pixels
from datasets.layout import Dataset, storage

BOOT = "/proc/sys/kernel/random/boot_id"
"""A crash may leave other things in a file than were written: each start has files of its own."""

FREE = 0.1
"""Of a disk, which is left to others."""

ENDING = ".pixels"


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
        rows = int(min(dataset.rows(split), most / (self._each + 8)))
        self._labels = np.zeros(0, np.int64)  # plus one; 0 for an image that is not there
        self._full = False
        with suppress(OSError):
            if rows:
                name = _identity(dataset, split, rows, f"{size} {least}")
                self._open(_folder() / (name + ENDING), rows)

    def _open(self, path: Path, rows: int) -> None:
        length = rows * (self._each + 8)
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        self._at = self._file.fileno()
        fcntl.flock(self._at, fcntl.LOCK_SH)  # for as long as the file is open
        if os.fstat(self._at).st_size != length:
            _sweep(path)
            os.ftruncate(self._at, length)  # takes no room yet
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

    def keep(self, row: int, label: int, pixels: Pixels) -> None:
        """Keeps an image, if there is room for it."""
        if self._full or row >= len(self._labels):
            return
        try:
            disk = os.fstatvfs(self._at)
            if disk.f_bavail < FREE * disk.f_blocks:
                raise OSError(errno.ENOSPC, "kept free")
            # By calls, as a store to mapped memory that finds the disk full would end the process.
            # The label last: whoever sees it may have the pixels.
            self._write(np.ascontiguousarray(pixels).data, 8 * len(self._labels) + row * self._each)
            self._write((label + 1).to_bytes(8, sys.byteorder), 8 * row)
        except OSError:
            self._full = True

    def _write(self, data: bytes | memoryview, at: int) -> None:
        if os.pwrite(self._at, data, at) < memoryview(data).nbytes:
            raise OSError(errno.ENOSPC, "written in part")


def _identity(dataset: Dataset, split: str, rows: int, how: str) -> str:
    """A name that no other images, labels or decoders share.

    Raises OSError if a file cannot be seen or the system has no mark of its start.
    """
    parts = [how, split, str(rows), dataset.image, dataset.label, str(len(dataset.classes))]
    parts += [PIL.__version__, simplejpeg.__version__, Path(BOOT).read_text()]
    for shard in dataset.shards(split):
        if rows > 0:
            try:
                fs, path = storage(shard.path)
                parts += [shard.path, str(shard.groups), repr(sorted(fs.info(path).items()))]
            except Exception as error:  # whoever reads it says what is wrong with it
                raise OSError from error
        rows -= shard.rows
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


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
    for path in own.parent.glob(f"*{ENDING}"):
        if path == own:
            continue
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
