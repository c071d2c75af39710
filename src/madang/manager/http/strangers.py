"""Connections of nobody in particular: few at once, and not for long.

A connection is a stranger's until a request on it has shown a valid token. Anyone who reaches the
port can open connections and say nothing, or a letter a minute; each holds a descriptor of ours.
Who is known may stay as long as they like.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from aiohttp import web

STRANGER_S: Final = 30.0
"""Until then a token must have come."""
MAX_STRANGERS: Final = 512
"""At once; one more, and the oldest goes."""
_YOUNG_S: Final = 1.0
"""A connection that was taken so lately may not be counted by its server yet."""


class Strangers:
    """Keeps the list; one for an application."""

    def __init__(self, *, most: int = MAX_STRANGERS, patience_s: float = STRANGER_S) -> None:
        self._most: Final = most
        self._patience_s: Final = patience_s
        self._waiting: Final[dict[asyncio.BaseProtocol, asyncio.TimerHandle]] = {}
        """In the order in which they came."""

    def admit(self, server: web.Server) -> asyncio.Protocol:
        """A new connection."""
        handler = server()
        if len(self._waiting) >= self._most:
            self._forget_closed(server)
        while len(self._waiting) >= self._most:
            self._cut(next(iter(self._waiting)))
        loop = asyncio.get_running_loop()
        self._waiting[handler] = loop.call_later(self._patience_s, self._cut, handler)
        return handler

    def welcome(self, request: web.Request) -> None:
        """It has shown a token."""
        timer = self._waiting.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Wait for nobody any more."""
        for timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()

    def _forget_closed(self, server: web.Server) -> None:
        alive = set(server.connections)
        young = asyncio.get_running_loop().time() + self._patience_s - _YOUNG_S
        for handler, timer in list(self._waiting.items()):
            if handler not in alive and timer.when() < young:
                timer.cancel()
                del self._waiting[handler]

    def _cut(self, handler: asyncio.BaseProtocol) -> None:
        self._waiting.pop(handler).cancel()
        transport = getattr(handler, "transport", None)
        if transport is not None:
            transport.abort()


STRANGERS: Final = web.AppKey("strangers", Strangers)


class Site(web.BaseSite):
    """Serves *sock*; each new connection is a stranger's."""

    def __init__(self, runner: web.AppRunner, sock: socket.socket) -> None:
        super().__init__(runner)
        self._sock: Final = sock
        self._strangers: Final = runner.app[STRANGERS]

    @property
    def name(self) -> str:
        host, port = self._sock.getsockname()[:2]
        return f"http://{host}:{port}"

    async def start(self) -> None:
        await super().start()
        server = self._runner.server
        assert server is not None, "the runner is set up"
        self._server = await asyncio.get_running_loop().create_server(
            lambda: self._strangers.admit(server), sock=self._sock, backlog=self._backlog
        )

    async def stop(self) -> None:
        self._strangers.close()
        await super().stop()
