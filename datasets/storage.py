"""Files at paths and URLs: found, opened, written whole, asked for again while a store fails."""

from __future__ import annotations

import errno
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import PurePath
from typing import Any, TypeVar

import fsspec
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from datasets import DataError

T = TypeVar("T")


class StoreFailed(DataError):
    """A store far away did not answer, or with failures; later it may."""


def storage(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path there.

    Raises DataError for a kind of URL that fsspec doesn't know or lacks the package for.
    """
    if "://" not in url:  # fsspec would take "::" in a name for its own
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(url)).rstrip("/")
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error
    return fs, str(path).rstrip("/")


def existing(url: str) -> tuple[Any, str]:
    """`storage` of a URL at which there is something.

    Raises DataError, saying why, if there is nothing or if it may not be seen.
    """
    fs, path = storage(url)
    try:
        fs.info(path)  # some stores' `exists` takes every failure for a no
    except (FileNotFoundError, NotADirectoryError) as error:
        _, _, why = said(error).partition(f"{path} ")  # the hub's says more than the path
        if (cause := error.__cause__) and not why:
            if passing(cause):
                raise cause from None
            if refused(cause):
                raise _unreadable(url, cause) from error
        raise DataError(f"{url}: no such file or folder{why and ' '}{why}") from error
    except ValueError as error:
        raise DataError(f"{url}: {said(error)}") from error
    except Exception as error:
        if refused(error):
            raise _unreadable(url, error) from error
        _check_name(url, error)
        raise
    return fs, path


def _check_name(url: str, error: BaseException) -> None:
    """Raises DataError if `error` is for a name that no file can have."""
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        raise DataError(f"{url}: a link that leads to itself") from error
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        raise DataError(f"{url}: a name that is too long") from error


def inside(fs: Any, path: str) -> list[dict[str, Any]]:
    """What lies in a folder, as fsspec describes it, by name; links as what they lead to."""
    found = sorted(fs.ls(path, detail=True), key=lambda entry: str(entry["name"]))
    for place, entry in enumerate(found):
        if entry.get("islink"):
            with suppress(OSError):
                found[place] = fs.info(entry["name"])
    return found


def files_below(fs: Any, root: str, levels: int | None = None) -> dict[str, int | None]:
    """The files below a folder, by name, with their sizes, None where a store knows none; of so
    many `levels` of folders, its own the first, all if None. Links on a disk lead on, but not
    round, and not nowhere.

    Raises DataError for what may not be read there.
    """
    if isinstance(fs, LocalFileSystem):
        parents = PurePath(os.path.realpath(root)).parents
        return dict(sorted(_walk(root, tuple(map(str, parents)), levels)))
    found = fs.find(root, maxdepth=levels, detail=True)
    return {name: found[name]["size"] for name in sorted(found)}


def _walk(folder: str, above: tuple[str, ...], levels: int | None) -> Iterator[tuple[str, int]]:
    real = os.path.realpath(folder)
    if real in above or levels == 0:
        return
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except PermissionError as error:
        raise _unreadable(folder, error) from error
    for entry in entries:
        try:
            size = -1 if entry.is_dir() else entry.stat().st_size
        except PermissionError as error:
            raise _unreadable(entry.path, error) from error
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            continue
        if size < 0:
            yield from _walk(entry.path, (*above, real), levels and levels - 1)
        else:
            yield entry.path, size


def hidden(name: str) -> bool:
    """Whether a file or folder, named from where it is looked for, is of a system's or an editor's,
    such as macOS's.
    """
    parts = name.split("/")
    return "__MACOSX" in parts or any(p.startswith(".") and p not in (".", "..") for p in parts)


def matching(fs: Any, folder: str, pattern: str) -> list[str]:
    """The paths in a folder, whose own name may be any, with a last part such as `pattern`, in
    order; none if it is not there.
    """
    try:
        found = [str(name).rstrip("/") for name in fs.ls(folder, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in found if fnmatchcase(name.rpartition("/")[2], pattern))


def remove(fs: Any, folder: str) -> None:
    """Removes a folder and all in it. Raises FileNotFoundError if it is not there."""
    if isinstance(fs, LocalFileSystem) or not has_magic(folder):
        fs.rm(folder, recursive=True)
        return
    # fsspec would take the name for a pattern.
    for file in fs.find(folder):
        fs.rm_file(file)
    with suppress(OSError, NotImplementedError):
        fs.rmdir(folder)  # which a store without folders has not


def address(fs: Any, path: str) -> str:
    """What `fsspec.open` takes for a path of `fs`."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


_OBJECT_STORES = {"s3", "gs", "abfs", "memory"}
"""Stores, by fsspec's names, that show an upload once it is complete, and rename by copying."""


@contextmanager
def whole(fs: Any, path: str, folder: str) -> Iterator[Any]:
    """A file of `fs` to write to, which is at `path` once the block has ended well, else nowhere.

    It grows in `folder`, unless the store keeps what is incomplete to itself.
    """
    if _is_object_store(fs):
        file = fs.open(path, "wb", autocommit=False)
        try:
            yield file
            file.close()
            file.commit()
        except BaseException:
            with suppress(Exception):  # what broke off says more than what follows from it
                file.close()
            with suppress(Exception):
                file.discard()
            raise
        return
    partial = f"{folder}/{uuid.uuid4().hex}.partial"
    try:
        with writable(fs, partial) as file:
            yield file
        fs.mv(partial, path)
    except BaseException:
        if fs.exists(partial):
            fs.rm_file(partial)
        raise


def writable(fs: Any, path: str) -> Any:
    """A new file of `fs` to write to. Raises OSError where it cannot be, as on a web server."""
    try:
        return fs.open(path, "wb")
    except NotImplementedError:
        raise OSError(errno.EROFS, f"{type(fs).__name__} only reads") from None


def write_whole(fs: Any, path: str, data: bytes) -> None:
    """Writes a file of `fs`, complete or not at all."""
    if _is_object_store(fs):
        fs.pipe_file(path, data)
        return
    with whole(fs, path, path.rpartition("/")[0]) as file:
        file.write(data)


def _is_object_store(fs: Any) -> bool:
    names = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return not _OBJECT_STORES.isdisjoint(names)


def said(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    return " ".join(str(error).split())[:150] or type(error).__name__


ATTEMPTS = 5
"""How often a store is asked before it is given up."""

PAUSE = 0.5
"""Seconds before it is asked again; doubled each time."""


def persistent(what: str, call: Callable[[], T]) -> T:
    """What `call` returns, tried again while a store far away fails or does not answer.

    Raises StoreFailed, naming `what`, once that was in vain; lets through at once what another
    attempt cannot mend: a missing file, lacking rights, a full disk.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if not passing(error):
                raise
            last = error
            if isinstance(error, OSError) and error.errno in _TRIED:
                break
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * 2**attempt)
    reason = said(last)
    raise StoreFailed(f"{what}: the store failed, again and again ({reason}); try later") from last


_TRIED = (errno.EBUSY, errno.EIO)
"""What s3fs raises after it has itself asked a failing store again and again."""


def passing(error: BaseException) -> bool:
    """Whether it may not happen again: what networks raise, not what a local file does."""
    if status := _status(error):
        return status >= 500 or status in (408, 429)
    if refused(error):
        return False
    if type(error).__module__.split(".")[0] in _NETWORKS:
        return True
    if isinstance(error, OSError) and error.errno in _TRIED:
        return True
    return isinstance(error, (TimeoutError, ConnectionError))


_NETWORKS = ("aiohttp", "botocore", "urllib3", "requests", "httpx", "httpx2")


def refused(error: BaseException) -> bool:
    """Whether a store, or a disk, wants other rights than one has."""
    rights = isinstance(error, PermissionError) or "Credential" in type(error).__name__
    return rights or _status(error) in (401, 403)


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error tells of, if it does."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    code = getattr(error, "code", None)  # gcsfs
    return status or getattr(error, "status", None) or (code if isinstance(code, int) else None)


def _unreadable(what: str, error: BaseException) -> DataError:
    return DataError(f"{what}: may not be read ({said(error)}); check its permissions")


@contextmanager
def opened(url: str, mode: str = "rb", **options: Any) -> Iterator[Any]:
    """The file at a path or URL, as text in UTF-8 for mode "r".

    Raises DataError, naming it, if it is missing or may not be read.
    """
    try:
        fs, path = storage(url)
        binary = fs.open(path, "rb", **options)
        with io.TextIOWrapper(binary, "utf-8-sig", newline="") if mode == "r" else binary as file:
            yield file
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{url}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{url}: a folder; name a file") from None
    except Exception as error:
        _check_name(url, error)
        if refused(error):
            raise _unreadable(url, error) from None
        raise


@contextmanager
def parquet(path: str, footer: Any = None) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile` at a path or URL, with its `footer` if that was read.

    Raises DataError as `parquet_errors` has it.
    """
    with parquet_errors(path):
        fs, inner = storage(path)
        # fsspec would read megabytes ahead, which a reader of single row groups throws away.
        with fs.open(inner, "rb", cache_type="none") as file:
            yield pq.ParquetFile(file, metadata=footer, pre_buffer=True)


def open_parquet(path: str) -> Any:
    """The `pyarrow.parquet.ParquetFile` at a local path, to be kept open: read where it stands, not
    fetched in one piece first. Raises what `parquet_errors` is for.
    """
    fs, inner = storage(path)
    return pq.ParquetFile(fs.open(inner, "rb"), pre_buffer=False)


@contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Raises DataError, naming the file, for whatever goes wrong in reading it but a store that
    fails, which is for `persistent`.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; copy it there or prepare the data again") from None
    except Exception as error:  # a damaged file raises whatever Arrow stumbled on
        if refused(error):
            raise _unreadable(path, error) from error
        if passing(error):
            raise
        reason = said(error).rstrip(".")
        raise DataError(
            f"{path}: not readable as Parquet ({reason}); copy or prepare it again"
        ) from error
