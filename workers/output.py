"""Files that a command leaves where its user said."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem

from datasets.storage import passing, refused, said, storage, whole, write_whole
from workers.config import UserError


def same(one: str, other: str) -> bool:
    """Whether two paths or URLs lead to one place."""
    return _place(one) == _place(other)


def inside(url: str, folder: str) -> bool:
    """Whether a path or URL leads to a place below that of another."""
    (kind, path), (other, base) = _place(url), _place(folder)
    return kind is other and path.startswith(base.rstrip("/") + "/")


def _place(url: str) -> tuple[type, str]:
    """The kind of store that a path or URL is of, and where in it that leads."""
    fs, path = storage(url)
    return type(fs), os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path


def check_output(url: str, ending: str = "", reads: Iterable[str] = ()) -> None:
    """Raises UserError if no file can be written to a path or URL, its name has another ending, or
    it is among what the command `reads`: before the work, not after.
    """
    if not url.lower().endswith(ending):
        raise UserError(f"{url}: a name that ends in {ending} is wanted")
    if any(same(url, file) for file in reads):
        raise UserError(f"{url} is read by this command; name another file to write")
    fs, path = _target(url)
    with writing(url):
        if fs.isdir(path):
            raise UserError(f"{url} is a folder; name a file in it")
        if _is_special(fs, path):
            return
        probe = f"{path}.{uuid.uuid4().hex}.partial"
        write_whole(fs, probe, b"")
        fs.rm_file(probe)


def check_folder(path: str) -> None:
    """Raises UserError if no folder can be made at a local path: before the work, not after."""
    place = path
    with writing(path):
        while True:
            try:
                os.lstat(place)
                break
            except (FileNotFoundError, NotADirectoryError):
                place = os.path.dirname(place)
        if not os.path.isdir(place):
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"no right to write to {place}")


@contextmanager
def written(url: str) -> Iterator[IO[bytes]]:
    """A file to write at a path or URL, which is there when the block has ended, complete, and not
    at all if it fails; a device or a pipe is written to as it is. Raises UserError if it cannot be.
    """
    fs, path = _target(url)
    special = _is_special(fs, path)
    with (
        writing(url),
        open(path, "wb") if special else whole(fs, path, path.rpartition("/")[0]) as file,
    ):
        yield file


def write_output(url: str, data: bytes) -> None:
    """Writes a file, complete or not at all. Raises UserError if it cannot be."""
    check_output(url)
    with written(url) as file:
        file.write(data)


def _target(url: str) -> tuple[Any, str]:
    """Where to write: what is there may be a link."""
    fs, path = storage(url)
    if isinstance(fs, LocalFileSystem) and os.path.isfile(path):
        path = os.path.realpath(path)
    return fs, path


def _is_special(fs: Any, path: str) -> bool:
    return (
        isinstance(fs, LocalFileSystem)
        and os.path.exists(path)
        and not (os.path.isfile(path) or os.path.isdir(path))
    )


def claimed(path: str) -> IO[bytes]:
    """A local file, open, which is this process's as long as it is so: to others who claim it
    BlockingIOError is raised, where the file system has locks.
    """
    file = open(path, "ab")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass  # a file system without locks
    return file


@contextmanager
def alone(folder: str) -> Iterator[None]:
    """Within it no other process works in a folder, which is made if it is not there, and goes if
    it stays empty; stores have no locks. Raises UserError if one does.
    """
    if "://" in folder:
        yield
        return
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process works there") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty
                os.rmdir(folder)
    finally:
        os.close(place)


@contextmanager
def attempted(say: Callable[[str], object]) -> Iterator[None]:
    """Within it what a disk or a store does not take is said, and given up."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or passing(error) or refused(error)):
            raise
        say(said(error))


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Within it what cannot be written to a path or URL raises UserError, which names that."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{url} cannot be written: {error.strerror or error}") from None
