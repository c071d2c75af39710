"""Tar streams of a session's files: PAX, names as bytes, nothing held in memory."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, Final, cast

from madang.agent.launcher import tree
from madang.agent.launcher.tree import Entry, Writer
from madang.wire.errors import FileFailed, PathInvalid

CHUNK: Final = 256 * 1024
_TYPES: Final = {"file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}


def pack(entry: Entry, fd: int, send: Callable[[bytes], None]) -> int:
    """Send what lies at *fd* as a tar stream, in pieces of at most CHUNK. Bytes sent.

    Names are relative to the folder; of a file there is its name alone. Sockets, fifos, devices and
    what can't be read are left out.
    """
    out = _Output(send)
    with tarfile.open(
        mode="w|",
        fileobj=cast("IO[bytes]", out),
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
        bufsize=CHUNK,
    ) as tar:
        for found, opened in _contents(entry, fd):
            if found.kind == "file" and opened is None:
                continue
            content = None if opened is None else cast("IO[bytes]", _Steady(opened))
            tar.addfile(_header(found), content)
            tar.members = []  # type: ignore[attr-defined]  # Or it keeps them all.
    return out.sent


def unpack(writer: Writer, chunks: Iterator[bytes]) -> None:
    """Put a tar stream's members by *writer*; devices, fifos and setuid bits are left out."""
    try:
        with tarfile.open(
            mode="r|",
            fileobj=cast("IO[bytes]", _Input(chunks)),
            encoding="utf-8",
            errors="surrogateescape",
            bufsize=CHUNK,
        ) as tar:
            for member in tar:
                _put(writer, tar, member)
                tar.members = []  # type: ignore[attr-defined]
    except tarfile.TarError as exc:
        raise FileFailed(f"the tar stream is damaged: {exc}.") from exc
    for _ in chunks:
        pass  # Padding after the end of the archive.


class _Output:
    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self.sent = 0

    def write(self, data: bytes) -> int:
        for at in range(0, len(data), CHUNK):
            self._send(data[at : at + CHUNK])
        self.sent += len(data)
        return len(data)


class _Input:
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts, wanted = [], size
        while wanted and (self._rest or self._more()):
            part, self._rest = self._rest[:wanted], self._rest[wanted:]
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    def _more(self) -> bool:
        self._rest = next(self._chunks, b"")
        return bool(self._rest)


class _Steady:
    """Reads as many bytes as asked of a file that may shrink meanwhile: zeros for the rest."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd, size).ljust(size, b"\0")


def _contents(entry: Entry, fd: int) -> Iterator[tuple[Entry, int | None]]:
    """What goes into the archive, regular files opened."""
    if entry.kind != "dir":
        yield entry, fd if entry.kind == "file" else None
        return
    for found in tree.walk(fd):
        if found.kind != "other":
            with _opened(fd, found) as opened:
                yield found, opened


@contextlib.contextmanager
def _opened(folder: int, entry: Entry) -> Iterator[int | None]:
    """A regular file's descriptor; None for all else and for what can't be read."""
    try:
        fd = tree.open_entry(folder, entry.path) if entry.kind == "file" else None
    except OSError:
        fd = None
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _header(entry: Entry) -> tarfile.TarInfo:
    info = tarfile.TarInfo(_text(entry.path))
    info.type = _TYPES[entry.kind]
    info.mode = entry.info.st_mode & 0o777
    info.mtime = entry.info.st_mtime_ns / 1e9
    info.size = entry.info.st_size if entry.kind == "file" else 0
    info.linkname = _text(entry.target or b"")
    return info


def _put(writer: Writer, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    path = _path(member.name)
    modified_ns = int(member.mtime * 1_000_000_000)
    if not path:
        return
    if member.isdir():
        writer.folder(path, member.mode, modified_ns)
    elif member.issym():
        writer.link(path, _bytes(member.linkname))
    elif member.islnk():
        writer.hard_link(path, _path(member.linkname))
    elif member.isreg():
        content = tar.extractfile(member)
        assert content is not None, "regular members have content"
        writer.file(path, iter(lambda: content.read(CHUNK), b""), member.mode, modified_ns)


def _path(name: str) -> bytes:
    """A member's path, checked: relative, no ``..``."""
    path = _bytes(name)
    parts = [part for part in path.split(b"/") if part not in {b"", b"."}]
    if path.startswith(b"/") or b".." in parts or b"\0" in path:
        raise PathInvalid(f"the archive names {name!r}, which leads out of its folder.")
    return b"/".join(parts)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
