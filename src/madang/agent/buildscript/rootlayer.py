"""A layer of a whole root file system: what it says, and its tar.

In the tar (GNU format) folders come before what lies in them, no path comes twice, headers have the
true mode (with setuid and sticky bits), owner and, for files, time; what a layer removes from those
below is said as OCI does: ``.wh.NAME`` hides NAME, ``.wh..wh..opq`` all that its folder had.
Of several hard links the first in the order of paths is the file.

The digest is the SHA-256 (hex) over ``HEADER`` and one line per entry, the lines sorted as bytes::

    PATH NUL KIND NUL CONTENT LF

KIND is ``dir MODE UID GID``, ``file MODE UID GID TIME``, ``link``, ``hard``, ``gone`` or
``opaque``; CONTENT the SHA-256 (hex) of a file's bytes, of a link's target or of the path that a
hard link repeats, else empty. Time stamps of folders and links don't count.

How it is kept on a node's disk: see ``wire.rootlayer``.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, BinaryIO

from madang.wire.rootlayer import OPAQUE, OVERLAY_OPAQUE, RECORD, WHITEOUT, Meta, meta_of

HEADER = b"madang root layer 1\n"
FOLDER_TIME = 315532800
"""Of folders and links; files keep theirs, byte code of Python asks for it."""
MAX_TIME = 2**33 - 1
MAX_PATH = 2048
MAX_NAME = 255
MAX_DEPTH = 256


def meta_at(path: bytes, found: os.stat_result) -> Meta:
    """What a file on a node's disk is in its image."""
    try:
        record = os.getxattr(path, RECORD, follow_symlinks=False)
    except OSError:
        record = b""
    return meta_of(stat.S_IMODE(found.st_mode), record, folder=stat.S_ISDIR(found.st_mode))


def is_path(path: bytes) -> bool:
    """Whether *path* is relative, stays below its root and can be a file's."""
    parts = path.split(b"/")
    if {b"", b".", b".."} & set(parts) or b"\0" in path:
        return False
    return len(path) <= MAX_PATH and len(parts) <= MAX_DEPTH and max(map(len, parts)) <= MAX_NAME


def folder_line(path: bytes, meta: Meta) -> bytes:
    return b"%s\0dir %s\0\n" % (path, meta.record())


def file_line(path: bytes, meta: Meta, modified_at: int, content: str) -> bytes:
    return b"%s\0file %s %d\0%s\n" % (path, meta.record(), modified_at, content.encode())


def link_line(path: bytes, target: bytes) -> bytes:
    return b"%s\0link\0%s\n" % (path, _sha256(target))


def hard_line(path: bytes, first: bytes) -> bytes:
    return b"%s\0hard\0%s\n" % (path, _sha256(first))


def gone_line(path: bytes) -> bytes:
    return b"%s\0gone\0\n" % path


def opaque_line(path: bytes) -> bytes:
    return b"%s\0opaque\0\n" % path


def digest(lines: Iterable[bytes]) -> str:
    return hashlib.sha256(HEADER + b"".join(sorted(lines))).hexdigest()


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def beside(path: bytes, name: bytes) -> bytes:
    """*name* in the folder of *path*."""
    return os.path.join(os.path.dirname(path), name)


def whiteout(path: bytes) -> bytes:
    """The tar's name for «*path* is gone»."""
    return beside(path, WHITEOUT + os.path.basename(path))


def header(name: bytes, kind: bytes, meta: Meta, modified_at: int = FOLDER_TIME) -> tarfile.TarInfo:
    """A tar header without size and target."""
    info = tarfile.TarInfo(os.fsdecode(name))
    info.type, info.mode, info.mtime = kind, meta.mode, modified_at
    info.uid, info.gid = meta.uid, meta.gid
    return info


class Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._sha256.update(data)
        return data

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


PLAIN = Meta(0o644)
LINK = Meta(0o777)


def opened(target: BinaryIO) -> tarfile.TarFile:
    """A tar that is written to *target*, entry after entry; names can be any bytes."""
    return tarfile.open(
        fileobj=target,
        mode="w|",
        format=tarfile.GNU_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    )


def write(root: str, target: BinaryIO) -> None:
    """The tar of a layer that lies at *root* on a node; the same bytes each time."""
    base = os.fsencode(root)
    first: dict[tuple[int, int], bytes] = {}
    with opened(target) as archive:
        for name in sorted(_names(base)):
            _write(archive, base, name, first)


def _names(base: bytes, folder: bytes = b"") -> Iterator[bytes]:
    """Names of all entries in the tar."""
    with os.scandir(os.path.join(base, folder)) as entries:
        found = list(entries)
    for entry in found:
        path = os.path.join(folder, entry.name)
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISCHR(status.st_mode):
            yield whiteout(path)
            continue
        yield path
        if stat.S_ISDIR(status.st_mode):
            if is_opaque(entry.path):
                yield os.path.join(path, OPAQUE)
            yield from _names(base, path)


def is_opaque(path: bytes) -> bool:
    try:
        return os.getxattr(path, OVERLAY_OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def _write(
    archive: tarfile.TarFile, base: bytes, name: bytes, first: dict[tuple[int, int], bytes]
) -> None:
    if os.path.basename(name).startswith(WHITEOUT):
        archive.addfile(header(name, tarfile.REGTYPE, PLAIN))
        return
    path = os.path.join(base, name)
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        info = header(name, tarfile.SYMTYPE, LINK)
        info.linkname = os.fsdecode(os.readlink(path))
        archive.addfile(info)
    elif stat.S_ISDIR(found.st_mode):
        archive.addfile(header(name, tarfile.DIRTYPE, meta_at(path, found)))
    elif stat.S_ISREG(found.st_mode):
        meta, inode = meta_at(path, found), (found.st_dev, found.st_ino)
        known = first.setdefault(inode, name)
        info = header(name, tarfile.REGTYPE, meta, int(found.st_mtime))
        if known != name:
            info.type, info.linkname = tarfile.LNKTYPE, os.fsdecode(known)
            archive.addfile(info)
            return
        info.size = found.st_size
        with open(path, "rb") as file:
            archive.addfile(info, file)
    else:
        raise ValueError(f"{os.fsdecode(name)!r} is neither a file, a folder nor a link")
