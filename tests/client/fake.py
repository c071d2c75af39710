"""A server for tests of clients: the HTTP API over real sockets, programs as real child processes.

It keeps everything in memory and has switches for bad days: connections cut, answers delayed,
restarts on the same port, errors of choice. What a real server does is tested with the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import io
import os
import pty
import signal
import tarfile
import termios
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import WSMsgType, web

from madang.kit.codec import from_json, to_json
from madang.kit.ids import new_id, new_name
from madang.kit.languages import Languages
from madang.wire.api import (
    ClientMessage,
    ClientOp,
    Defaults,
    Event,
    Page,
    Problem,
    ServerInfo,
    ServerMessage,
    ServerOp,
    StopRequest,
    WorkspaceManifest,
    WorkspaceState,
)
from madang.wire.errors import (
    FileMissing,
    IdempotencyMismatch,
    ImageUnknown,
    NotFound,
    PlatformError,
    SessionNotRunning,
    Unauthenticated,
    WorkspaceIncomplete,
)
from madang.wire.image import BuildRequest, Image, ImageKind, ImageStatus
from madang.wire.kernel import ExecSpec
from madang.wire.link import FileEntry
from madang.wire.log import LogRecord, Stream
from madang.wire.log import pack as pack_record
from madang.wire.paths import from_wire, to_wire
from madang.wire.people import WhoAmI
from madang.wire.queue import Why
from madang.wire.session import (
    Ended,
    HistoryEntry,
    Phase,
    Reason,
    Result,
    Session,
    SessionKind,
    SessionSpec,
    SessionStatus,
)
from madang.wire.size import GIB, MIB, Size

TOKEN = "mdg_test"


@dataclass
class Program:
    """One process with its output as a log."""

    process: asyncio.subprocess.Process
    tty: int | None
    records: list[LogRecord] = field(default_factory=list)
    grown: asyncio.Condition = field(default_factory=asyncio.Condition)
    ended: Ended | None = None
    started_at: float = field(default_factory=time.time)

    @property
    def end(self) -> int:
        return self.records[-1].end if self.records else 0

    async def add(self, stream: Stream, data: bytes) -> None:
        async with self.grown:
            record = LogRecord(self.end, int(time.time() * 1e6), stream, data)
            self.records.append(record)
            self.grown.notify_all()


@dataclass
class Job:
    """A session."""

    session: Session
    spec: SessionSpec
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    program: Program | None = None
    history: list[HistoryEntry] = field(default_factory=list)
    stopped: bool = False


class FakeServer:
    """``start`` and ``stop`` may be called again and again; the port stays."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        """What sessions have as their root: ``work`` and ``outputs`` lie below it."""
        self.port = 0
        self.jobs: dict[str, Job] = {}
        self.programs: list[Program] = []
        self.keys: dict[str, tuple[bytes, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, WorkspaceManifest] = {}
        self.images: dict[str, Image] = {}
        self.events: list[Event] = []
        self.requests: list[str] = []
        """``METHOD path`` of each request."""
        self.messages: list[ClientMessage] = []
        self.cut_after: int | None = None
        """Cut the next stream or log answer after this many bytes of output."""
        self.fail_next: list[PlatformError] = []
        """Raised by the next requests, in order."""
        self.hold = threading.Event()
        self.hold.set()
        """While cleared, sessions stay PENDING."""
        self._closing = False
        self.thinks_s = 0.0
        """How long it takes until its first word about a run."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-server")
        self._thread.start()
        self._runner: web.AppRunner | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._do(self._start())

    def stop(self) -> None:
        """Cut all connections and stop listening; programs go on."""
        self._do(self._stop())

    def close(self) -> None:
        self.hold.set()
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def session(self, name: str) -> Session:
        return self._find(name).session

    def _do(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 * MIB, middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/v1/health", self._health),
                web.get("/v1/info", self._info),
                web.get("/v1/languages", self._languages),
                web.get("/v1/whoami", self._whoami),
                web.get("/v1/sessions", self._list),
                web.post("/v1/sessions", self._create),
                web.post("/v1/queue/preview", self._preview),
                web.get("/v1/sessions/{ref}", self._get),
                web.delete("/v1/sessions/{ref}", self._delete),
                web.post("/v1/sessions/{ref}/stop", self._stop_session),
                web.post("/v1/sessions/{ref}/freeze", self._freeze),
                web.post("/v1/sessions/{ref}/thaw", self._freeze),
                web.post("/v1/sessions/{ref}/signal", self._signal),
                web.get("/v1/sessions/{ref}/history", self._history),
                web.get("/v1/sessions/{ref}/logs", self._logs),
                web.get("/v1/run", self._run),
                web.get("/v1/sessions/{ref}/attach", self._attach),
                web.get("/v1/sessions/{ref}/exec", self._exec),
                web.get("/v1/sessions/{ref}/files", self._files),
                web.get("/v1/sessions/{ref}/file", self._read_file),
                web.put("/v1/sessions/{ref}/file", self._write_file),
                web.get("/v1/sessions/{ref}/archive", self._read_archive),
                web.put("/v1/sessions/{ref}/archive", self._write_archive),
                web.post("/v1/workspaces", self._workspace),
                web.put("/v1/workspaces/blobs", self._put_blobs),
                web.get("/v1/images", self._list_images),
                web.post("/v1/images", self._build),
                web.get("/v1/images/{name}", self._image),
                web.delete("/v1/images/{name}", self._remove_image),
                web.get("/v1/events", self._events),
                web.get("/v1/nodes", self._nodes),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is not None:
            for connection in list(self._runner.server.connections if self._runner.server else []):
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    async def _close(self) -> None:
        await self._stop()
        for job in self.jobs.values():
            job.stopped = True
        self._closing = True
        for program in self.programs:
            if program.ended is None:
                _kill(program)
        for _ in range(3):
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=5)
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Requests

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        try:
            if self.fail_next:
                raise self.fail_next.pop(0)
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Unauthenticated("no valid token.")
            return await handler(request)
        except PlatformError as exc:
            return web.Response(
                body=to_json(_problem(exc)),
                status=exc.http_status,
                content_type="application/problem+json",
                headers={"Retry-After": "0.01"},
            )

    def _find(self, ref: str) -> Job:
        for job in self.jobs.values():
            if ref in {job.session.id, job.session.name} or job.session.name.startswith(ref):
                return job
        raise NotFound(f"no session {ref!r}.")

    def _of(self, request: web.Request) -> Job:
        return self._find(request.match_info["ref"])

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _languages(self, request: web.Request) -> web.Response:
        return _json(Languages().all())

    async def _info(self, _: web.Request) -> web.Response:
        defaults = Defaults(
            cpu=1,
            mem_bytes=GIB,
            pids=256,
            disk_bytes=10 * GIB,
            time_s=None,
            workspace_limit_bytes=GIB,
            log_limit_bytes=GIB,
        )
        info = ServerInfo(
            version="0",
            api="v1",
            node_count=1,
            database="memory",
            state="/",
            runtimes=("native",),
            defaults=defaults,
        )
        return _json(info)

    async def _whoami(self, _: web.Request) -> web.Response:
        return _json(WhoAmI(user="admin", role="admin", token="first"))

    async def _nodes(self, _: web.Request) -> web.Response:
        return _json([])

    async def _list(self, request: web.Request) -> web.Response:
        jobs = list(self.jobs.values())
        if not request.query.get("all"):
            jobs = [job for job in jobs if job.session.status is not SessionStatus.TERMINATED]
        start, size = int(request.query.get("cursor", "0")), int(request.query.get("limit", "2"))
        items = tuple(job.session for job in jobs[start : start + size])
        following = str(start + size) if start + size < len(jobs) else None
        return _json(Page(items=items, next=following))

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.read()
        spec = from_json(SessionSpec, body)
        if request.query.get("dry_run"):
            return _json(self._new(spec).session)
        job = self._make(spec, request.headers["Idempotency-Key"], body)
        return _json(job.session, status=201)

    async def _preview(self, request: web.Request) -> web.Response:
        from_json(SessionSpec, await request.read())
        return _json(Why(name="", group="default", node="n1"))

    async def _get(self, request: web.Request) -> web.Response:
        job = self._of(request)
        version = int(request.query.get("version", "-1"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(float(request.query.get("wait", "0"))), job.changed:
                await job.changed.wait_for(lambda: job.session.version != version)
        return _json(job.session)

    async def _delete(self, request: web.Request) -> web.Response:
        job = self._of(request)
        del self.jobs[job.session.id]
        return web.Response(status=204)

    async def _stop_session(self, request: web.Request) -> web.Response:
        job = self._of(request)
        body = from_json(StopRequest, await request.read())
        job.stopped = True
        program = job.program
        if program is not None and program.ended is None:
            number = signal.SIGKILL if body.grace_s == 0 else signal.SIGTERM
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.process.pid, number)
        return _json(job.session)

    async def _freeze(self, request: web.Request) -> web.Response:
        job = self._of(request)
        if job.session.status is not SessionStatus.RUNNING:
            raise SessionNotRunning(f"session {job.session.name} is {job.session.status}.")
        since = time.time() if request.path.endswith("/freeze") else None
        job.session = replace(job.session, frozen_since=since)
        return _json(job.session)

    async def _signal(self, request: web.Request) -> web.Response:
        program = self._of(request).program
        assert program is not None
        program.process.send_signal((await request.json())["signal"])
        return web.Response(status=204)

    async def _history(self, request: web.Request) -> web.Response:
        return _json(self._of(request).history)

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        job, query = self._of(request), request.query
        response = web.StreamResponse()
        await response.prepare(request)
        offset = int(query.get("offset", "0"))
        since_us = float(query.get("since", "0")) * 1e6
        follow = bool(query.get("follow"))
        program = job.program
        if program is None:
            return response
        if tail := query.get("tail"):
            offset = max(offset, program.end - int(tail))
        sent = 0
        async for record in self._records(program, offset, follow=follow):
            if record.at_us < since_us:
                continue
            data = _frame(record)
            if self.cut_after is not None and sent + len(data) > self.cut_after:
                await response.write(data[: self.cut_after - sent])
                self.cut_after = None
                assert request.transport is not None
                request.transport.abort()
                return response
            sent += len(data)
            await response.write(data)
        return response

    # Streams

    async def _run(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        try:
            first = from_json(ClientMessage, await socket.receive_str())
            self.messages.append(first)
            assert first.op is ClientOp.RUN and first.spec is not None and first.key is not None
            job = self._make(first.spec, first.key, to_json(first.spec))
        except PlatformError as exc:
            await socket.send_str(_text(op=ServerOp.ERROR, error=_problem(exc)))
            return socket
        await self._talk(request, socket, job, 0)
        return socket

    async def _attach(self, request: web.Request) -> web.WebSocketResponse:
        job = self._of(request)
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        first = from_json(ClientMessage, await socket.receive_str())
        self.messages.append(first)
        offset = first.offset or 0
        if first.tail_bytes is not None and job.program is not None:
            offset = max(0, job.program.end - first.tail_bytes)
        await self._talk(request, socket, job, offset)
        return socket

    async def _exec(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        first = from_json(ClientMessage, await socket.receive_str())
        self.messages.append(first)
        assert first.exec is not None
        program = await self._launch(first.exec)
        await socket.send_str(_text(op=ServerOp.EXEC, exec_id="e1"))
        reader = self._loop.create_task(self._read(socket, program))
        try:
            async for record in self._records(program, 0, follow=True):
                await socket.send_bytes(_frame(record))
            await socket.send_str(_text(op=ServerOp.END, ended=program.ended))
        finally:
            reader.cancel()
        return socket

    async def _talk(
        self, request: web.Request, socket: web.WebSocketResponse, job: Job, offset: int
    ) -> None:
        reader: asyncio.Task[None] | None = None
        sent = 0
        try:
            await asyncio.sleep(self.thinks_s)
            await socket.send_str(_text(op=ServerOp.SESSION, session=job.session))
            while job.program is None and job.session.status is not SessionStatus.TERMINATED:
                async with job.changed:
                    if job.session.status is SessionStatus.PENDING:
                        await job.changed.wait()
                await socket.send_str(_text(op=ServerOp.SESSION, session=job.session))
            if job.program is not None:
                reader = self._loop.create_task(self._read(socket, job.program))
                async for record in self._records(job.program, offset, follow=True):
                    data = _frame(record)
                    sent += len(data)
                    if self.cut_after is not None and sent > self.cut_after:
                        self.cut_after = None
                        assert request.transport is not None
                        request.transport.abort()
                        return
                    await socket.send_bytes(data)
            async with job.changed:
                await job.changed.wait_for(lambda: job.session.status is SessionStatus.TERMINATED)
            await socket.send_str(_text(op=ServerOp.END, session=job.session))
            await socket.close()
        except ConnectionError:
            pass
        finally:
            if reader is not None:
                reader.cancel()

    async def _read(self, socket: web.WebSocketResponse, program: Program) -> None:
        async for message in socket:
            if message.type is WSMsgType.BINARY:
                await self._stdin(program, message.data)
            elif message.type is WSMsgType.TEXT:
                told = from_json(ClientMessage, message.data)
                self.messages.append(told)
                if told.op is ClientOp.SIGNAL and told.signal is not None:
                    program.process.send_signal(told.signal)
                elif told.op is ClientOp.STDIN_END and program.process.stdin is not None:
                    program.process.stdin.close()
                elif told.op is ClientOp.RESIZE and program.tty is not None:
                    termios.tcsetwinsize(program.tty, (told.rows or 0, told.cols or 0))
                    program.process.send_signal(signal.SIGWINCH)

    async def _stdin(self, program: Program, data: bytes) -> None:
        if program.tty is not None:
            await asyncio.to_thread(os.write, program.tty, data)
        elif program.process.stdin is not None:
            program.process.stdin.write(data)
            with contextlib.suppress(ConnectionError):
                await program.process.stdin.drain()

    async def _records(self, program: Program, offset: int, *, follow: bool) -> Any:
        at = 0
        while True:
            for record in program.records[at:]:
                at += 1
                if record.offset >= offset:
                    yield record
            async with program.grown:
                if at < len(program.records):
                    continue
                if not follow or program.ended is not None:
                    return
                await program.grown.wait()

    # Sessions

    def _new(self, spec: SessionSpec) -> Job:
        if spec.image != "host" and spec.image not in self.images:
            raise ImageUnknown(f"no image {spec.image!r}.")
        if spec.workspace is not None and spec.workspace not in self.manifests:
            raise WorkspaceIncomplete("the working directory is not here any more.")
        asked = spec.size
        size = Size(
            cpu=asked.cpu or 1.0,
            mem_bytes=asked.mem_bytes or GIB,
            pids=asked.pids or 256,
            disk_bytes=asked.disk_bytes or 10 * GIB,
            time_s=asked.time_s,
        )
        now = time.time()
        session = Session(
            id=new_id(),
            name=spec.name or new_name(),
            kind=SessionKind.RUN if spec.argv else SessionKind.IDLE,
            owner="admin",
            status=SessionStatus.PENDING,
            result=None,
            image=spec.image,
            image_digest="",
            argv=spec.argv,
            argv_encoding=spec.argv_encoding,
            size=size,
            env=spec.env,
            tty=spec.tty,
            stdin=spec.stdin,
            labels=spec.labels,
            node="here",
            attempt=1,
            created_at=now,
            started_at=None,
            ended_at=None,
            status_since=now,
            deadline=None,
            status_owner="scheduler",
            pending=None,
            ended=None,
            phases=(),
            runtime="",
            enforced={"mem": "cgroup"},
            warnings=(),
            usage=None,
            log_end=None,
            version=1,
        )
        return Job(session, spec)

    def _make(self, spec: SessionSpec, key: str, body: bytes) -> Job:
        if key in self.keys:
            known, session_id = self.keys[key]
            if known != body:
                raise IdempotencyMismatch("another body came with this key.")
            return self.jobs[session_id]
        job = self._new(spec)
        self.keys[key] = body, job.session.id
        self.jobs[job.session.id] = job
        self._note(job, None, SessionStatus.PENDING)
        self._spawn(self._live(job))
        return job

    async def _live(self, job: Job) -> None:
        while not self.hold.is_set() and not job.stopped:
            await asyncio.sleep(0.01)
        if job.stopped and job.program is None:
            await self._move(job, SessionStatus.TERMINATED, result=Result.CANCELLED)
            return
        begun = time.time()
        job.program = await self._launch(job.spec)
        phases = (Phase(name="queue", started_at=job.session.created_at, ended_at=begun),)
        await self._move(job, SessionStatus.RUNNING, started_at=time.time(), phases=phases)
        ended = await self._over(job.program)
        if job.stopped:
            ended = replace(ended, reason=Reason.USER, text="stopped by admin")
        result = Result.SUCCESS if ended.exit_code == 0 else Result.FAILURE
        result = Result.CANCELLED if job.stopped else result
        end = job.program.end
        await self._move(job, SessionStatus.TERMINATED, result=result, ended=ended, log_end=end)

    async def _over(self, program: Program) -> Ended:
        async with program.grown:
            await program.grown.wait_for(lambda: program.ended is not None)
        assert program.ended is not None
        return program.ended

    async def _move(self, job: Job, status: SessionStatus, **changes: Any) -> None:
        async with job.changed:
            source = job.session.status
            version = job.session.version + 1
            changes["status_since"] = time.time()
            job.session = replace(job.session, status=status, version=version, **changes)
            self._note(job, source, status)
            job.changed.notify_all()

    def _note(self, job: Job, source: SessionStatus | None, target: SessionStatus) -> None:
        entry = HistoryEntry(
            at=time.time(), source=source, target=target, actor="scheduler", cause=""
        )
        job.history.append(entry)
        event = Event(
            id=len(self.events) + 1,
            at=entry.at,
            kind="session.moved",
            object=job.session.name,
            payload={"status": target.value},
        )
        self.events.append(event)

    async def _launch(self, spec: SessionSpec | ExecSpec) -> Program:
        argv = [arg.encode(spec.argv_encoding) for arg in spec.argv] or [b"sleep", b"1000"]
        env = {**os.environ, **spec.env}
        cwd = os.path.join(self.folder, "work")
        if not spec.tty:
            feed = asyncio.subprocess.PIPE if spec.stdin else asyncio.subprocess.DEVNULL
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=feed,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
            program = Program(process, None)
            self._keep(program)
            self._spawn(self._collect(program))
            return program
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (spec.rows, spec.cols))
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY),
        )
        os.close(theirs)
        program = Program(process, ours)
        self._keep(program)
        self._spawn(self._collect_tty(program))
        return program

    def _keep(self, program: Program) -> None:
        self.programs.append(program)
        if self._closing:  # it was being started meanwhile
            _kill(program)

    async def _collect(self, program: Program) -> None:
        async def drain(reader: asyncio.StreamReader, stream: Stream) -> None:
            while data := await reader.read(16 * 1024):
                await program.add(stream, data)

        process = program.process
        assert process.stdout is not None and process.stderr is not None
        await asyncio.gather(
            drain(process.stdout, Stream.STDOUT), drain(process.stderr, Stream.STDERR)
        )
        await self._finish(program)

    async def _collect_tty(self, program: Program) -> None:
        assert program.tty is not None
        while True:
            try:
                data = await asyncio.to_thread(os.read, program.tty, 16 * 1024)
            except OSError:
                break
            if not data:
                break
            await program.add(Stream.STDOUT, data)
        await self._finish(program)
        os.close(program.tty)

    async def _finish(self, program: Program) -> None:
        code = await program.process.wait()
        number = -code if code < 0 else None
        async with program.grown:
            program.ended = Ended(
                reason=Reason.SIGNAL if number else Reason.EXIT,
                exit_code=128 + number if number else code,
                signal=number,
                text=f"ended by signal {number}" if number else "",
                at=time.time(),
                duration_s=time.time() - program.started_at,
                cpu_s=0.01,
                mem_peak_bytes=5 * MIB,
            )
            program.grown.notify_all()

    # Files

    def _path(self, request: web.Request) -> bytes:
        inside = from_wire(request.query["path"])
        return os.fsencode(self.folder) + b"/" + inside.lstrip(b"/")

    async def _files(self, request: web.Request) -> web.Response:
        path = self._path(request)
        entries = []
        if not os.path.lexists(path):
            raise FileMissing(f"{path!r}: no such file.")
        names = sorted(os.listdir(path)) if os.path.isdir(path) else [b""]
        for name in names:
            whole = os.path.join(path, name) if name else path
            seen = os.lstat(whole)
            entry = FileEntry(
                path=to_wire(os.path.basename(whole)),
                kind="dir" if os.path.isdir(whole) else "file",
                size_bytes=seen.st_size,
                mode=seen.st_mode & 0o777,
                modified_at=seen.st_mtime,
            )
            entries.append(entry)
        return _json(entries)

    async def _read_file(self, request: web.Request) -> web.StreamResponse:
        with open(self._path(request), "rb") as file:
            data = file.read()
        wanted = request.http_range
        return web.Response(body=data[wanted], status=206 if "Range" in request.headers else 200)

    async def _write_file(self, request: web.Request) -> web.Response:
        data = await request.read()
        with open(self._path(request), "wb") as file:
            file.write(data)
        os.chmod(self._path(request), int(request.query["mode"]))
        return web.Response(status=204)

    async def _read_archive(self, request: web.Request) -> web.Response:
        path = self._path(request)
        if not os.path.lexists(path):
            raise FileMissing(f"{path!r}: no such file.")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in sorted(os.listdir(path)) if os.path.isdir(path) else [b""]:
                whole = os.path.join(path, name) if name else path
                tar.add(os.fsdecode(whole), os.fsdecode(os.path.basename(whole)))
        return web.Response(body=buffer.getvalue())

    async def _write_archive(self, request: web.Request) -> web.Response:
        data = await request.read()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            # What Debian's 3.11 does, and later ones warn of unless it is chosen.
            tar.extraction_filter = lambda member, _path: member
            tar.extractall(os.fsdecode(self._path(request)))
        return web.Response(status=204)

    async def _workspace(self, request: web.Request) -> web.Response:
        body = await request.read()
        manifest = from_json(WorkspaceManifest, body)
        digest = hashlib.sha256(body).hexdigest()
        self.manifests[digest] = manifest
        wanted = {file.digest for file in manifest.files if file.digest}
        return _json(WorkspaceState(digest=digest, missing=tuple(sorted(wanted - set(self.blobs)))))

    async def _put_blobs(self, request: web.Request) -> web.Response:
        data = await request.read()
        while data:
            digest, size = data[:32].hex(), int.from_bytes(data[32:40], "little")
            blob, data = data[40 : 40 + size], data[40 + size :]
            assert hashlib.sha256(blob).hexdigest() == digest
            self.blobs[digest] = blob
        return web.Response(status=204)

    # Images and events

    async def _list_images(self, _: web.Request) -> web.Response:
        return _json(list(self.images.values()))

    async def _image(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.images:
            raise ImageUnknown(f"no image {name!r}.")
        return _json(self.images[name])

    async def _remove_image(self, request: web.Request) -> web.Response:
        self.images.pop(request.match_info["name"], None)
        return web.Response(status=204)

    async def _build(self, request: web.Request) -> web.Response:
        body = await request.read()
        asked = from_json(BuildRequest, body)
        script = "echo resolve; echo layer; sleep ${SLEEP:-0}; exit ${CODE:-0}"
        spec = SessionSpec(argv=("sh", "-c", script), env=asked.labels)
        job = self._make(spec, request.headers["Idempotency-Key"], body)
        self.images[asked.name] = Image(
            name=asked.name,
            digest="d" * 64,
            kind=ImageKind.LAYERS,
            status=ImageStatus.READY,
            requirements=asked.requirements,
            size_bytes=18 * MIB,
            python="3.11",
            build=job.session.name,
        )
        return _json(job.session, status=202)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        at = int(request.headers.get("Last-Event-ID", "0"))
        while True:
            for event in self.events[at:]:
                at = event.id
                data = to_json(event)
                await response.write(b"id: %d\ndata: %s\n\n" % (event.id, data))
                if self.cut_after is not None:
                    self.cut_after = None
                    assert request.transport is not None
                    request.transport.abort()
                    return response
            await asyncio.sleep(0.01)


def _kill(program: Program) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.process.pid, signal.SIGKILL)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=to_json(value), status=status, content_type="application/json")


def _text(**fields: Any) -> str:
    return to_json(ServerMessage(**fields)).decode()


def _frame(record: LogRecord) -> bytes:
    return record.offset.to_bytes(8, "little") + pack_record(
        record.stream, record.at_us, record.data
    )


def _problem(error: PlatformError) -> Problem:
    return Problem(
        type=f"urn:madang:error:{error.code}",
        title=type(error).__name__,
        status=error.http_status,
        detail=error.text,
        code=error.code,
        retry=error.retry.value,
        details=error.details,
    )
