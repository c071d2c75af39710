"""Files of the caller's running sessions, through their file workers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from madang.manager.db import seconds
from madang.manager.http import Caller
from madang.manager.jupyter.rules import contents as rules
from madang.manager.jupyter.rules.contents import Place
from madang.manager.jupyter.types import JupyterSettings
from madang.manager.session.service import SessionService
from madang.manager.session.service.kernels import KernelService, upload
from madang.manager.session.service.kernels import kernel_of as held
from madang.manager.session.types import SessionRow
from madang.wire.errors import Conflict, FileFailed, InvalidRequest, NotFound, TooLarge
from madang.wire.link import (
    FileEntry,
    ListFiles,
    MakeFolder,
    MoveFile,
    ReadFile,
    RemoveFile,
    StatFile,
    StreamRequest,
    WriteFile,
)
from madang.wire.session import SessionStatus
from madang.wire.size import format_bytes

MAX_ENTRIES: Final = 10_000
MAX_SESSIONS: Final = 500
_CHUNK: Final = 256 << 10
_UNTITLED: Final = {"notebook": ("Untitled", ".ipynb"), "directory": ("Untitled Folder", "")}


class Contents:
    def __init__(
        self, sessions: SessionService, streams: KernelService, settings: JupyterSettings
    ) -> None:
        self._sessions: Final = sessions
        self._streams: Final = streams
        self._limit: Final = settings.file_bytes

    async def get(
        self, caller: Caller, place: Place, *, kind: str, form: str | None, content: bool
    ) -> dict[str, Any]:
        """A file or folder. Raises FileMissing, TooLarge, …"""
        if not place.session:
            return await self._root(caller, content=content)
        row = await self._row(caller, place)
        await self._sessions.records.note_reading(caller, row, path=place.absolute)
        entry = await self._stat(row, place)
        if entry.kind == "dir":
            if kind in {"file", "notebook"}:
                raise InvalidRequest(f"{place.path} is a folder, no {kind}.")
            return await self._folder(row, place, entry) if content else rules.model(place, entry)
        if kind == "directory":
            raise InvalidRequest(f"{place.path} is no folder.")
        found = rules.model(place, entry, kind=kind)
        if not content:
            return found
        return rules.filled(found, await self._read(row, place, entry), form)

    async def save(self, caller: Caller, place: Place, body: dict[str, Any]) -> dict[str, Any]:
        """Write a file, or make a folder."""
        row = await self._writing(caller, place)
        if body.get("type") == "directory":
            await self._do(row, MakeFolder(kernel=row.kernel, path=place.absolute))
        else:
            await self._write(row, place, rules.data_of(body))
        return rules.model(place, await self._stat(row, place), kind=_kind(body))

    async def make(self, caller: Caller, place: Place, body: dict[str, Any]) -> dict[str, Any]:
        """Something new in the folder *place*, or a copy of ``copy_from``, under a free name."""
        row = await self._writing(caller, place.below("_"))
        entries = await self._entries(row, place)
        taken = [entry.path for entry in entries]
        if source := body.get("copy_from"):
            return await self._copy(caller, row, place, rules.place_of(str(source)), taken)
        kind = _kind(body) or "file"
        stem, suffix = _UNTITLED.get(kind, ("untitled", str(body.get("ext") or "")[:20]))
        if "/" in suffix:
            raise InvalidRequest("ext: the end of a name, like .txt.", field="ext")
        made = place.below(rules.free_name(stem, suffix, taken))
        if kind == "directory":
            await self._do(row, MakeFolder(kernel=row.kernel, path=made.absolute))
        else:
            await self._write(row, made, rules.new_content(kind))
        return rules.model(made, await self._stat(row, made), kind=kind)

    async def _copy(
        self, caller: Caller, row: SessionRow, place: Place, source: Place, taken: list[str]
    ) -> dict[str, Any]:
        other = await self._row(caller, source)
        entry = await self._stat(other, source)
        if entry.kind == "dir":
            raise InvalidRequest(f"{source.path} is a folder; only files are copied.")
        stem, dot, suffix = source.name.rpartition(".")
        name = rules.free_name(f"{stem or suffix}-Copy", dot + suffix if stem else "", taken)
        made = place.below(name)
        await self._write(row, made, await self._read(other, source, entry))
        return rules.model(made, await self._stat(row, made))

    async def move(self, caller: Caller, place: Place, target: Place) -> dict[str, Any]:
        """Within one session. Raises Conflict where something is there."""
        if target.session != place.session:
            raise InvalidRequest("files stay in their session: copy, then delete.")
        row = await self._writing(caller, place)
        if not target.inside:
            raise Conflict(f"{target.path} is there already.")
        request = MoveFile(kernel=row.kernel, path=place.absolute, target=target.absolute)
        try:
            await self._do(row, request)
        except FileFailed as exc:
            raise Conflict(exc.text) from exc
        return rules.model(target, await self._stat(row, target))

    async def remove(self, caller: Caller, place: Place) -> None:
        """A file, or a folder with all that is in it."""
        row = await self._writing(caller, place)
        await self._stat(row, place)
        await self._do(row, RemoveFile(kernel=row.kernel, path=place.absolute))

    # The machine

    async def _root(self, caller: Caller, *, content: bool) -> dict[str, Any]:
        rows, _ = await self._sessions.page(
            caller, status=SessionStatus.RUNNING, ended=False, after=None, limit=MAX_SESSIONS
        )
        entries = [
            FileEntry(
                path=row.name,
                kind="dir",
                size_bytes=0,
                mode=0o755,
                modified_at=seconds(row.created_at),
            )
            for row in rows
            if row.owner_id == caller.user_id
        ]
        top = FileEntry(path="", kind="dir", size_bytes=0, mode=0o555, modified_at=0)
        root = Place("", "")
        found = rules.folder(root, top, entries) if content else rules.model(root, top)
        return found | {"writable": False}

    async def _row(self, caller: Caller, place: Place) -> SessionRow:
        row = await self._sessions.get(caller, place.session)
        if row.owner_id != caller.user_id or row.name != place.session:
            raise NotFound(f"you have no session {place.session[:64]!r}.")
        held(row)
        return row

    async def _writing(self, caller: Caller, place: Place) -> SessionRow:
        if not place.session or not place.inside:
            raise InvalidRequest(
                f"{place.path or '/'} holds sessions: files lie in a session's folder."
            )
        row = await self._row(caller, place)
        await self._sessions.records.note(caller, row, "files_written", path=place.absolute)
        return row

    async def _stat(self, row: SessionRow, place: Place) -> FileEntry:
        found = await self._do(row, StatFile(kernel=row.kernel, path=place.absolute))
        if found is None:
            raise FileFailed(f"{place.path}: the machine did not say what it is.")
        return found

    async def _folder(self, row: SessionRow, place: Place, entry: FileEntry) -> dict[str, Any]:
        return rules.folder(place, entry, await self._entries(row, place))

    async def _entries(self, row: SessionRow, place: Place) -> list[FileEntry]:
        found: list[FileEntry] = []
        request = ListFiles(kernel=row.kernel, path=place.absolute)
        async with self._streams.open(row, request) as stream:
            async for item in stream:
                if isinstance(item, FileEntry):
                    found.append(item)
                if len(found) > MAX_ENTRIES:
                    raise FileFailed(f"{place.path} has more than {MAX_ENTRIES} entries.")
        return found

    async def _read(self, row: SessionRow, place: Place, entry: FileEntry) -> bytes:
        if entry.size_bytes > self._limit:
            size = format_bytes(entry.size_bytes)
            text = f"{place.path} has {size}; get it by `madang get {row.name}:{place.inside}`."
            raise TooLarge(text, limit=self._limit)
        request = ReadFile(kernel=row.kernel, path=place.absolute, length=self._limit)
        async with self._streams.open(row, request) as stream:
            return b"".join([item async for item in stream if isinstance(item, bytes)])

    async def _write(self, row: SessionRow, place: Place, data: bytes) -> None:
        async def chunks() -> AsyncGenerator[bytes, None]:
            for at in range(0, len(data), _CHUNK):
                yield data[at : at + _CHUNK]

        request = WriteFile(kernel=row.kernel, path=place.absolute)
        async with self._streams.open(row, request) as stream, aclosing(chunks()) as source:
            await upload(stream, source)

    async def _do(self, row: SessionRow, request: StreamRequest) -> FileEntry | None:
        """A request with one answer; the entry, if that is it."""
        found = None
        async with self._streams.open(row, request) as stream:
            async for item in stream:
                found = item if isinstance(item, FileEntry) else found
        return found


def _kind(body: dict[str, Any]) -> str:
    kind = body.get("type")
    return kind if kind in {"notebook", "file", "directory"} else ""
