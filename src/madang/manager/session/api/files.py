"""Files of a session, and working directories on their way into one. Nothing is collected."""

from __future__ import annotations

import re
import struct
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from msgspec import Meta

from madang.kit.clock import Clock
from madang.manager.http import Call, endpoint, start_stream
from madang.manager.session.api.streams import watched
from madang.manager.session.service import SessionService
from madang.manager.session.service.kernels import KernelService, kernel_of, upload
from madang.manager.session.types import Blobs, SessionRow, SessionSettings
from madang.wire.api import WorkspaceManifest, WorkspaceState
from madang.wire.errors import FileFailed, InvalidRequest, PathInvalid, WorkspaceTooLarge
from madang.wire.link import (
    FileEntry,
    FilesWritten,
    ListFiles,
    ReadFile,
    ReadTar,
    WriteFile,
    WriteTar,
)
from madang.wire.paths import from_wire, relative
from madang.wire.size import format_bytes

MANIFEST_LIMIT: Final = 64 << 20
MAX_FILES: Final = 100_000
CHUNK: Final = 256 << 10
_RECORD: Final = struct.Struct("<32sQ")
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_KINDS: Final = frozenset({"file", "dir", "link"})

WirePath = Annotated[str, Meta(min_length=1, max_length=12_288)]


class FilesQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    path: WirePath = "/work"
    recursive: bool = False


class PathQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    path: WirePath


class PutQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    path: WirePath
    mode: Annotated[int, Meta(ge=0, le=0o777)] = 0o644


class FileApi:
    def __init__(self, sessions: SessionService, kernels: KernelService, clock: Clock) -> None:
        self._sessions: Final = sessions
        self._kernels: Final = kernels
        self._clock: Final = clock

    async def _row(self, call: Call[Any, None]) -> SessionRow:
        from_wire(call.query.path)  # the agent gets no path that can't be one
        row = await self._sessions.get(call.caller, call.path("ref"))
        kernel_of(row)
        return row

    async def _reading(self, call: Call[Any, None]) -> SessionRow:
        row = await self._row(call)
        await self._sessions.records.note_reading(call.caller, row, path=call.query.path)
        return row

    async def _writing(self, call: Call[Any, None]) -> SessionRow:
        row = await self._row(call)
        await self._sessions.records.note(call.caller, row, "files_written", path=call.query.path)
        return row

    @endpoint("GET", "/v1/sessions/{ref}/files", query=FilesQuery, returns=list[FileEntry])
    async def list_files(self, call: Call[FilesQuery, None]) -> list[FileEntry]:
        """Entries of a folder in a session."""
        row, query = await self._reading(call), call.query
        request = ListFiles(kernel=row.kernel, path=query.path, recursive=query.recursive)
        found: list[FileEntry] = []
        async with self._kernels.open(row, request) as stream:
            async for item in stream:
                if isinstance(item, FileEntry):
                    found.append(item)
                if len(found) > MAX_FILES:
                    text = f"more than {MAX_FILES} entries below {query.path}; list a folder of it."
                    raise FileFailed(text, path=query.path)
        return found

    @endpoint(
        "GET",
        "/v1/sessions/{ref}/file",
        query=PathQuery,
        streams="application/octet-stream",
        also=(206, 416),
        headers=("Range",),
    )
    async def get_file(self, call: Call[PathQuery, None]) -> web.StreamResponse:
        """One file's bytes; ranges are honoured."""
        row = await self._reading(call)
        start, length, status = await self._range(call, row)
        request = ReadFile(kernel=row.kernel, path=call.query.path, start=start, length=length)
        async with self._kernels.open(row, request) as stream:
            items = aiter(stream)
            entry = await anext(items, None)
            if not isinstance(entry, FileEntry):
                raise FileFailed(f"{call.query.path} gave no file.", path=call.query.path)
            size = entry.size_bytes
            if status == 206 and start >= size:
                return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
            headers = {"Accept-Ranges": "bytes", "Madang-File-Mode": f"{entry.mode:o}"}
            if status == 206:
                last = size if length is None else min(size, start + length)
                headers["Content-Range"] = f"bytes {start}-{last - 1}/{size}"
            # No Content-Length: a file that is being written may grow or shrink meanwhile.
            response = await start_stream(
                call, "application/octet-stream", status=status, headers=headers
            )
            async with watched(call, stream, self._clock):
                async for item in items:
                    if isinstance(item, bytes):
                        await response.write(item)
            await response.write_eof()
            return response

    async def _range(
        self, call: Call[PathQuery, None], row: SessionRow
    ) -> tuple[int, int | None, int]:
        """Start, length, status; what is no single range is ignored, as RFC 9110 has it."""
        match = _RANGE.fullmatch(call.header("Range") or "")
        if match is None or match[0] == "bytes=-":
            return 0, None, 200
        if not match[1]:
            size = await self._size(call, row)
            return max(0, size - int(match[2])), None, 206
        start = int(match[1])
        if not match[2]:
            return start, None, 206
        if int(match[2]) < start:
            return 0, None, 200
        return start, int(match[2]) - start + 1, 206

    async def _size(self, call: Call[PathQuery, None], row: SessionRow) -> int:
        request = ReadFile(kernel=row.kernel, path=call.query.path, length=0)
        async with self._kernels.open(row, request) as stream:
            async for item in stream:
                if isinstance(item, FileEntry):
                    return item.size_bytes
        return 0

    @endpoint(
        "PUT",
        "/v1/sessions/{ref}/file",
        scope="sessions",
        query=PutQuery,
        returns=FilesWritten,
        sends="application/octet-stream",
    )
    async def put_file(self, call: Call[PutQuery, None]) -> FilesWritten:
        """Replace one file, atomically."""
        row, query = await self._writing(call), call.query
        request = WriteFile(kernel=row.kernel, path=query.path, mode=query.mode)
        async with self._kernels.open(row, request) as stream:
            return await upload(stream, _chunks(call))

    @endpoint("GET", "/v1/sessions/{ref}/archive", query=PathQuery, streams="application/x-tar")
    async def get_archive(self, call: Call[PathQuery, None]) -> web.StreamResponse:
        """A file or folder as a tar stream."""
        row = await self._reading(call)
        request = ReadTar(kernel=row.kernel, path=call.query.path)
        async with self._kernels.open(row, request) as stream:
            items = aiter(stream)
            first = await anext(items, b"")  # an error here is still a proper answer
            response = await start_stream(call, "application/x-tar")
            async with watched(call, stream, self._clock):
                if isinstance(first, bytes):
                    await response.write(first)
                async for item in items:
                    if isinstance(item, bytes):
                        await response.write(item)
            await response.write_eof()
            return response

    @endpoint(
        "PUT",
        "/v1/sessions/{ref}/archive",
        scope="sessions",
        query=PathQuery,
        returns=FilesWritten,
        sends="application/x-tar",
    )
    async def put_archive(self, call: Call[PathQuery, None]) -> FilesWritten:
        """Unpack a tar stream below a folder of a session."""
        row = await self._writing(call)
        request = WriteTar(kernel=row.kernel, path=call.query.path)
        async with self._kernels.open(row, request) as stream:
            return await upload(stream, _chunks(call))


async def _chunks(call: Call[Any, Any]) -> AsyncIterator[bytes]:
    async for chunk in call.content.chunks(CHUNK):
        yield chunk


class WorkspaceApi:
    def __init__(self, blobs: Blobs, settings: SessionSettings) -> None:
        self._blobs: Final = blobs
        self._settings: Final = settings

    @endpoint(
        "POST",
        "/v1/workspaces",
        scope="sessions",
        body=WorkspaceManifest,
        returns=WorkspaceState,
        body_limit=MANIFEST_LIMIT,
    )
    async def put_workspace(self, call: Call[None, WorkspaceManifest]) -> WorkspaceState:
        """Say what lies in a working directory; the answer names the files to send."""
        check_manifest(call.body, self._settings.workspace_limit_bytes)
        digest = await self._blobs.put_manifest(call.body)
        wanted = sorted({f.digest for f in call.body.files if f.digest is not None})
        return WorkspaceState(digest=digest, missing=tuple(await self._blobs.missing(wanted)))

    @endpoint(
        "PUT",
        "/v1/workspaces/blobs",
        scope="sessions",
        status=204,
        sends="application/octet-stream",
    )
    async def put_blobs(self, call: Call[None, None]) -> None:
        """Files of working directories: records of digest (32 bytes), size (u64 LE), data."""
        content = call.content
        while head := await _exactly(content, _RECORD.size, at_end=True):
            digest, size = _RECORD.unpack(head)
            if size > self._settings.workspace_limit_bytes:
                raise _too_large(size, self._settings.workspace_limit_bytes)
            await self._blobs.put(digest.hex(), size, _part(content, size))


def check_manifest(manifest: WorkspaceManifest, limit: int) -> None:
    """Raises PathInvalid, InvalidRequest or WorkspaceTooLarge."""
    total = 0
    seen: set[str] = set()
    for file in manifest.files:
        relative(file.path)
        if file.path in seen:
            raise PathInvalid(f"path {file.path[:80]!r} comes twice.")
        seen.add(file.path)
        if file.kind not in _KINDS:
            raise InvalidRequest(f"{file.path[:80]}: kind {file.kind[:20]!r} is unknown.")
        if file.kind == "file" and not (file.digest and _DIGEST.fullmatch(file.digest)):
            raise InvalidRequest(f"{file.path[:80]}: a file needs its SHA-256 as digest.")
        if file.kind == "link":
            from_wire(file.target or "")
        if file.size_bytes < 0:
            raise InvalidRequest(f"{file.path[:80]}: size_bytes is negative.")
        total += file.size_bytes
    if total > limit:
        raise _too_large(total, limit)


def _too_large(size: int, limit: int) -> WorkspaceTooLarge:
    text = f"the working directory has {format_bytes(size)}; the limit is {format_bytes(limit)}."
    return WorkspaceTooLarge(text, size=size, limit=limit)


async def _exactly(content: Any, size: int, *, at_end: bool = False) -> bytes:
    """*size* bytes, or none if the body ends here and may."""
    found = b""
    while len(found) < size:
        chunk = await content.read(size - len(found))
        if not chunk:
            if at_end and not found:
                return b""
            raise InvalidRequest("the body ends within a record.")
        found += chunk
    return found


async def _part(content: Any, size: int) -> AsyncIterator[bytes]:
    left = size
    while left:
        chunk = await content.read(min(left, CHUNK))
        if not chunk:
            raise InvalidRequest("the body ends within a record.")
        left -= len(chunk)
        yield chunk
