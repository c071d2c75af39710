"""A link that is slow and breaks, each end seeing it at another moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from madang.kit.clock import Clock
from madang.kit.link import MemoryStream, stream_pair
from madang.kit.tasks import TaskSet
from madang.wire.kernel import Desired, Hello, Reports
from madang.wire.link import StreamRequest


class FaultyLink:
    """Messages keep their order inside the link. What is under way when it breaks may be lost.

    An end that has not noticed the break yet sends into the void, and may still be given what was
    under way: so messages of an old link can come after those of a newer one.
    """

    def __init__(self, clock: Clock, delay: Callable[[], float] = lambda: 0.0) -> None:
        self._clock = clock
        self._delay = delay
        self._tasks = TaskSet()
        self._broken = False
        self._ways: dict[asyncio.Queue[object], asyncio.Queue[tuple[float, object]]] = {}
        self.manager = FaultyManagerEnd(self)
        self.agent = FaultyAgentEnd(self)

    def carry(self, inbox: asyncio.Queue[object], message: object) -> None:
        """Bring *message* to *inbox* some time after those before it."""
        if self._broken:
            return
        if (way := self._ways.get(inbox)) is None:
            way = self._ways[inbox] = asyncio.Queue()
            self._tasks.spawn(self._move(way, inbox), "way")
        way.put_nowait((self._clock.monotonic() + self._delay(), message))

    async def _move(
        self, way: asyncio.Queue[tuple[float, object]], inbox: asyncio.Queue[object]
    ) -> None:
        while True:
            at, message = await way.get()
            await self._clock.sleep(max(0.0, at - self._clock.monotonic()))
            inbox.put_nowait(message)

    async def break_it(self, *, agent_after_s: float = 0.0, manager_after_s: float = 0.0) -> None:
        """Nothing more gets through; each end notices after its own time."""
        self._broken = True
        first, second = sorted(
            [(agent_after_s, 0, self.agent), (manager_after_s, 1, self.manager)],
            key=lambda each: each[:2],
        )
        await self._clock.sleep(first[0])
        await first[2].close()
        await self._clock.sleep(second[0] - first[0])
        await second[2].close()
        await self._tasks.close()


class _End:
    def __init__(self, link: FaultyLink) -> None:
        self._link = link
        self._inbox: asyncio.Queue[object] = asyncio.Queue()
        self._streams: asyncio.Queue[object] = asyncio.Queue()
        self._closed = False

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._inbox.put_nowait(None)
            self._streams.put_nowait(None)

    def _check(self) -> None:
        if self._closed:
            raise ConnectionError("the link is broken")

    async def _take(self) -> object:
        message = await self._inbox.get()
        if message is None or self._closed:
            raise ConnectionError("the link is broken")
        return message


class FaultyManagerEnd(_End):
    async def send(self, message: Desired) -> None:
        self._check()
        self._link.carry(self._link.agent._inbox, message)

    async def receive(self) -> Hello | Reports:
        message = await self._take()
        assert isinstance(message, Hello | Reports)
        return message

    async def open(self, request: StreamRequest) -> MemoryStream:
        self._check()
        ours, theirs = stream_pair()
        self._link.carry(self._link.agent._streams, (request, theirs))
        return ours


class FaultyAgentEnd(_End):
    async def send(self, message: Hello | Reports) -> None:
        self._check()
        self._link.carry(self._link.manager._inbox, message)

    async def receive(self) -> Desired:
        message = await self._take()
        assert isinstance(message, Desired)
        return message

    async def accept(self) -> tuple[StreamRequest, MemoryStream]:
        opened = await self._streams.get()
        if not isinstance(opened, tuple):
            raise ConnectionError("the link is broken")
        request, stream = opened
        return request, stream
