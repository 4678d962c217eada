"""Files that a command leaves where its user said."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from datasets.storage import storage, whole, write_whole
from workers.config import UserError


def check_output(url: str) -> None:
    """Raises UserError if no file can be written to a path or URL: before the work, not after."""
    fs, path = storage(url)
    with writing(url):
        if fs.isdir(path):
            raise UserError(f"{url} is a folder; name a file in it")
        probe = f"{path}.{uuid.uuid4().hex}.partial"
        write_whole(fs, probe, b"")
        fs.rm_file(probe)


@contextmanager
def written(url: str) -> Iterator[IO[bytes]]:
    """A file to write at a path or URL, which is there when the block has ended, complete, and not
    at all if it fails. Raises UserError if it cannot be written.
    """
    fs, path = storage(url)
    with writing(url), whole(fs, path, path.rpartition("/")[0]) as file:
        yield file


def write_output(url: str, data: bytes) -> None:
    """Writes a file, complete or not at all. Raises UserError if it cannot be."""
    check_output(url)
    with written(url) as file:
        file.write(data)


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Within it what cannot be written to a path or URL raises UserError, which names that."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{url} cannot be written: {error.strerror or error}") from None
