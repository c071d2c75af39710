"""Serves the bulk streams that a manager opens: output, input, execs, signals, files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from madang.agent.filestreams import serve_files
from madang.agent.keepers import Keepers
from madang.agent.kernel import Kernel
from madang.agent.logs import LOG, LogReader, find_start
from madang.agent.reconcile import Phase
from madang.agent.refusals import Key, Reading, key_of, read_refusals
from madang.agent.runtime.contract import Runtime
from madang.agent.saving import Saver
from madang.agent.watch import Watch, read_ended
from madang.kit.clock import Clock
from madang.kit.ids import new_id
from madang.kit.tasks import TaskSet
from madang.wire.errors import (
    FileFailed,
    InvalidRequest,
    LogGone,
    PlatformError,
    SessionNotRunning,
)
from madang.wire.kernel import KernelId
from madang.wire.link import (
    Attach,
    BulkStream,
    ExecStarted,
    FileRequest,
    ReadLog,
    ReadRefusals,
    Resize,
    SaveLayer,
    SendSignal,
    Signal,
    StartExec,
    StdinEnd,
    StreamRequest,
)
from madang.wire.log import LogGap
from madang.wire.policy import Answer
from madang.wire.session import Ended, Reason

log = logging.getLogger(__name__)

MAX_SIGNAL: Final = 64
_EXEC_ID: Final = re.compile(r"[0-9a-z]{1,40}")


@dataclass(slots=True)
class _ExecWatch:
    watch: Watch
    task: asyncio.Task[None]
    users: int = 0


class Streams:
    """Each stream is served by a task of its own; a slow partner holds up nobody else."""

    def __init__(
        self,
        find: Callable[[KernelId], Awaitable[Kernel]],
        runtime: Runtime,
        keepers: Keepers,
        clock: Clock,
        tasks: TaskSet,
        saver: Saver,
    ) -> None:
        """*find* raises LogGone for a kernel that is not on this node."""
        self._find = find
        self._runtime = runtime
        self._keepers = keepers
        self._clock = clock
        self._tasks = tasks
        self._saver = saver
        self._execs: dict[str, _ExecWatch] = {}

    async def serve(self, request: StreamRequest, stream: BulkStream) -> None:
        """Until the stream's end; failures go to the other end."""
        try:
            await self._dispatch(request, stream)
            await stream.end()
        except PlatformError as exc:
            await stream.fail(exc)
        except ConnectionError:
            await stream.close()
        except asyncio.CancelledError:
            await stream.close()
            raise
        except Exception as exc:
            kind = type(request).__name__
            extra = {"kernel": str(request.kernel), "request": kind}
            log.error("stream failed", extra=extra, exc_info=exc)
            await stream.fail(PlatformError(f"{kind} of {request.kernel} failed on its node."))

    async def _dispatch(self, request: StreamRequest, stream: BulkStream) -> None:
        kernel = await self._find(request.kernel)
        match request:
            case ReadRefusals():
                for refusal in await asyncio.to_thread(read_refusals, kernel.folder()):
                    await stream.send(refusal)
            case ReadLog(follow=True, visit=True):
                with kernel.visited():
                    await _while_open(stream, self._read_log(kernel, request, stream))
            case ReadLog():
                await _while_open(stream, self._read_log(kernel, request, stream))
            case Attach():
                with kernel.visited():
                    await self._attach(kernel, request, stream)
            case StartExec():
                await self._start_exec(kernel, request, stream)
            case SendSignal():
                await self._signal(kernel, request)
            case SaveLayer():
                await stream.send(await self._saver.save(kernel.id, request.limit_bytes))
            case _:
                await self._files(request, stream)

    # --- output

    async def _read_log(self, kernel: Kernel, request: ReadLog, stream: BulkStream) -> None:
        if min(request.offset, request.tail_bytes or 0, request.since_us or 0) < 0:
            raise InvalidRequest("offset, tail and since of a log must not be negative.")
        folder = kernel.folder(_checked(request.exec_id))
        if request.follow:
            await _until_started(kernel)
        async with self._watched(kernel, request, folder) as watch:
            reader = await _reader(folder, request)
            told = _Refusals(folder, watch) if request.refusals else None
            try:
                await _pump(reader, watch, stream, told, follow=request.follow)
            finally:
                reader.close()
        if request.follow:
            await stream.send(await _end_of(kernel, request.exec_id, folder))

    @contextlib.asynccontextmanager
    async def _watched(
        self, kernel: Kernel, request: ReadLog, folder: str
    ) -> AsyncIterator[Watch | None]:
        """Who tells of new output; None where there is nothing to wait for."""
        if not request.follow or (request.exec_id is None and kernel.watch is None):
            yield None
        elif request.exec_id is None:
            yield kernel.watch
        else:
            if not os.path.isdir(folder):
                raise LogGone(f"exec {request.exec_id} of {kernel.id} is not known here.")
            entry = self._execs.get(folder)
            if entry is None:
                watch = Watch(folder, self._keepers, self._clock)
                entry = _ExecWatch(watch, self._tasks.spawn(watch.run(), f"watch:{folder}"))
                self._execs[folder] = entry
            entry.users += 1
            try:
                yield entry.watch
            finally:
                entry.users -= 1
                if entry.users == 0:
                    del self._execs[folder]
                    entry.task.cancel()

    # --- input

    async def _attach(self, kernel: Kernel, request: Attach, stream: BulkStream) -> None:
        if request.exec_id is None:
            await _until_started(kernel)
        writer = await self._keepers.stdin(kernel.folder(_checked(request.exec_id)))
        try:
            async for item in stream:
                if not isinstance(item, bytes | Resize | Signal | StdinEnd):
                    raise InvalidRequest("an attached stream takes input, sizes and signals.")
                item = _in_range(item)
                await kernel.awaken()
                await writer.write(item)
        finally:
            await writer.close()

    async def _start_exec(self, kernel: Kernel, request: StartExec, stream: BulkStream) -> None:
        if not kernel.running:
            raise SessionNotRunning("the session does not run: nothing can be started in it.")
        exec_id = new_id()
        await kernel.awaken()
        with kernel.visited():
            await self._runtime.exec(kernel.id, exec_id, request.spec)
        await stream.send(ExecStarted(exec_id=exec_id))

    async def _signal(self, kernel: Kernel, request: SendSignal) -> None:
        if not 0 < request.signal <= MAX_SIGNAL:
            raise InvalidRequest(f"signal {request.signal} does not exist (1 to {MAX_SIGNAL}).")
        if not kernel.running:
            raise SessionNotRunning("the session does not run: no signal can be sent to it.")
        folder = kernel.folder(_checked(request.exec_id))
        await kernel.awaken()
        await self._keepers.signal(folder, request.signal)

    async def _files(self, request: FileRequest, stream: BulkStream) -> None:
        sock = await self._runtime.files(request.kernel)
        try:
            await serve_files(sock, request, stream)
        except ConnectionError as exc:  # where it was the other end, nobody hears this
            raise FileFailed(f"the file worker of {request.kernel} went away: {exc}.") from exc


async def _reader(folder: str, request: ReadLog) -> LogReader:
    segments = os.path.join(folder, LOG)
    start = request.offset
    if start or request.tail_bytes is not None or request.since_us is not None:
        start = await asyncio.to_thread(
            find_start,
            segments,
            offset=start,
            tail_bytes=request.tail_bytes,
            since_us=request.since_us,
        )
    return LogReader(segments, start)


class _Refusals:
    """Tells each refusal once, as soon as the keeper has told of it."""

    def __init__(self, folder: str, watch: Watch | None) -> None:
        self._reading = Reading(folder)
        self._watch = watch
        self._looked = 0
        self._told: set[Key] = set()

    @property
    def due(self) -> bool:
        return self._watch is not None and self._watch.refusals > self._looked

    async def tell(self, stream: BulkStream, *, at_end: bool = False) -> None:
        """*at_end*: also what nobody told of, because the keeper has left."""
        if not self.due and not at_end:
            return
        if self._watch is not None:
            self._looked = self._watch.refusals
        for refusal in await asyncio.to_thread(self._reading.news):
            if refusal.answer != Answer.LOG and key_of(refusal) not in self._told:
                self._told.add(key_of(refusal))
                await stream.send(refusal)


async def _pump(
    reader: LogReader,
    watch: Watch | None,
    stream: BulkStream,
    refusals: _Refusals | None,
    *,
    follow: bool,
) -> None:
    """Send what there is; with *follow* go on until the program has ended."""
    while True:
        gone = watch is None or watch.gone
        if refusals is not None:
            await refusals.tell(stream)
        news = await reader.read()
        if isinstance(news, LogGap):
            await stream.send(news)
        elif news is not None:
            for record in news:
                await stream.send(record)
        elif gone or watch is None or not follow:
            if refusals is not None:
                await refusals.tell(stream, at_end=True)
            return
        elif not watch.gone and watch.end <= reader.offset and not (refusals and refusals.due):
            await watch.changed.wait()


async def _until_started(kernel: Kernel) -> None:
    while kernel.phase is Phase.INTENDED and not kernel.removed:
        await kernel.changed.wait()


async def _end_of(kernel: Kernel, exec_id: str | None, folder: str) -> Ended:
    """How the program ended: as its keeper wrote it, or as the kernel was settled."""
    if kernel.ended is not None and exec_id is None:
        return kernel.ended
    if (ended := read_ended(folder)) is not None:
        return ended
    while exec_id is None and kernel.ended is None and not kernel.removed:
        await kernel.changed.wait()
    if exec_id is None and kernel.ended is not None:
        return kernel.ended
    return Ended(reason=Reason.LOST, text="nobody saw how it ended")


async def _while_open(stream: BulkStream, work: Coroutine[Any, Any, None]) -> None:
    """Do *work* unless the other end goes away before it is done."""
    task = asyncio.ensure_future(work)
    partner = asyncio.ensure_future(_until_closed(stream))
    try:
        await asyncio.wait((task, partner), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ConnectionError("the other end of the stream has gone")
        task.result()
    finally:
        for each in (task, partner):
            each.cancel()
        await asyncio.gather(task, partner, return_exceptions=True)


async def _until_closed(stream: BulkStream) -> None:
    """Returns when the other end has given the stream up; its plain end changes nothing."""
    try:
        async for _ in stream:
            pass
    except (ConnectionError, PlatformError):
        return
    await asyncio.get_running_loop().create_future()


def _checked(exec_id: str | None) -> str | None:
    """The id becomes part of a path: it must be one of ours."""
    if exec_id is not None and not _EXEC_ID.fullmatch(exec_id):
        raise InvalidRequest(f"{exec_id[:40]!r} is no exec id.")
    return exec_id


def _in_range(item: bytes | Resize | Signal | StdinEnd) -> bytes | Resize | Signal | StdinEnd:
    if isinstance(item, Signal) and not 0 < item.signal <= MAX_SIGNAL:
        raise InvalidRequest(f"signal {item.signal} does not exist (1 to {MAX_SIGNAL}).")
    if isinstance(item, Resize) and not (0 < item.rows < 65536 and 0 < item.cols < 65536):
        raise InvalidRequest("a terminal has 1 to 65535 rows and columns.")
    return item
