"""The channel of an interpreter: one WebSocket for all that its clients say and hear.

Client messages are ``CellMessage``, the server's ``CellAnswer``. Several clients may be connected;
each hears all events. Questions are answered in any order, so that a completion that waits for a
cell holds up neither an interrupt nor the answer to an input request.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from aiohttp import WSMsgType, web

from madang.kit.codec import from_json, to_builtins, to_json
from madang.manager.cells.service import CellService
from madang.manager.http import Call, endpoint
from madang.manager.http.problems import problem_of
from madang.manager.http.sockets import ClientGone, check_upgrade, new_socket
from madang.wire.cells import CellAnswer, CellMessage, CellOp
from madang.wire.errors import InvalidRequest, PlatformError, RateLimited

_MAX_TASKS: Final = 64


class ChannelQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    after: int | None = None
    """Number of the last event that was seen; 0: all that are kept; nothing: only new ones."""


class ChannelApi:
    def __init__(self, cells: CellService) -> None:
        self._cells: Final = cells

    @endpoint(
        "GET",
        "/v1/sessions/{ref}/interpreters/{interpreter}/channel",
        scope="sessions",
        query=ChannelQuery,
        websocket=(CellMessage, CellAnswer),
    )
    async def open_channel(self, call: Call[ChannelQuery, None]) -> web.StreamResponse:
        """Run cells and follow all that happens in an interpreter (WebSocket)."""
        names = call.path("ref"), call.path("interpreter")
        await self._cells.get(call.caller, *names)
        socket = new_socket()
        check_upgrade(call, socket)
        await self._cells.note_channel(call.caller, *names)
        call.started = True
        await socket.prepare(call.request)
        talk = _Talk(self._cells, call, socket, names)
        try:
            await talk.run(call.query.after)
        except ClientGone:
            pass
        except PlatformError as exc:
            await talk.tell(CellAnswer(error=to_builtins(problem_of(exc, call.id))), quiet=True)
        await socket.close()
        return socket


class _Talk:
    def __init__(
        self,
        cells: CellService,
        call: Call[ChannelQuery, None],
        socket: web.WebSocketResponse,
        names: tuple[str, str],
    ) -> None:
        self._cells = cells
        self._call = call
        self._socket = socket
        self._names = names

    async def run(self, after: int | None) -> None:
        """Until the interpreter has ended, or the client has gone."""
        try:
            async with asyncio.TaskGroup() as tasks:
                listening = tasks.create_task(self._listen())
                following = tasks.create_task(self._follow(after))
                following.add_done_callback(lambda _: listening.cancel())
        except BaseExceptionGroup as group:
            rest = group.split(ClientGone)[1]
            if rest is None:
                raise ClientGone from group
            raise _first(rest) from group

    async def _follow(self, after: int | None) -> None:
        async with self._cells.follow(self._call.caller, *self._names, after) as events:
            async for event in events:
                await self.tell(CellAnswer(event=event))

    async def _listen(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = 0

            def done(_task: object) -> None:
                nonlocal running
                running -= 1

            while True:
                message = await self._receive()
                if message.op in {CellOp.COMPLETE, CellOp.INSPECT}:
                    if running >= _MAX_TASKS:
                        error = RateLimited("too many questions wait for their answers.")
                        await self._fail(message, error)
                        continue
                    running += 1
                    tasks.create_task(self._answer(message)).add_done_callback(done)
                else:
                    await self._answer(message)

    async def _receive(self) -> CellMessage:
        while True:
            message = await self._socket.receive()
            if message.type is WSMsgType.TEXT:
                try:
                    return from_json(CellMessage, message.data)
                except InvalidRequest as exc:
                    await self._fail(CellMessage(op=CellOp.INSPECT), exc)
            elif message.type is WSMsgType.BINARY:
                error = InvalidRequest("this channel takes text messages.")
                await self._fail(CellMessage(op=CellOp.INSPECT), error)
            else:
                raise ClientGone

    async def _answer(self, message: CellMessage) -> None:
        try:
            await self.tell(await self._do(message))
        except PlatformError as exc:
            await self._fail(message, exc)

    async def _do(self, message: CellMessage) -> CellAnswer:
        cells, caller, names = self._cells, self._call.caller, self._names
        reply = message.reply
        match message.op:
            case CellOp.EXECUTE:
                if message.cell is None:
                    raise InvalidRequest("execute: there is no cell.", field="cell")
                cell = await cells.execute(caller, *names, message.cell)
                return CellAnswer(reply=reply, cell=cell.id)
            case CellOp.COMPLETE:
                found = await cells.complete(caller, *names, message.text, message.cursor)
                return CellAnswer(reply=reply, completions=found)
            case CellOp.INSPECT:
                seen = await cells.inspect(caller, *names, message.text, message.cursor)
                return CellAnswer(reply=reply, inspection=seen)
            case CellOp.INPUT:
                await cells.input(caller, *names, message.text)
            case CellOp.INTERRUPT:
                await cells.interrupt(caller, *names)
            case CellOp.RESTART:
                await cells.restart(caller, *names)
        return CellAnswer(reply=reply)

    async def _fail(self, message: CellMessage, error: PlatformError) -> None:
        problem = to_builtins(problem_of(error, self._call.id))
        await self.tell(CellAnswer(reply=message.reply, error=problem))

    async def tell(self, answer: CellAnswer, *, quiet: bool = False) -> None:
        """*quiet*: a client that has gone is no error."""
        try:
            await self._socket.send_str(to_json(answer).decode())
        except (ConnectionError, RuntimeError) as exc:
            if not quiet:
                raise ClientGone from exc


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf
