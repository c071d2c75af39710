"""An interpreter of a session as an asyncio program follows and feeds it; see ``cells.Cells``."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final, Self

import aiohttp

from madang.client.cellfollowing import CellFollowing
from madang.client.cellstory import Story
from madang.wire.cells import (
    Cell,
    CellAnswer,
    CellEvent,
    CellOp,
    CellRequest,
    Completions,
    Inspection,
    Interpreter,
)
from madang.wire.errors import Conflict, InterpreterEnded, PlatformError, ServerUnreachable

if TYPE_CHECKING:
    from madang.client.aio import AsyncTransport

_STEADY_S: Final = 5.0


class AsyncCells:
    """The calls are those of ``Cells`` with ``await``. A task of its own reads the channel."""

    def __init__(self, transport: AsyncTransport, interpreter: Interpreter, after: int) -> None:
        self.interpreter: Final = interpreter
        self._transport = transport
        self._following = CellFollowing(interpreter.session_id, interpreter.id, after)
        self._events: deque[CellEvent] = deque()
        self._come = asyncio.Event()
        self._asked: dict[str, asyncio.Future[CellAnswer]] = {}
        self._channel: aiohttp.ClientWebSocketResponse | None = None
        self._reader: asyncio.Task[None] | None = None
        self._error: PlatformError | None = None
        self._stories: dict[str, Story] = {}

    async def open(self) -> Self:
        """Connect; done by the client."""
        self._channel = await self._transport.repeat(self._connect)
        self._reader = asyncio.create_task(self._read(), name=f"cells:{self.interpreter.id}")
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[CellEvent]:
        """What happens, until the interpreter has ended."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self.finished:
                return
            await self._wait()

    @property
    def finished(self) -> bool:
        """Whether the interpreter has ended."""
        return self._following.finished

    @property
    def ended(self) -> str:
        """Why, in words."""
        return self._following.ended

    async def run(
        self,
        code: str,
        *,
        show: Callable[[CellEvent], None] | None = None,
        answer: Callable[[str, bool], Awaitable[str]] | None = None,
    ) -> Cell:
        """Run a cell to its end. *show* is told its events, *answer* (prompt, hidden) its input.

        Its events are not among those that are iterated.
        """
        story = Story(self.interpreter.id, code)
        request = CellRequest(code=code, stdin=answer is not None)
        story.id, message = self._following.execute(request)
        self._stories[story.id] = story
        try:
            await self._send(message)
            await self._answer(story.id)
            told = 0
            while not story.ended or told < len(story.events):
                for event in story.events[told:]:
                    told += 1
                    if show is not None:
                        show(event)
                    if story.asks and answer is not None and event is story.events[-1]:
                        story.asks = False
                        await self.input(await answer(event.text, event.secret))
                if not story.ended:
                    if self.finished:
                        raise InterpreterEnded(f"the interpreter has ended: {self.ended}")
                    await self._wait()
        finally:
            del self._stories[story.id]
        return story.cell()

    async def execute(
        self,
        code: str,
        *,
        cell: str = "",
        silent: bool = False,
        store: bool = True,
        stdin: bool = True,
        stop_on_error: bool = True,
    ) -> str:
        """Give it a cell; returns the cell's id. What comes of it: iterate."""
        request = CellRequest(
            code=code,
            id=cell,
            silent=silent,
            store=store,
            stdin=stdin,
            stop_on_error=stop_on_error,
        )
        made, message = self._following.execute(request)
        await self._send(message)
        await self._answer(made)
        return made

    async def input(self, text: str) -> None:
        """Answer the cell that asks. Raises Conflict if none does."""
        await self._ask(CellOp.INPUT, text)

    async def complete(self, code: str, cursor: int | None = None) -> Completions:
        found = (await self._ask(CellOp.COMPLETE, code, cursor)).completions
        return found or Completions(matches=(), start=0, end=0)

    async def inspect(self, code: str, cursor: int | None = None) -> Inspection:
        found = (await self._ask(CellOp.INSPECT, code, cursor)).inspection
        return found or Inspection(found=False)

    async def interrupt(self) -> None:
        await self._ask(CellOp.INTERRUPT)

    async def restart(self) -> None:
        """All state is gone; the session goes on."""
        await self._ask(CellOp.RESTART)

    async def close(self) -> None:
        """Let go of the interpreter; it goes on."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
        self._fail(Conflict("the channel was closed; open another."))

    async def _ask(self, op: CellOp, text: str = "", cursor: int | None = None) -> CellAnswer:
        reply, message = self._following.ask(op, text, cursor)
        await self._send(message)
        return await self._answer(reply)

    async def _answer(self, reply: str) -> CellAnswer:
        if self._error is not None:
            raise self._error
        if self.finished:
            raise InterpreterEnded(f"the interpreter has ended: {self.ended}")
        future = self._asked.setdefault(reply, asyncio.get_running_loop().create_future())
        try:
            return await future
        finally:
            self._asked.pop(reply, None)

    async def _send(self, message: bytes) -> None:
        while self._channel is None and self._error is None:
            await self._wait()
        if self._channel is not None:
            with self._transport.errors():
                await self._channel.send_str(message.decode())

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._come.clear()
        await self._come.wait()

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        path, messages = self._following.opening()
        channel = await self._transport.channel(path)
        for message in messages:
            await channel.send_str(message.decode())
        return channel

    async def _read(self) -> None:
        retries, opened_at = self._transport.retries(repeatable=True), time.monotonic()
        while not self.finished:
            try:
                if self._channel is None:
                    self._channel = await self._connect()
                    opened_at = time.monotonic()
                await self._take(self._channel)
            except PlatformError as exc:
                channel, self._channel = self._channel, None
                if channel is not None:
                    await channel.close()
                if time.monotonic() - opened_at > _STEADY_S:
                    retries = self._transport.retries(repeatable=True)
                pause_s = retries.pause_s(exc)
                if pause_s is None:
                    self._fail(exc)
                    return
                self._lose()
                await asyncio.sleep(pause_s)
        self._fail(InterpreterEnded(f"the interpreter has ended: {self.ended}"))

    async def _take(self, channel: aiohttp.ClientWebSocketResponse) -> None:
        with self._transport.errors():
            message = await channel.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ServerUnreachable("the server closed the channel.")
        for item in self._following.take(message.data):
            if isinstance(item, CellEvent):
                story = self._stories.get(item.cell)
                if story is None or not story.add(item):
                    self._events.append(item)
            else:
                future = self._asked.get(item.reply)
                if future is not None and not future.done():
                    if item.error is not None:
                        future.set_exception(item.error)
                    else:
                        future.set_result(item.answer)
        self._come.set()

    def _lose(self) -> None:
        """Questions, unlike cells, do not survive a break of the connection."""
        error = ServerUnreachable("the connection was lost before the answer came.")
        for reply, future in self._asked.items():
            if not self._following.survives(reply) and not future.done():
                future.set_exception(error)

    def _fail(self, error: PlatformError) -> None:
        if not self.finished:
            self._error = error
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)
        self._come.set()
