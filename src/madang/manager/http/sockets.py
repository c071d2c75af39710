"""WebSockets, before they are open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from aiohttp import web

from madang.manager.http.endpoint import Call
from madang.wire.errors import InvalidRequest

MAX_MESSAGE: Final = 16 << 20
WRITER_LIMIT: Final = 256 << 10
"""Bytes on the way to a client until sending waits for it."""
HEARTBEAT_S: Final = 30.0


class ClientGone(Exception):
    """The client closed, detached, or its connection broke."""


def new_socket(protocols: Iterable[str] = ()) -> web.WebSocketResponse:
    """Sends wait for a slow client, so that memory stays bounded."""
    return web.WebSocketResponse(
        protocols=protocols,
        heartbeat=HEARTBEAT_S,
        compress=False,
        max_msg_size=MAX_MESSAGE,
        writer_limit=WRITER_LIMIT,
    )


def check_upgrade(call: Call[Any, Any], socket: web.WebSocketResponse) -> None:
    """Raises InvalidRequest if *call* does not ask for a WebSocket."""
    if not socket.can_prepare(call.request).ok:
        raise InvalidRequest("this path speaks WebSocket only: send an upgrade request.")
