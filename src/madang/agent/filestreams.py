"""Streams that read or write a kernel's files, on its file worker."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Final

from madang.agent.files import (
    list_files,
    make_folder,
    move,
    read_file,
    read_tar,
    remove,
    stat_file,
    write_file,
    write_tar,
)
from madang.wire.errors import InvalidRequest
from madang.wire.link import (
    BulkStream,
    FileEntry,
    FileRequest,
    FilesWritten,
    ListFiles,
    MakeFolder,
    MoveFile,
    ReadFile,
    ReadTar,
    RemoveFile,
    StatFile,
    WriteFile,
    WriteTar,
)

_ONE: Final = FilesWritten(files=1, bytes=0)


async def serve_files(sock: socket.socket, request: FileRequest, stream: BulkStream) -> None:
    """Do what *request* says, with *stream* for what goes in or comes out. Closes *sock*."""
    match request:
        case ListFiles():
            await _send(list_files(sock, request.path, recursive=request.recursive), stream)
        case ReadTar():
            await _send(read_tar(sock, request.path), stream)
        case ReadFile():
            source = read_file(sock, request.path, start=request.start, length=request.length)
            await _send(source, stream)
        case WriteTar():
            await stream.send(await write_tar(sock, request.path, _chunks(stream)))
        case WriteFile():
            chunks = _chunks(stream)
            await stream.send(await write_file(sock, request.path, chunks, mode=request.mode))
        case StatFile():
            await stream.send(await stat_file(sock, request.path))
        case MakeFolder():
            await make_folder(sock, request.path)
            await stream.send(_ONE)
        case MoveFile():
            await move(sock, request.path, request.target)
            await stream.send(_ONE)
        case RemoveFile():
            await remove(sock, request.path)
            await stream.send(_ONE)


async def _send(
    source: AsyncGenerator[FileEntry | bytes, None]
    | AsyncGenerator[FileEntry, None]
    | AsyncGenerator[bytes, None],
    stream: BulkStream,
) -> None:
    async with aclosing(source):
        async for item in source:
            await stream.send(item)


async def _chunks(stream: BulkStream) -> AsyncIterator[bytes]:
    async for item in stream:
        if not isinstance(item, bytes):
            raise InvalidRequest("a stream that writes files takes bytes alone.")
        yield item
