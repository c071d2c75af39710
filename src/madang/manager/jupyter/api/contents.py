"""Jupyter's contents API over the files of running sessions."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from madang.manager.http import Call
from madang.manager.jupyter.api.route import body_of, route, text_of
from madang.manager.jupyter.rules.contents import FORMATS, Place, place_of
from madang.manager.jupyter.service.contents import Contents
from madang.manager.jupyter.types import JupyterSettings
from madang.wire.errors import InvalidRequest, NotFound

_AT: Final = "/api/contents/{path:.*}"
AT_ONCE: Final = 2
_CHECKPOINTS: Final = "/checkpoints"

_Call = Call[dict[str, str], Any]


class ContentsApi:
    def __init__(self, contents: Contents, settings: JupyterSettings) -> None:
        self._contents: Final = contents
        self._limit: Final = settings.file_bytes * 4 // 3 + (64 << 10)
        """Of a request: base64 takes four letters for three bytes."""
        self._rooms: Final[dict[str, asyncio.Semaphore]] = {}

    @route("GET", "/api/contents")
    async def jupyter_root(self, call: _Call) -> Any:
        """The caller's running sessions, as folders."""
        return await self._get(call, Place("", ""))

    @route("POST", "/api/contents", status=201)
    async def jupyter_make_in_root(self, call: _Call) -> Any:
        """Refused: files lie in sessions."""
        return await self._contents.make(call.caller, Place("", ""), await body_of(call))

    @route("GET", _AT)
    async def jupyter_get_file(self, call: _Call) -> Any:
        """A file or folder, with its content unless told otherwise."""
        path = call.path("path")
        if path.endswith(_CHECKPOINTS):
            return []  # none are kept
        return await self._get(call, place_of(path))

    @route("PUT", _AT)
    async def jupyter_save_file(self, call: _Call) -> Any:
        """Write a file, or make a folder."""
        async with self._room(call):
            body = await body_of(call, self._limit)
            return await self._contents.save(call.caller, place_of(call.path("path")), body)

    @route("POST", _AT, status=201)
    async def jupyter_make_file(self, call: _Call) -> Any:
        """A new file, notebook or folder with a free name, or a copy."""
        path = call.path("path")
        if path.endswith(_CHECKPOINTS):
            raise NotFound("no checkpoints are kept here.")
        return await self._contents.make(call.caller, place_of(path), await body_of(call))

    @route("PATCH", _AT)
    async def jupyter_move_file(self, call: _Call) -> Any:
        """Another path in the same session."""
        target = text_of(await body_of(call), "path")
        if not target:
            raise InvalidRequest("path: where it goes.", field="path")
        place = place_of(call.path("path"))
        return await self._contents.move(call.caller, place, place_of(target))

    @route("DELETE", _AT, status=204)
    async def jupyter_remove_file(self, call: _Call) -> Any:
        """A file, or a folder with all that is in it."""
        await self._contents.remove(call.caller, place_of(call.path("path")))

    async def _get(self, call: _Call, place: Place) -> Any:
        query = call.query
        form = query.get("format")
        if form is not None and form not in FORMATS:
            raise InvalidRequest(f"format: one of {', '.join(sorted(FORMATS))}.", field="format")
        async with self._room(call):
            return await self._contents.get(
                call.caller,
                place,
                kind=query.get("type", ""),
                form=form,
                content=query.get("content", "1") != "0",
            )

    def _room(self, call: _Call) -> asyncio.Semaphore:
        """Whole files are in memory: few at a time of each user."""
        return self._rooms.setdefault(call.caller.user_id, asyncio.Semaphore(AT_ONCE))
