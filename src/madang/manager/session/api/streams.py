"""Output and input: WebSockets for run, attach and exec; ``logs`` over plain HTTP.

A conversation is three tasks: *tell* sends the session at each change, *output* sends records from
the moment the kernel has a node until its end and reopens after a break where it stopped, *input*
passes on what the client sends. The agent holds the stream of output until the kernel runs, so its
first words wait for no report. A client that goes away ends the conversation, never the session.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from madang.kit.clock import Clock
from madang.manager.db.events import EventFeed
from madang.manager.http import Call, Caller, endpoint, start_stream
from madang.manager.http.sockets import ClientGone
from madang.manager.session.api.channel import OFFSET, Channel
from madang.manager.session.service import SessionService
from madang.manager.session.service.kernels import KernelService, kernel_of, not_running
from madang.manager.session.service.records import program
from madang.manager.session.types import SessionRow
from madang.wire.api import ClientMessage, ClientOp, ServerMessage, ServerOp
from madang.wire.errors import (
    InvalidRequest,
    LogGone,
    NodeUnavailable,
    NotFound,
    PlatformError,
    SessionNotRunning,
    Shutdown,
)
from madang.wire.kernel import KernelId
from madang.wire.link import (
    Attach,
    BulkStream,
    ExecStarted,
    ReadLog,
    Resize,
    Signal,
    StartExec,
    StdinEnd,
    StreamItem,
)
from madang.wire.log import LogGap, LogRecord, Stream, pack
from madang.wire.policy import Refusal
from madang.wire.session import Ended, SessionStatus

S = SessionStatus
SOCKET: Final = (ClientMessage, ServerMessage)
REOPEN_S: Final = 0.5
_BEGUN: Final = frozenset({S.RUNNING, S.TERMINATING, S.TERMINATED})


class LogQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    offset: Annotated[int, Meta(ge=0)] = 0
    tail: Annotated[int, Meta(ge=0)] | None = None
    """Bytes."""
    since: Annotated[float, Meta(ge=0)] | None = None
    """Unix seconds."""
    follow: bool = False
    stream: Literal["stdout", "stderr"] | None = None
    format: Literal["raw", "frames"] = "raw"


@dataclass(slots=True)
class Conversation:
    """What the tasks of one WebSocket share."""

    channel: Channel
    caller: Caller
    row: SessionRow
    offset: int = 0
    tail_bytes: int | None = None
    placed: asyncio.Event = field(default_factory=asyncio.Event)
    """The kernel has a node, which knows when there is output to read; or it never will."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """The kernel runs, or did."""


class StreamApi:
    def __init__(
        self, sessions: SessionService, kernels: KernelService, feed: EventFeed, clock: Clock
    ) -> None:
        self._sessions: Final = sessions
        self._kernels: Final = kernels
        self._feed: Final = feed
        self._clock: Final = clock

    # WebSockets

    @endpoint("GET", "/v1/run", scope="sessions", websocket=SOCKET)
    async def run(self, call: Call[None, None]) -> web.StreamResponse:
        """Create a session by the first message and follow it to its end (WebSocket)."""
        channel = Channel(call)
        async with _talk(channel):
            first = await channel.open(ClientOp.RUN)
            if first.spec is None:
                raise InvalidRequest("run: the first message has no spec.")
            created = await self._sessions.create(call.caller, first.spec, key=first.key)
            await self._follow(Conversation(channel, call.caller, created.row))
        return channel.response

    @endpoint("GET", "/v1/sessions/{ref}/attach", scope="sessions", websocket=SOCKET)
    async def attach(self, call: Call[None, None]) -> web.StreamResponse:
        """Follow a session from any offset, with its input (WebSocket)."""
        row = await self._sessions.get(call.caller, call.path("ref"))
        channel = Channel(call)
        async with _talk(channel):
            first = await channel.open(ClientOp.ATTACH)
            await self._sessions.records.note(call.caller, row, "attached", owner=row.owner)
            talk = Conversation(channel, call.caller, row, first.offset or 0, first.tail_bytes)
            await self._follow(talk)
        return channel.response

    @endpoint("GET", "/v1/sessions/{ref}/exec", scope="sessions", websocket=SOCKET)
    async def exec(self, call: Call[None, None]) -> web.StreamResponse:
        """Run one more program in a running session (WebSocket)."""
        row = await self._sessions.get(call.caller, call.path("ref"))
        if row.status != S.RUNNING:
            raise not_running(row)
        channel = Channel(call)
        async with _talk(channel):
            first = await channel.open(ClientOp.EXEC)
            if first.exec is None or not first.exec.argv:
                raise InvalidRequest("exec: the first message has no program.")
            name = program(first.exec.argv)
            await self._sessions.records.note(call.caller, row, "exec_started", program=name)
            await self._exec(channel, row, StartExec(kernel=row.kernel, spec=first.exec))
        return channel.response

    async def _exec(self, channel: Channel, row: SessionRow, request: StartExec) -> None:
        exec_id = ""
        async with self._kernels.open(row, request) as stream:
            async for item in stream:
                if isinstance(item, ExecStarted):
                    exec_id = item.exec_id
        await channel.send(ServerMessage(op=ServerOp.EXEC, exec_id=exec_id))
        ready = asyncio.Event()
        ready.set()
        ended: Ended | None = None

        async def output() -> None:
            nonlocal ended
            log = ReadLog(kernel=row.kernel, exec_id=exec_id, follow=True)
            async with self._kernels.open(row, log) as stream:
                async for item in stream:
                    await _show(channel, item)
                    if isinstance(item, Ended):
                        ended = item

        await self._both(
            output(),
            self._input(channel, lambda: row, ready, Attach(kernel=row.kernel, exec_id=exec_id)),
        )
        await channel.send(ServerMessage(op=ServerOp.END, exec_id=exec_id, ended=ended))
        await channel.close()

    async def _follow(self, talk: Conversation) -> None:
        attach = Attach(kernel=KernelId(talk.row.id, 0))
        await self._both(
            self._session(talk), self._input(talk.channel, lambda: talk.row, talk.begun, attach)
        )
        session = self._sessions.view(talk.row)
        message = ServerMessage(op=ServerOp.END, session=session, ended=session.ended)
        await talk.channel.send(message)
        await talk.channel.close()

    async def _both(self, work: Any, listen: Any) -> None:
        """Until *work* is done; *listen* raises ClientGone when there is nobody to work for."""
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(listen)
            working = tasks.create_task(work)
            working.add_done_callback(lambda _: listening.cancel())

    async def _session(self, talk: Conversation) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell(talk))
            tasks.create_task(self._output(talk))

    async def _tell(self, talk: Conversation) -> None:
        """Send the session at each change, until it has ended."""
        told = 0
        with self._feed.watch(talk.row.id) as watch:
            while True:
                if talk.row.version != told:
                    told = talk.row.version
                    message = ServerMessage(
                        op=ServerOp.SESSION, session=self._sessions.view(talk.row)
                    )
                    await talk.channel.send(message)
                if talk.row.status != S.PENDING:
                    talk.placed.set()
                if talk.row.status in _BEGUN:
                    talk.begun.set()
                if talk.row.status == S.TERMINATED:
                    return
                await watch.wait()
                if self._feed.closing:
                    raise Shutdown("the server is stopping; the session goes on.")
                talk.row = await self._sessions.get(talk.caller, talk.row.id)

    async def _output(self, talk: Conversation) -> None:
        """All output, whatever breaks on the way; a reader's place is its offset."""
        await talk.placed.wait()
        while True:
            if talk.row.held_by is None:
                return  # it was never placed, or its machine is lost
            ended = talk.row.status == S.TERMINATED
            try:
                if await self._read(talk):
                    return
            except (NodeUnavailable, SessionNotRunning, ConnectionError):
                pass
            except (LogGone, NotFound):
                if ended:
                    return
            await self._clock.sleep(REOPEN_S)

    async def _read(self, talk: Conversation) -> bool:
        """One stream, from the place reached; whether it came to the program's end."""
        request = ReadLog(
            kernel=talk.row.kernel,
            offset=talk.offset,
            tail_bytes=talk.tail_bytes,
            follow=True,
            refusals=True,
        )
        told: Callable[[Refusal], Refusal] | None = None
        async with self._kernels.open(talk.row, request) as stream:
            async for item in stream:
                if isinstance(item, Refusal):
                    told = told or await self._kernels.teller(talk.row)
                    item = told(item)
                await _show(talk.channel, item)
                if isinstance(item, LogRecord | LogGap):
                    talk.offset, talk.tail_bytes = item.end, None
                elif isinstance(item, Ended):
                    return True
        return False

    async def _input(
        self,
        channel: Channel,
        row: Callable[[], SessionRow],
        begun: asyncio.Event,
        attach: Attach,
    ) -> None:
        """Pass on what the client sends; the stream is opened with the first of it."""
        item = await self._next_input(channel)
        await begun.wait()
        current = row()
        request = attach if attach.exec_id else Attach(kernel=current.kernel)
        try:
            async with self._kernels.open(current, request) as stream:
                while True:
                    await stream.send(item)
                    item = await self._next_input(channel)
        except (ConnectionError, PlatformError):
            while True:  # the program has ended: nobody reads its input
                await self._next_input(channel)

    async def _next_input(self, channel: Channel) -> StreamItem:
        message = await channel.receive()
        if isinstance(message, bytes):
            return message
        match message.op:
            case ClientOp.DETACH:
                raise ClientGone
            case ClientOp.STDIN_END:
                return StdinEnd()
            case ClientOp.SIGNAL if message.signal is not None and 1 <= message.signal <= 64:
                return Signal(signal=message.signal)
            case ClientOp.RESIZE if _sane(message.rows) and _sane(message.cols):
                assert message.rows is not None and message.cols is not None
                return Resize(rows=message.rows, cols=message.cols)
        raise InvalidRequest(f"message {message.op!r} makes no sense here.")

    # Plain HTTP

    @endpoint(
        "GET",
        "/v1/sessions/{ref}/logs",
        query=LogQuery,
        streams="application/octet-stream",
    )
    async def get_logs(self, call: Call[LogQuery, None]) -> web.StreamResponse:
        """Output, from the start or an offset, as it was written or as frames."""
        row = await self._sessions.get(call.caller, call.path("ref"))
        if row.status == S.TERMINATED:
            kernel_of(row)
        await self._sessions.records.note_reading(call.caller, row, output=True)
        headers = {}
        if (log_end := self._sessions.view(row).log_end) is not None:
            headers["Madang-Log-End"] = str(log_end)
        media_type = "application/octet-stream"
        response = await start_stream(call, media_type, headers=headers)
        row = await self._begun(call, row)
        if row.held_by is not None and row.status in _BEGUN:
            async with self._kernels.open(row, _log_request(row, call.query)) as stream:
                async with watched(call, stream, self._clock):
                    async for item in stream:
                        if isinstance(item, LogRecord) and (data := _chunk(item, call.query)):
                            await response.write(data)
        await response.write_eof()
        return response

    async def _begun(self, call: Call[LogQuery, None], row: SessionRow) -> SessionRow:
        """With ``follow``, wait until there can be output."""
        with self._feed.watch(row.id) as watch:
            while call.query.follow and row.status not in _BEGUN:
                await watch.wait_for(self._clock, 5.0)
                if self._feed.closing or call.request.transport is None:
                    raise ConnectionResetError("the follower has gone, or the server stops")
                row = await self._sessions.get(call.caller, row.id)
        return row


def _sane(value: int | None) -> bool:
    return value is not None and 1 <= value <= 10_000


async def _show(channel: Channel, item: StreamItem) -> None:
    if isinstance(item, LogRecord):
        await channel.send_record(item)
    elif isinstance(item, LogGap):
        await channel.send(ServerMessage(op=ServerOp.GAP, start=item.start, end=item.end))
    elif isinstance(item, Refusal):
        await channel.send(ServerMessage(op=ServerOp.REFUSED, refusal=item))


def _log_request(row: SessionRow, query: LogQuery) -> ReadLog:
    return ReadLog(
        kernel=row.kernel,
        offset=query.offset,
        tail_bytes=query.tail,
        since_us=None if query.since is None else round(query.since * 1_000_000),
        follow=query.follow,
    )


def _chunk(record: LogRecord, query: LogQuery) -> bytes:
    if query.stream is not None and record.stream is not Stream[query.stream.upper()]:
        return b""
    if query.format == "raw":
        return record.data
    return OFFSET.pack(record.offset) + pack(record.stream, record.at_us, record.data)


@asynccontextmanager
async def watched(call: Call[Any, Any], stream: BulkStream, clock: Clock) -> AsyncIterator[None]:
    """Close *stream* if the client goes away while there is nothing to send to it."""

    async def watch() -> None:
        while (transport := call.request.transport) is not None and not transport.is_closing():
            await clock.sleep(2.0)
        await stream.close()

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(watch())
        try:
            yield
        finally:
            task.cancel()


@asynccontextmanager
async def _talk(channel: Channel) -> AsyncIterator[None]:
    """Errors become the last message; a client that has gone is no error."""
    try:
        try:
            yield
        except BaseExceptionGroup as group:
            raise _first(group) from group
    except ClientGone:
        await channel.close()
    except PlatformError as exc:
        if not channel.response.prepared:
            raise
        try:
            await channel.fail(exc)
        except ClientGone:
            pass


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that matters: what is not our own, then what the client should hear."""
    leaves: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        item = todo.pop()
        if isinstance(item, BaseExceptionGroup):
            todo += item.exceptions
        else:
            leaves.append(item)
    return min(leaves, key=lambda e: (isinstance(e, ClientGone), isinstance(e, PlatformError)))
