"""File worker: one operation on a kernel's files, over a connected socket.

Runs in a process of its own that has the session's uid already. Frames both ways are a kind (u8), a
length (u32, little-endian) and as many bytes:

==========  ===========================================================
REQUEST     first, from the client: JSON with ``op``, ``path``, and what the operation takes
ENTRIES     JSON, a list of entries (``wire.link.FileEntry`` towards the client,
            ``wire.api.WorkspaceFile`` towards the worker, each file followed by its DATA)
DATA        bytes of a file or of a tar stream
END         from the client: that was all; without it nothing half-sent is kept
DONE        last, from the worker: JSON result
ERROR       last, from the worker: JSON with ``code`` and ``text`` (``wire.errors``)
==========  ===========================================================

Operations: ``list stat read tar`` answer with ENTRIES and DATA; ``write untar place`` take them;
``mkdir move remove`` do neither.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import Any, Final

from madang.agent.launcher import archive, scratch, tree
from madang.agent.launcher.tree import SCRATCH_VIEW, Entry, Tree, Writer
from madang.wire.errors import FileFailed, FileMissing, PathInvalid, PlatformError
from madang.wire.paths import from_wire, relative, to_wire

FRAME: Final = struct.Struct("<BI")
MAX_FRAME: Final = 256 * 1024
_BATCH: Final = 256
_MEMORY_LIMIT: Final = 1 << 30
"""Address space of a worker: a tar header may claim any size."""


class Frame(IntEnum):
    REQUEST = 0
    ENTRIES = 1
    DATA = 2
    END = 3
    DONE = 4
    ERROR = 5


Request = dict[str, Any]


class Gone(Exception):
    """The client left, or does not speak the protocol."""


class Channel:
    """The worker's end of the socket; blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ended = False

    def send(self, kind: Frame, payload: bytes | memoryview = b"") -> None:
        try:
            self._sock.sendall(FRAME.pack(kind, len(payload)))
            self._sock.sendall(payload)
        except OSError as exc:
            raise Gone from exc

    def send_json(self, kind: Frame, value: object) -> None:
        self.send(kind, json.dumps(value).encode())

    def receive(self) -> tuple[Frame, bytes]:
        kind, length = FRAME.unpack(self._exactly(FRAME.size))
        if length > MAX_FRAME or kind > Frame.ERROR:
            raise Gone
        self._ended = kind == Frame.END
        return Frame(kind), self._exactly(length)

    def data(self) -> Iterator[bytes]:
        """DATA until END."""
        while (frame := self.receive())[0] == Frame.DATA:
            yield frame[1]
        if frame[0] != Frame.END:
            raise Gone

    def exactly(self, size: int) -> Iterator[bytes]:
        """DATA frames that together have *size* bytes."""
        while size > 0:
            kind, payload = self.receive()
            size -= len(payload)
            if kind != Frame.DATA or size < 0:
                raise Gone
            yield payload

    def drain(self) -> None:
        """Read until the client closes, so that it sees our last frame and no broken pipe."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while self._sock.recv(1 << 16):
                pass

    def _exactly(self, size: int) -> bytes:
        buffer = bytearray()
        while len(buffer) < size:
            try:
                part = self._sock.recv(size - len(buffer))
            except OSError as exc:
                raise Gone from exc
            if not part:
                raise Gone
            buffer += part
        return bytes(buffer)


def serve(sock: socket.socket, root: str, view: Mapping[str, str] = SCRATCH_VIEW) -> None:
    """Do the one operation that the client asks for; returns when it is done or has gone.

    *root*: the scratch space as this process sees it. *view*: in-session folder → folder below the
    root.
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    os.umask(0)
    sock.setblocking(True)
    channel = Channel(sock)
    with contextlib.suppress(Gone), sock:
        try:
            kind, payload = channel.receive()
            if kind != Frame.REQUEST:
                return
            result = _perform(channel, Tree(root, view), json.loads(payload))
            channel.send_json(Frame.DONE, result)
        except Gone:
            raise
        except Exception as exc:  # The request boundary of this process.
            channel.send_json(Frame.ERROR, problem(exc))
        channel.drain()


def problem(exc: Exception) -> dict[str, str]:
    if isinstance(exc, PlatformError):
        return {"code": exc.code, "text": exc.text}
    if isinstance(exc, MemoryError):
        text = "the operation needs more memory than a file worker has."
    else:
        text = f"the file worker does not understand this: {exc!r}."
    return {"code": FileFailed.code, "text": text}


def _perform(channel: Channel, files: Tree, request: Request) -> dict[str, int]:
    path = from_wire(str(request["path"]))
    try:
        return _OPERATIONS[request["op"]](channel, files, path, request)
    except OSError as exc:
        raise _explained(exc, path) from exc
    finally:
        files.close()


def _explained(exc: OSError, path: bytes) -> PlatformError:
    name = os.fsdecode(path)
    if exc.errno in {errno.ENOENT, errno.ENOTDIR}:
        return FileMissing(f"{name}: no such file or folder in the session.")
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        return FileFailed(f"{name}: the session's disk limit is reached.")
    if exc.errno == errno.EIO:
        return FileFailed(f"{name}: the machine's disk is full or damaged.")
    if exc.errno == errno.ENAMETOOLONG:
        return PathInvalid(f"{name[:80]}: the name is too long.")
    return FileFailed(f"{name}: {os.strerror(exc.errno or 0)}.")


def _describe(entry: Entry) -> dict[str, object]:
    return {
        "path": to_wire(entry.path),
        "kind": entry.kind,
        "size_bytes": entry.info.st_size,
        "mode": entry.info.st_mode & 0o7777,
        "modified_at": entry.info.st_mtime_ns / 1e9,
        "target": None if entry.target is None else to_wire(entry.target),
    }


def _entry(fd: int, path: bytes) -> Entry:
    info = os.fstat(fd)
    return Entry(os.path.basename(path.rstrip(b"/")) or b"/", tree.kind_of(info.st_mode), info)


def _list(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    """Entries of a folder, or the one of a file."""
    fd = files.open(path, os.O_PATH)
    try:
        entry = _entry(fd, path)
    finally:
        os.close(fd)
    if entry.kind != "dir" or request.get("itself"):
        channel.send_json(Frame.ENTRIES, [_describe(entry)])
        return {"entries": 1}
    count, batch = 0, []
    folder = files.open_folder(path)
    try:
        for found in tree.walk(folder, recursive=bool(request.get("recursive"))):
            batch.append(_describe(found))
            count += 1
            if len(batch) == _BATCH:
                channel.send_json(Frame.ENTRIES, batch)
                batch = []
    finally:
        os.close(folder)
    if batch:
        channel.send_json(Frame.ENTRIES, batch)
    return {"entries": count}


def _stat(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    return _list(channel, files, path, {**request, "itself": True})


def _read(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    start, length = int(request.get("start") or 0), request.get("length")
    fd = files.open_file(path)
    try:
        entry = _entry(fd, path)
        channel.send_json(Frame.ENTRIES, [_describe(entry)])
        left = max(0, entry.info.st_size - start)
        left = left if length is None else min(left, int(length))
        sent = 0
        while sent < left and (data := os.pread(fd, min(MAX_FRAME, left - sent), start + sent)):
            channel.send(Frame.DATA, data)
            sent += len(data)
    finally:
        os.close(fd)
    return {"bytes": sent}


def _write(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    parent, name = files.open_parent(path)
    try:
        size = tree.write_file(parent, name, channel.data(), int(request.get("mode", 0o644)))
    finally:
        os.close(parent)
    return {"files": 1, "bytes": size}


def _mkdir(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    del channel
    fd = files.open_folder(path, make=True)
    try:
        if "mode" in request:
            os.fchmod(fd, int(request["mode"]) & 0o777)
    finally:
        os.close(fd)
    return {"files": 1}


def _remove(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    """A file, a link, or a folder with all that is in it."""
    del channel, request
    parent, name = files.open_parent(path)
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if tree.kind_of(mode) == "dir":
            scratch.remove_tree(name, parent)
        else:
            os.unlink(name, dir_fd=parent)
    finally:
        os.close(parent)
    return {"files": 1}


def _move(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    """To ``target``, a path like the other, where nothing may be."""
    del channel
    target = from_wire(str(request["target"]))
    with contextlib.ExitStack() as folders:
        parent, name = files.open_parent(path)
        folders.callback(os.close, parent)
        os.stat(name, dir_fd=parent, follow_symlinks=False)  # before folders are made for it
        into, new = files.open_parent(target)
        folders.callback(os.close, into)
        with contextlib.suppress(FileNotFoundError):
            os.stat(new, dir_fd=into, follow_symlinks=False)
            raise FileFailed(f"{os.fsdecode(target)} is there already.")
        os.rename(name, new, src_dir_fd=parent, dst_dir_fd=into)
    return {"files": 1}


def _tar(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    del request
    fd = files.open(path)
    try:
        sent = archive.pack(_entry(fd, path), fd, lambda data: channel.send(Frame.DATA, data))
    finally:
        os.close(fd)
    return {"bytes": sent}


def _untar(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    del request
    folder = files.open_folder(path, make=True)
    writer = Writer(folder)
    try:
        archive.unpack(writer, channel.data())
        writer.finish()
    finally:
        writer.close()
        os.close(folder)
    return {"files": writer.files, "bytes": writer.bytes}


def _place(channel: Channel, files: Tree, path: bytes, request: Request) -> dict[str, int]:
    """Put a working directory below *path*: ENTRIES with the DATA of their files, then END."""
    del request
    folder = files.open_folder(path, make=True)
    writer = Writer(folder)
    try:
        while (frame := channel.receive())[0] == Frame.ENTRIES:
            for entry in json.loads(frame[1]):
                _place_one(writer, channel, entry)
        if frame[0] != Frame.END:
            raise Gone
        writer.finish()
    finally:
        writer.close()
        os.close(folder)
    return {"files": writer.files, "bytes": writer.bytes}


def _place_one(writer: Writer, channel: Channel, entry: Request) -> None:
    path = relative(str(entry["path"]))
    mode, modified_ns = int(entry["mode"]), int(entry["modified_ns"])
    if entry["kind"] == "dir":
        writer.folder(path, mode, modified_ns)
    elif entry["kind"] == "link":
        writer.link(path, from_wire(str(entry["target"])))
    else:
        writer.file(path, channel.exactly(int(entry["size_bytes"])), mode, modified_ns)


_OPERATIONS: Final[Mapping[str, Callable[[Channel, Tree, bytes, Request], dict[str, int]]]] = {
    "list": _list,
    "stat": _stat,
    "read": _read,
    "write": _write,
    "mkdir": _mkdir,
    "move": _move,
    "remove": _remove,
    "tar": _tar,
    "untar": _untar,
    "place": _place,
}
