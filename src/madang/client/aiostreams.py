"""Running programs as the asyncio client follows them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, Self

import aiohttp

from madang.client import calls
from madang.client.events import StreamEvent
from madang.client.following import Following
from madang.client.retry import Retries
from madang.wire.errors import Conflict, PlatformError, ServerUnreachable
from madang.wire.log import LogRecord
from madang.wire.session import Ended, Session, SessionStatus

if TYPE_CHECKING:
    from madang.client.aio import AsyncTransport

_CHUNK: Final = 64 * 1024
_STEADY_S: Final = 5.0


class AsyncStream:
    """A program's stream; see ``streams.Stream``, whose calls are the same with ``await``."""

    def __init__(self, transport: AsyncTransport, following: Following) -> None:
        self._transport = transport
        self._following = following
        self._events: deque[StreamEvent] = deque()
        self._channel: aiohttp.ClientWebSocketResponse | None = None
        self._retries: Retries | None = None
        self._opened_at = 0.0
        self._closed = False
        self._turn = asyncio.Lock()
        """Whoever holds it receives, or connects anew."""

    async def open(self) -> Self:
        """Connect; done by the client."""
        self._channel = await self._transport.repeat(self._connect)
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[LogRecord]:
        async for event in self.events():
            if isinstance(event, LogRecord):
                yield event

    @property
    def finished(self) -> bool:
        """Whether the program has ended and all its output came."""
        return self._following.finished

    async def events(self) -> AsyncIterator[StreamEvent]:
        """Output, gaps in it, and the session at each change, until the program has ended."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self.finished:
                return
            await self._receive()

    async def write(self, data: bytes) -> None:
        """Send to the program's stdin; waits if much is on its way already."""
        for start in range(0, len(data), _CHUNK):
            with self._transport.errors():
                channel = await self._connected()
                if channel is not None:
                    await channel.send_bytes(data[start : start + _CHUNK])

    async def close_stdin(self) -> None:
        await self._send(self._following.end_stdin())

    async def resize(self, rows: int, cols: int) -> None:
        """Tell the size of the terminal."""
        await self._send(self._following.resize(rows, cols))

    async def signal(self, number: int) -> None:
        """Send a signal to the program's process group."""
        await self._send(self._following.signal(number))

    async def close(self) -> None:
        """Let go of the program; it goes on."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            if not self.finished and not channel.closed:
                await channel.send_str(self._following.detach().decode())
            await channel.close()

    async def _send(self, message: bytes) -> None:
        if self._channel is not None and not self._channel.closed:
            await self._channel.send_str(message.decode())

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        path, messages = self._following.opening()
        channel = await self._transport.channel(path)
        for message in messages:
            await channel.send_str(message.decode())
        self._opened_at = time.monotonic()
        return channel

    async def _connected(self) -> aiohttp.ClientWebSocketResponse | None:
        while self._channel is None and not self.finished:
            await self._receive()
        return self._channel

    async def _receive(self) -> None:
        """One message; connects anew if need be."""
        async with self._turn:
            if self._events or self.finished:
                return
            if self._closed:
                raise Conflict("the stream was closed; `attach` opens another.")
            try:
                if self._channel is None:
                    self._channel = await self._connect()
                await self._take(self._channel)
            except PlatformError as exc:
                await self._broken(exc)

    async def _take(self, channel: aiohttp.ClientWebSocketResponse) -> None:
        with self._transport.errors():
            message = await channel.receive()
        if message.type in {aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY}:
            self._events += self._following.take(message.data)
            if self.finished:
                await channel.close()
        else:
            raise ServerUnreachable("the server closed the stream before the program's end.")

    async def _broken(self, error: PlatformError) -> None:
        """Pause before the next try, or raise *error*."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
        if self._retries is None or time.monotonic() - self._opened_at > _STEADY_S:
            self._retries = self._transport.retries(repeatable=self._following.can_resume)
        pause_s = self._retries.pause_s(error)
        if pause_s is None:
            raise error
        await asyncio.sleep(pause_s)


class AsyncRun(AsyncStream):
    """A session's main program."""

    async def session(self) -> Session:
        """The session as last told. Waits for the first word of it."""
        while self._following.session is None:
            await self._receive()
        return self._following.session

    async def wait(self) -> Session:
        """Wait for the program's end, dropping what output was not taken; how it ended is in
        ``.ended``.
        """
        async for _ in self.events():
            pass
        session = await self.session()
        while session.ended is None and session.status is not SessionStatus.TERMINATED:
            call = calls.session(session.id, wait_s=calls.POLL_S, version=session.version)
            session = await self._transport.call(call)
        return session

    async def stop(self, grace_s: float | None = None) -> Session:
        """Ask for the end; ``wait`` for it."""
        session = await self.session()
        return await self._transport.call(calls.stop(session.id, grace_s))


class AsyncExec(AsyncStream):
    """One more program in a running session."""

    async def wait(self) -> Ended:
        """Wait for the program's end, dropping what output was not taken."""
        async for _ in self.events():
            pass
        if self._following.ended is None:
            raise PlatformError("the server did not say how the program ended.")
        return self._following.ended
