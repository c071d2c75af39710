"""Files of a kernel, through its file worker (``launcher.files``; the protocol is told there).

Each function takes the socket that ``Runtime.files`` gave, does one operation and closes it, also
when it is cancelled. Paths are in-session paths as in ``wire.paths``: absolute, or relative to the
working directory. Errors are FileMissing, FileFailed, PathInvalid; ConnectionError where the worker
died. Who may leave one of the generators early wraps it in ``contextlib.aclosing``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

from madang.agent.launcher.files import FRAME, MAX_FRAME, Frame
from madang.wire.api import WorkspaceFile, WorkspaceManifest
from madang.wire.errors import FileFailed, WorkspaceIncomplete, from_problem
from madang.wire.link import FileEntry, FilesWritten

Fetch = Callable[[str], Awaitable[str]]
"""Digest → path of a local file; see ``wire.link.BlobSource``."""

_BATCH_BYTES: Final = 1 << 20
_BATCH_FILES: Final = 256
_FEW_FILES: Final = 16


class _Worker:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, kind: Frame, payload: bytes = b"") -> None:
        self._writer.write(FRAME.pack(kind, len(payload)) + payload)
        await self._writer.drain()

    async def send_raw(self, frames: bytes) -> None:
        self._writer.write(frames)
        await self._writer.drain()

    async def receive(self) -> tuple[Frame, bytes]:
        """The next frame; raises what an ERROR frame says."""
        try:
            kind, length = FRAME.unpack(await self._reader.readexactly(FRAME.size))
            payload = await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as exc:
            raise ConnectionError("the file worker went away") from exc
        if kind == Frame.ERROR:
            problem = json.loads(payload)
            raise from_problem(problem["code"], problem["text"], {})
        return Frame(kind), payload

    async def result(self, sending: Awaitable[None]) -> FilesWritten:
        """Run *sending* while waiting for the worker's last word; an early error ends it."""
        sender = asyncio.ensure_future(sending)
        answer = asyncio.ensure_future(self.receive())
        try:
            await asyncio.wait((sender, answer), return_when=asyncio.FIRST_COMPLETED)
            if sender.done() and not _broken(sender):
                sender.result()
            _, payload = await answer
        finally:
            await _cancel(sender, answer)
        done = json.loads(payload)
        return FilesWritten(files=done.get("files", 0), bytes=done.get("bytes", 0))


def _broken(sender: asyncio.Future[None]) -> bool:
    """Whether the worker stopped reading; its own last frame tells why."""
    return not sender.cancelled() and isinstance(sender.exception(), ConnectionError)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _request(sock: socket.socket, op: str, path: str, **more: Any) -> AsyncIterator[_Worker]:
    try:
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock, limit=2 * MAX_FRAME)
    except BaseException:
        sock.close()
        raise
    worker = _Worker(reader, writer)
    try:
        await worker.send(Frame.REQUEST, json.dumps({"op": op, "path": path, **more}).encode())
        yield worker
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _entries(payload: bytes) -> list[FileEntry]:
    return [FileEntry(**fields) for fields in json.loads(payload)]


async def list_files(
    sock: socket.socket, path: str, *, recursive: bool = False
) -> AsyncGenerator[FileEntry, None]:
    """Entries of a folder, paths relative to it, each folder before its contents; or of a file."""
    async with _request(sock, "list", path, recursive=recursive) as worker:
        while (frame := await worker.receive())[0] != Frame.DONE:
            for entry in _entries(frame[1]):
                yield entry


async def stat_file(sock: socket.socket, path: str) -> FileEntry:
    """What *path* leads to, links followed."""
    async with _request(sock, "stat", path) as worker:
        _, payload = await worker.receive()
        await worker.receive()
        return _entries(payload)[0]


async def read_file(
    sock: socket.socket, path: str, *, start: int = 0, length: int | None = None
) -> AsyncGenerator[FileEntry | bytes, None]:
    """The file's entry, then its bytes from *start*, as long as the file was at the opening."""
    async with _request(sock, "read", path, start=start, length=length) as worker:
        while (frame := await worker.receive())[0] != Frame.DONE:
            if frame[0] == Frame.ENTRIES:
                yield _entries(frame[1])[0]
            else:
                yield frame[1]


async def write_file(
    sock: socket.socket, path: str, chunks: AsyncIterator[bytes], *, mode: int = 0o644
) -> FilesWritten:
    """Replace one file, atomically; missing folders are made. The bytes are on no disk yet."""
    async with _request(sock, "write", path, mode=mode) as worker:
        return await worker.result(_send_chunks(worker, chunks))


async def read_tar(sock: socket.socket, path: str) -> AsyncGenerator[bytes, None]:
    """A tar stream (PAX): names relative to the folder, or the name of the one file."""
    async with _request(sock, "tar", path) as worker:
        while (frame := await worker.receive())[0] != Frame.DONE:
            yield frame[1]


async def read_changes(sock: socket.socket) -> AsyncGenerator[bytes, None]:
    """A layer as a tar stream; *sock* is that of ``Runtime.changes``."""
    async with _request(sock, "changes", "") as worker:
        while (frame := await worker.receive())[0] != Frame.DONE:
            yield frame[1]


async def write_tar(sock: socket.socket, path: str, chunks: AsyncIterator[bytes]) -> FilesWritten:
    """Unpack a tar stream below *path*, each file replaced atomically."""
    async with _request(sock, "untar", path) as worker:
        return await worker.result(_send_chunks(worker, chunks))


async def make_folder(sock: socket.socket, path: str, *, mode: int = 0o755) -> None:
    """A folder and its parents. No error if it is there."""
    async with _request(sock, "mkdir", path, mode=mode) as worker:
        await worker.receive()


async def remove(sock: socket.socket, path: str) -> None:
    """A file, a link, or a folder with all that is in it."""
    async with _request(sock, "remove", path) as worker:
        await worker.receive()


async def move(sock: socket.socket, path: str, target: str) -> None:
    """Another path for a file, link or folder. Raises FileFailed where something is there."""
    async with _request(sock, "move", path, target=target) as worker:
        await worker.receive()


async def materialise(
    sock: socket.socket, manifest: WorkspaceManifest, fetch: Fetch, *, path: str = "."
) -> FilesWritten:
    """Put a working directory below *path*: modes (no setuid), times and links as listed."""
    async with _request(sock, "place", path) as worker:
        return await worker.result(_send_workspace(worker, manifest, fetch))


async def _send_chunks(worker: _Worker, chunks: AsyncIterator[bytes]) -> None:
    async for chunk in chunks:
        for at in range(0, len(chunk), MAX_FRAME):
            await worker.send(Frame.DATA, chunk[at : at + MAX_FRAME])
    await worker.send(Frame.END)


async def _send_workspace(worker: _Worker, manifest: WorkspaceManifest, fetch: Fetch) -> None:
    batch: list[tuple[WorkspaceFile, str | None]] = []
    size = 0
    for file in manifest.files:
        blob = None if file.digest is None else await fetch(file.digest)
        if file.size_bytes > _BATCH_BYTES:
            await _send_large(worker, file, blob)
            continue
        batch.append((file, blob))
        size += file.size_bytes
        if size >= _BATCH_BYTES or len(batch) == _BATCH_FILES:
            await worker.send_raw(await asyncio.to_thread(_pack, batch))
            batch, size = [], 0
    few = len(batch) <= _FEW_FILES and size <= MAX_FRAME  # Not worth a thread's start.
    await worker.send_raw(_pack(batch) if few else await asyncio.to_thread(_pack, batch))
    await worker.send(Frame.END)


async def _send_large(worker: _Worker, file: WorkspaceFile, blob: str | None) -> None:
    await worker.send_raw(_described(file))
    frames = _content(file, blob)
    while frame := await asyncio.to_thread(next, frames, b""):
        await worker.send_raw(frame)


def _pack(batch: list[tuple[WorkspaceFile, str | None]]) -> bytes:
    """Frames of small files."""
    return b"".join(
        part for file, blob in batch for part in (_described(file), *_content(file, blob))
    )


def _described(file: WorkspaceFile) -> bytes:
    fields = {
        "path": file.path,
        "kind": file.kind,
        "mode": file.mode,
        "size_bytes": file.size_bytes if file.kind == "file" else 0,
        "modified_ns": file.modified_ns,
        "target": file.target,
    }
    payload = json.dumps([fields]).encode()
    return FRAME.pack(Frame.ENTRIES, len(payload)) + payload


def _content(file: WorkspaceFile, blob: str | None) -> Iterator[bytes]:
    """DATA frames of a file; raises WorkspaceIncomplete if the blob is not what was listed."""
    if file.kind != "file" or not file.size_bytes:
        return
    if blob is None:
        raise FileFailed(f"the list of files has no digest for {file.path}.")
    left = file.size_bytes
    with open(blob, "rb") as source:
        if os.fstat(source.fileno()).st_size != left:
            raise WorkspaceIncomplete(f"the stored content of {file.path} has another size.")
        while left and (data := source.read(min(MAX_FRAME, left))):
            left -= len(data)
            yield FRAME.pack(Frame.DATA, len(data)) + data
