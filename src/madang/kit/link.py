"""The link between manager and agent inside one process: bounded queues, same messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Final

from madang.wire.kernel import Desired, Hello, Reports
from madang.wire.link import StreamItem, StreamRequest

QUEUE_ITEMS: Final = 32
"""Items in flight per direction of a bulk stream; with 64 KiB items 2 MiB at most."""


class _End:
    __slots__ = ("error",)

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class MemoryStream:
    """One end of a bulk stream; see ``wire.link.BulkStream``."""

    def __init__(
        self,
        outgoing: asyncio.Queue[StreamItem | _End],
        incoming: asyncio.Queue[StreamItem | _End],
        gone: asyncio.Event,
    ) -> None:
        self._out = outgoing
        self._in = incoming
        self._gone = gone
        self._ended = False

    async def send(self, item: StreamItem) -> None:
        await self._put(item)

    async def end(self) -> None:
        if not self._ended:
            self._ended = True
            await self._put(_End(), quiet=True)

    async def fail(self, error: Exception) -> None:
        if not self._ended:
            self._ended = True
            await self._put(_End(error), quiet=True)

    async def _put(self, item: StreamItem | _End, *, quiet: bool = False) -> None:
        if self._gone.is_set():
            if quiet:
                return
            raise ConnectionError("the other end of the stream has gone")
        try:
            self._out.put_nowait(item)
            return
        except asyncio.QueueFull:
            pass
        if not await _first(self._out.put(item), self._gone) and not quiet:
            raise ConnectionError("the other end of the stream has gone")

    async def __aiter__(self) -> AsyncIterator[StreamItem]:
        while True:
            item = await self._next()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    async def _next(self) -> StreamItem | _End:
        try:
            return self._in.get_nowait()
        except asyncio.QueueEmpty:
            pass
        if self._gone.is_set():
            return _End(ConnectionError("the stream was closed"))
        get = asyncio.ensure_future(self._in.get())
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait((get, gone), return_when=asyncio.FIRST_COMPLETED)
            if get.done():
                return get.result()
            return _End(ConnectionError("the stream was closed"))
        finally:
            get.cancel()
            gone.cancel()

    async def close(self) -> None:
        self._gone.set()


async def _first(work: Awaitable[None], gone: asyncio.Event) -> bool:
    """Await *work* unless *gone* is set before; whether it was done."""
    task = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        task.cancel()
        stop.cancel()


def stream_pair() -> tuple[MemoryStream, MemoryStream]:
    """Two connected ends."""
    one: asyncio.Queue[StreamItem | _End] = asyncio.Queue(QUEUE_ITEMS)
    two: asyncio.Queue[StreamItem | _End] = asyncio.Queue(QUEUE_ITEMS)
    gone = asyncio.Event()
    return MemoryStream(one, two, gone), MemoryStream(two, one, gone)


class _Pipe:
    """What both ends of a memory link share."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[Hello | Reports | None] = asyncio.Queue()
        self.down: asyncio.Queue[Desired | None] = asyncio.Queue()
        self.streams: asyncio.Queue[tuple[StreamRequest, MemoryStream] | None] = asyncio.Queue()
        self.closed = False

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            for queue in (self.up, self.down, self.streams):
                queue.put_nowait(None)

    def check(self) -> None:
        if self.closed:
            raise ConnectionError("the link is closed")


class MemoryManagerEnd:
    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe

    async def send(self, message: Desired) -> None:
        self._pipe.check()
        self._pipe.down.put_nowait(message)

    async def receive(self) -> Hello | Reports:
        message = await self._pipe.up.get()
        if message is None:
            raise ConnectionError("the link is closed")
        return message

    async def open(self, request: StreamRequest) -> MemoryStream:
        self._pipe.check()
        ours, theirs = stream_pair()
        self._pipe.streams.put_nowait((request, theirs))
        return ours

    async def close(self) -> None:
        await self._pipe.close()


class MemoryAgentEnd:
    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe

    async def send(self, message: Hello | Reports) -> None:
        self._pipe.check()
        self._pipe.up.put_nowait(message)

    async def receive(self) -> Desired:
        message = await self._pipe.down.get()
        if message is None:
            raise ConnectionError("the link is closed")
        return message

    async def accept(self) -> tuple[StreamRequest, MemoryStream]:
        opened = await self._pipe.streams.get()
        if opened is None:
            raise ConnectionError("the link is closed")
        return opened

    async def close(self) -> None:
        await self._pipe.close()


def memory_link() -> tuple[MemoryManagerEnd, MemoryAgentEnd]:
    """Both ends of a link inside one event loop."""
    pipe = _Pipe()
    return MemoryManagerEnd(pipe), MemoryAgentEnd(pipe)
