"""One WebSocket of the stream protocol (``wire.api``)."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Final

from aiohttp import WSCloseCode, WSMsgType, web

from madang.kit.codec import from_json, to_json
from madang.manager.http import Call
from madang.manager.http.problems import problem_of
from madang.manager.http.sockets import ClientGone, check_upgrade, new_socket
from madang.wire.api import ClientMessage, ClientOp, ServerMessage, ServerOp
from madang.wire.errors import InvalidRequest, PlatformError
from madang.wire.log import LogRecord, pack

OFFSET: Final = struct.Struct("<Q")
FIRST_WITHIN_S: Final = 30.0


class Channel:
    """Sends wait for a slow client, so that memory stays bounded."""

    def __init__(self, call: Call[Any, Any]) -> None:
        self._call: Final = call
        self._socket: Final = new_socket()

    @property
    def response(self) -> web.WebSocketResponse:
        return self._socket

    async def open(self, expected: ClientOp) -> ClientMessage:
        """Shake hands and take the first message, which must be *expected*."""
        check_upgrade(self._call, self._socket)
        self._call.started = True
        await self._socket.prepare(self._call.request)
        try:
            async with asyncio.timeout(FIRST_WITHIN_S):
                first = await self.receive()
        except TimeoutError as exc:
            raise InvalidRequest(f"no message {expected!r} came first.") from exc
        if not isinstance(first, ClientMessage) or first.op is not expected:
            raise InvalidRequest(f"the first message must be {expected!r}.")
        return first

    async def receive(self) -> ClientMessage | bytes:
        """The next message. Raises ClientGone."""
        message = await self._socket.receive()
        if message.type is WSMsgType.TEXT:
            return from_json(ClientMessage, message.data)
        if message.type is WSMsgType.BINARY:
            return bytes(message.data)
        raise ClientGone

    async def send(self, message: ServerMessage) -> None:
        try:
            await self._socket.send_str(to_json(message).decode())
        except (ConnectionError, RuntimeError) as exc:
            raise ClientGone from exc

    async def send_record(self, record: LogRecord) -> None:
        frame = OFFSET.pack(record.offset) + pack(record.stream, record.at_us, record.data)
        try:
            await self._socket.send_bytes(frame)
        except (ConnectionError, RuntimeError) as exc:
            raise ClientGone from exc

    async def fail(self, error: PlatformError) -> None:
        """Tell the client why, and close."""
        problem = problem_of(error, self._call.id)
        await self.send(ServerMessage(op=ServerOp.ERROR, error=problem))
        going = error.code == "server.stopping"
        code = WSCloseCode.GOING_AWAY if going else WSCloseCode.OK
        await self.close(code)

    async def close(self, code: int = WSCloseCode.OK) -> None:
        await self._socket.close(code=code)
