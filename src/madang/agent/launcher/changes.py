"""What a session changed in its root, as a stream: a layer in the form that OCI gives layers.

A tar stream (GNU headers) of the upper folder of the session's overlay: parents before children,
names in order, each file once and further names of it as hard links. What it removed is an empty
file ``.wh.NAME``; a folder that hides the one below it has ``.wh..wh..opq``. Sockets, fifos and
devices are left out, and extended attributes, but for the true mode and owner that an image's file
has in its record (see ``wire.rootlayer``).

The folder is the session's: it may be changed while we look, so nothing is followed, and what
vanishes meanwhile is not there. Whoever calls this sees nothing else (``helpers.confine``).
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from madang.agent.launcher import files, tree
from madang.agent.launcher.rootfs import FOLDERS, IMAGES_ETC, SESSION_ETC
from madang.wire.errors import FileFailed, PlatformError
from madang.wire.rootlayer import OPAQUE, OVERLAY_OPAQUE, RECORD, WHITEOUT, meta_of

CHUNK: Final = 256 * 1024
_OURS: Final = frozenset(
    os.fsencode(path.strip("/"))
    for path in (
        *(f"etc/{name}" for name in SESSION_ETC),
        *(name for name in FOLDERS if "/" not in name and name not in {"etc", "var", "home"}),
        *("home/user", "var/tmp", IMAGES_ETC),
    )
)
"""Of the skeleton: a session can change no more than their modes."""
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class _Sent:
    files: int = 0
    bytes: int = 0


def serve(sock: socket.socket, upper: str) -> None:
    """Answer the request ``changes`` of the protocol of ``files``: DATA, and DONE at the end."""
    with contextlib.suppress(files.Gone), sock:
        sock.setblocking(True)
        channel = files.Channel(sock)
        channel.receive()
        try:
            result = send(upper, partial(channel.send, files.Frame.DATA))
            channel.send_json(files.Frame.DONE, result)
        except (OSError, PlatformError) as exc:  # Gone is neither.
            channel.send_json(files.Frame.ERROR, files.problem(exc))
        channel.drain()


def send(upper: str, write: Callable[[bytes], None]) -> dict[str, int]:
    """All of it, in pieces of at most CHUNK; how many entries and bytes of files."""
    folder = os.open(upper, _FOLDER)
    sent = _Sent()
    try:
        _Sender(folder, write, sent).all()
    finally:
        os.close(folder)
    write(b"\0" * (2 * tarfile.BLOCKSIZE))
    return {"files": sent.files, "bytes": sent.bytes}


class _Sender:
    def __init__(self, folder: int, write: Callable[[bytes], None], sent: _Sent) -> None:
        self._top = folder
        self._write = write
        self._sent = sent
        self._names: dict[tuple[int, int], bytes] = {}
        """Of files with several: the first."""

    def all(self) -> None:
        self._folder(self._top, b"")

    def _folder(self, folder: int, path: bytes) -> None:
        if path.count(b"/") >= tree.MAX_DEPTH:
            raise FileFailed(f"folders are nested deeper than {tree.MAX_DEPTH} levels.")
        if path and _attribute(folder, OVERLAY_OPAQUE) == b"y":
            self._header(_join(path, OPAQUE), os.fstat(folder), tarfile.REGTYPE)
        for name in tree.names(folder):
            full = _join(path, name)
            if full in _OURS or name.startswith(WHITEOUT):
                continue
            with contextlib.suppress(FileNotFoundError):  # It was removed meanwhile.
                self._entry(folder, name, full)

    def _entry(self, folder: int, name: bytes, path: bytes) -> None:
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            below = os.open(name, _FOLDER, dir_fd=folder)
            try:
                self._header(path, info, tarfile.DIRTYPE, record=_attribute(below, RECORD))
                self._folder(below, path)
            finally:
                os.close(below)
        elif stat.S_ISLNK(info.st_mode):
            self._header(path, info, tarfile.SYMTYPE, target=os.readlink(name, dir_fd=folder))
        elif stat.S_ISREG(info.st_mode):
            self._file(folder, name, path)
        elif stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
            self._header(_join(os.path.dirname(path), WHITEOUT + name), info, tarfile.REGTYPE)

    def _file(self, folder: int, name: bytes, path: bytes) -> None:
        fd = os.open(name, _READ, dir_fd=folder)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                return
            key = (info.st_dev, info.st_ino)
            if info.st_nlink > 1 and (first := self._names.setdefault(key, path)) != path:
                self._header(path, info, tarfile.LNKTYPE, target=first)
                return
            size = info.st_size
            self._header(path, info, tarfile.REGTYPE, record=_attribute(fd, RECORD), size=size)
            for piece in _content(fd, size):
                self._write(piece)
            self._write(b"\0" * (-size % tarfile.BLOCKSIZE))
            self._sent.bytes += size
        finally:
            os.close(fd)

    def _header(
        self,
        path: bytes,
        found: os.stat_result,
        kind: bytes,
        *,
        record: bytes = b"",
        target: bytes = b"",
        size: int = 0,
    ) -> None:
        info = tarfile.TarInfo(os.fsdecode(path))
        info.type, info.size, info.linkname = kind, size, os.fsdecode(target)
        info.mtime = max(0, int(found.st_mtime))
        meta = meta_of(stat.S_IMODE(found.st_mode), record, folder=stat.S_ISDIR(found.st_mode))
        info.mode, info.uid, info.gid = meta.mode, meta.uid, meta.gid
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        self._sent.files += 1


def _content(fd: int, size: int) -> Iterator[bytes]:
    """*size* bytes, though the file may shrink or grow meanwhile."""
    while size:
        piece = os.read(fd, min(size, CHUNK)) or b"\0" * min(size, CHUNK)
        size -= len(piece)
        yield piece


def _attribute(fd: int, name: str) -> bytes:
    try:
        return os.getxattr(fd, name)
    except OSError:
        return b""


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name
