"""``/api/kernels/ID/channels``: all channels of a kernel over one WebSocket."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import WSCloseCode, WSMsgType, web

from madang.manager.http import Call, endpoint
from madang.manager.http.sockets import ClientGone, check_upgrade, new_socket
from madang.manager.jupyter.api.route import check_user
from madang.manager.jupyter.rules import frames
from madang.manager.jupyter.rules.frames import Message
from madang.manager.jupyter.service.connection import Connection
from madang.manager.jupyter.service.kernels import Kernels
from madang.wire.errors import PlatformError

MAX_CLIENT: Final = 128
_MAX_REASON: Final = 120


class KernelChannelApi:
    def __init__(self, kernels: Kernels) -> None:
        self._kernels: Final = kernels
        self._open: Final[set[web.WebSocketResponse]] = set()

    @endpoint(
        "GET", "/jupyter/{user}/api/kernels/{kernel}/channels", scope="sessions", foreign=True
    )
    async def jupyter_channels(self, call: Call[dict[str, str], None]) -> web.StreamResponse:
        """Messages of a kernel in either of Jupyter's two subprotocols (WebSocket)."""
        check_user(call)
        row = await self._kernels.row(call.caller, call.path("kernel"))
        socket = new_socket((frames.V1,))
        check_upgrade(call, socket)
        call.started = True
        await socket.prepare(call.request)
        protocol = socket.ws_protocol or ""

        async def send(message: Message) -> None:
            data = frames.pack(message, protocol)
            try:
                if isinstance(data, str):
                    await socket.send_str(data)
                else:
                    await socket.send_bytes(data)
            except (ConnectionError, RuntimeError) as exc:
                raise ClientGone from exc

        async def receive() -> Message | None:
            got = await socket.receive()
            if got.type not in {WSMsgType.TEXT, WSMsgType.BINARY}:
                return None
            return frames.unpack(got.data, protocol)

        client = call.query.get("session_id", "")[:MAX_CLIENT]
        connection = Connection(self._kernels, call.caller, row, client, send)
        self._open.add(socket)
        try:
            await connection.run(receive)
        except* ClientGone:
            pass
        except* PlatformError as group:
            reason = _first(group).text.encode()[:_MAX_REASON]
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=reason)
        finally:
            self._open.discard(socket)
        await socket.close()
        return socket

    async def close(self) -> None:
        """The server stops; clients come back to the next one."""
        going = [s.close(code=WSCloseCode.GOING_AWAY, message=b"restart") for s in self._open]
        await asyncio.gather(*going, return_exceptions=True)


def _first(group: BaseExceptionGroup[Any]) -> PlatformError:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            return _first(exc)
        if isinstance(exc, PlatformError):
            return exc
    raise group
