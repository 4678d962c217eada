"""Tar and zip archives: where each member's bytes lie, without reading the members themselves."""

from __future__ import annotations

import posixpath
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from datasets import DataError
from datasets.storage import passing, refused, said

HEADERS: dict[str, Any] = {"cache_type": "readahead", "block_size": 1 << 16}
"""How far an archive is read ahead: about to the next header, not through the images."""

MAX_HEADER = 1 << 20
"""Bytes that an archive's header may ask for at once; a damaged one may name any number."""

_LOCAL_HEADER = 30


class Member(NamedTuple):
    """A file in an archive: `length` bytes from `offset` on, both counted in the archive's file.

    `packed` is the deflated size, -1 if the bytes lie there as they are; `check` their CRC-32, -1
    if the archive has none.
    """

    name: str
    offset: int
    length: int
    packed: int = -1
    check: int = -1


def tar_members(
    file: Any, place: str, start: int = 0, length: int | None = None
) -> Iterator[Member]:
    """The regular files of the tar that lies at `start` in `file`, `length` bytes long, and links
    to such as what they lead to.

    Reads headers and skips contents. Raises DataError, naming `place` and the byte, for a damaged
    or truncated archive, which Python's own reader would take for its end.
    """
    linked: dict[str, Member] | None = None
    for member, target in _entries(file, place, start, length):
        if not target:
            yield member
            continue
        if linked is None:
            linked = _linked(file, place, start, length)
        if found := linked.get(posixpath.normpath(member.name)):
            yield found._replace(name=member.name)


def _linked(file: Any, place: str, start: int, length: int | None) -> dict[str, Member]:
    """The files that a tar's links lead to, by the links' names. It is read twice for that, as the
    names of all members would fill the memory.
    """
    links = {posixpath.normpath(m.name): to for m, to in _entries(file, place, start, length) if to}
    ends = {}
    for name in links:
        end, left = name, len(links)
        while end in links and left:
            end, left = links[end], left - 1
        ends[name] = end
    wanted, files = set(ends.values()), {}
    for member, target in _entries(file, place, start, length):
        if not target and posixpath.normpath(member.name) in wanted:
            files[posixpath.normpath(member.name)] = member
    return {name: files[end] for name, end in ends.items() if end in files}


def _entries(file: Any, place: str, start: int, length: int | None) -> Iterator[tuple[Member, str]]:
    """The regular files and the links of a tar, with what a link leads to, "" for a file."""
    end = file.seek(0, 2) if length is None else start + length
    file.seek(start)
    try:
        headers: Any = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            kept: Any = tar
            last = -1
            while (member := tar.next()) is not None:
                kept.members.clear()  # Python would hold them all
                if member.offset_data <= last or member.size < 0:
                    raise DataError(f"{place}: damaged at byte {member.offset}; copy it again")
                last = member.offset_data
                if member.offset_data + (member.size if member.isreg() else 0) > end:
                    raise DataError(f"{place}: ends inside {member.name}; copy it again")
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size), ""
                elif member.islnk() or member.issym():
                    # A hard link is to a name in the archive, a symbolic one goes from its folder.
                    folder = posixpath.dirname(member.name) if member.issym() else ""
                    linked = posixpath.normpath(posixpath.join(folder, member.linkname))
                    yield Member(member.name, 0, 0), linked
            at = tar.offset
    except (tarfile.TarError, EOFError, OverflowError, UnicodeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: not readable as tar ({said(error)}); copy it again") from error
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE) if at < end else b""
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{place}: has no end of archive and so is truncated; copy it again")
    if block.strip(b"\0"):
        raise DataError(f"{place}: damaged at byte {at}; copy it again")


def zip_members(file: Any, place: str) -> Iterator[Member]:
    """The files of a zip. Raises DataError, naming `place`, for a damaged, encrypted or split
    archive and for compression other than deflate.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if info.flag_bits & 1:
                    raise DataError(f"{place}: {info.filename} is encrypted; unpack it first")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DataError(
                        f"{place}: {info.filename} is compressed otherwise than by deflate; "
                        "pack it again with zip"
                    )
                packed = info.compress_size if info.compress_type else -1
                start = info.header_offset + _LOCAL_HEADER
                # The local header's own lengths, which may differ from the directory's.
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
                    raise DataError(f"{place}: {info.filename} is not where the zip says")
                start += sum(struct.unpack("<HH", header[26:30]))
                yield Member(info.filename, start, info.file_size, packed, info.CRC)
    except DataError:
        raise
    except Exception as error:  # zipfile raises whatever a damaged directory makes it stumble on
        if passing(error) or refused(error):
            raise
        raise DataError(f"{place}: not readable as zip ({said(error)}); copy it again") from error


class _Headers:
    """A file of which only headers are read, so that no damaged one fills the memory."""

    def __init__(self, file: Any) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)
