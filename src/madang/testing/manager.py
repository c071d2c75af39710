"""A whole manager over real HTTP, and an agent that does what the test tells it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import aiohttp
from aiohttp import web

from madang.kit.clock import Clock, SystemClock
from madang.kit.link import MemoryAgentEnd, MemoryStream, memory_link
from madang.kit.tasks import TaskSet
from madang.manager.app import Manager, ManagerSettings
from madang.manager.http import Site
from madang.manager.identity import store as identity
from madang.manager.session.types import Blobs
from madang.testing.patience import PATIENCE_S
from madang.wire.api import WorkspaceManifest
from madang.wire.errors import NotFound, PlatformError
from madang.wire.kernel import (
    Assignment,
    Capacity,
    Desired,
    Hello,
    HostLoad,
    KernelId,
    KernelReport,
    KernelState,
    Reports,
    Wanted,
)
from madang.wire.link import Attach, ReadLog, ReadRefusals, SendSignal, StreamItem, StreamRequest
from madang.wire.log import LogRecord, Stream
from madang.wire.policy import Refusal
from madang.wire.session import Ended, Reason

CAPACITY: Final = Capacity(cpu=4, mem_bytes=8 << 30, disk_bytes=100 << 30, pids=10_000)
SUCCESS: Final = Ended(reason=Reason.EXIT, exit_code=0, duration_s=0.5)

Serve = Callable[[StreamRequest, MemoryStream], Awaitable[None]]


class NoBlobs:
    """A blob store for tests that send no working directory."""

    def __init__(self) -> None:
        self.complete_digests: set[str] = set()
        self.stored: dict[str, bytes] = {}

    async def missing(self, digests: Any) -> list[str]:
        return [digest for digest in digests if digest not in self.stored]

    async def put(self, digest: str, size: int, chunks: AsyncIterator[bytes]) -> None:
        data = b"".join([chunk async for chunk in chunks])
        assert len(data) == size
        self.stored[digest] = data

    async def put_manifest(self, manifest: WorkspaceManifest) -> str:
        self.complete_digests.add("0" * 64)
        return "0" * 64

    async def complete(self, digest: str) -> bool:
        return digest in self.complete_digests


@dataclass(slots=True)
class Output:
    """A kernel's log, as the scripted agent holds it."""

    records: list[LogRecord] = field(default_factory=list)
    ended: Ended | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class ScriptedAgent:
    """One node. Does nothing by itself but note what it is told and serve output.

    ``auto``: runs what is assigned to its end at once.
    """

    def __init__(self, node: str = "n1", capacity: Capacity = CAPACITY) -> None:
        self.node: Final = node
        self.capacity = capacity
        self.facts = {"kernel": "6.1"}
        self.incarnation = 0
        self.revision = 0
        self.auto = False
        self.wanted: dict[KernelId, Assignment] = {}
        self.forgotten: list[KernelId] = []
        self.messages: list[Desired] = []
        self.outputs: dict[KernelId, Output] = {}
        self.refusals: dict[KernelId, list[Refusal]] = {}
        self.received: dict[KernelId, list[StreamItem]] = {}
        self.requests: list[StreamRequest] = []
        self.serve: Serve | None = None
        self._end: MemoryAgentEnd | None = None
        self._changed = asyncio.Event()

    async def run(self, end: MemoryAgentEnd, inventory: tuple[KernelReport, ...] = ()) -> None:
        """Until the link ends."""
        self._end = end
        self.incarnation += 1
        await end.send(
            Hello(
                node=self.node,
                incarnation=self.incarnation,
                revision=self.revision,
                capacity=self.capacity,
                facts=self.facts,
                inventory=inventory,
            )
        )
        tasks = TaskSet()
        tasks.spawn(self._accept(end, tasks), "accept")
        try:
            while True:
                await self._take(await end.receive())
        except ConnectionError:
            pass
        finally:
            await tasks.close()

    async def _take(self, message: Desired) -> None:
        self.messages.append(message)
        assert message.revision > self.revision or message.full, "revisions only grow"
        self.revision = message.revision
        if message.full:
            self.wanted.clear()
        self.wanted.update((a.kernel, a) for a in message.set)
        for kernel in message.forget:
            self.wanted.pop(kernel, None)
            self.forgotten.append(kernel)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self.auto:
            for assignment in message.set:
                await self._live(assignment)

    async def _live(self, assignment: Assignment) -> None:
        if assignment.wanted is Wanted.RUN and assignment.kernel not in self.outputs:
            await self.running(assignment)
            self.write(assignment.kernel, b"hello\n")
            await self.ended(assignment)
        elif assignment.wanted is Wanted.STOP:
            await self.ended(assignment, Ended(reason=Reason.USER, exit_code=143))

    async def until(self, ready: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Wait for messages until *ready*."""
        async with asyncio.timeout(timeout_s):
            while not ready():
                await self._changed.wait()

    async def assigned(self, session_id: str, wanted: Wanted = Wanted.RUN) -> Assignment:
        """The assignment of a session, once it is as wanted."""

        def find() -> Assignment | None:
            found = (a for k, a in self.wanted.items() if k.session == session_id)
            return next((a for a in found if a.wanted is wanted), None)

        await self.until(lambda: find() is not None)
        found = find()
        assert found is not None
        return found

    async def report(self, assignment: Assignment, state: KernelState, **fields: Any) -> None:
        await self.send(
            KernelReport(kernel=assignment.kernel, nonce=assignment.nonce, state=state, **fields)
        )

    async def send(self, *reports: KernelReport, load: HostLoad | None = None) -> None:
        assert self._end is not None
        message = Reports(node=self.node, incarnation=self.incarnation, kernels=reports, load=load)
        await self._end.send(message)

    async def preparing(self, assignment: Assignment) -> None:
        await self.report(assignment, KernelState.PREPARING)

    async def running(self, assignment: Assignment, **fields: Any) -> None:
        self.outputs.setdefault(assignment.kernel, Output())
        fields.setdefault("started_at", time.time())
        await self.report(assignment, KernelState.RUNNING, **fields)

    async def ended(self, assignment: Assignment, ended: Ended = SUCCESS, **fields: Any) -> None:
        output = self.outputs.setdefault(assignment.kernel, Output())
        output.ended = ended
        output.notify()
        await self.report(assignment, KernelState.ENDED, ended=ended, **fields)

    def write(self, kernel: KernelId, data: bytes, stream: Stream = Stream.STDOUT) -> None:
        """The program prints."""
        output = self.outputs.setdefault(kernel, Output())
        offset = output.records[-1].end if output.records else 0
        output.records.append(LogRecord(offset, time.time_ns() // 1000, stream, data))
        output.notify()

    async def disconnect(self) -> None:
        assert self._end is not None
        await self._end.close()

    async def _accept(self, end: MemoryAgentEnd, tasks: TaskSet) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                request, stream = await end.accept()
                self.requests.append(request)
                tasks.spawn(self._answer(request, stream), "stream")

    async def _answer(self, request: StreamRequest, stream: MemoryStream) -> None:
        try:
            await (self.serve or self._serve)(request, stream)
        except PlatformError as exc:
            await stream.fail(exc)
        except ConnectionError:
            pass
        else:
            await stream.end()

    async def _serve(self, request: StreamRequest, stream: MemoryStream) -> None:
        match request:
            case ReadLog():
                await self._read_log(request, stream)
            case ReadRefusals(kernel=kernel):
                for refusal in self.refusals.get(kernel, ()):
                    await stream.send(refusal)
            case Attach(kernel=kernel):
                async for item in stream:
                    self.received.setdefault(kernel, []).append(item)
            case SendSignal():
                pass
            case _:
                raise NotFound("the scripted agent does not serve that")

    async def _read_log(self, request: ReadLog, stream: MemoryStream) -> None:
        if request.kernel not in self.outputs:
            raise NotFound(f"no kernel {request.kernel}")
        output, at = self.outputs[request.kernel], request.offset
        while True:
            changed = output.changed
            for record in [r for r in output.records if r.offset >= at]:
                await stream.send(record)
                at = record.end
            if not request.follow:
                return
            if output.ended is not None:
                await stream.send(output.ended)
                return
            await changed.wait()


@dataclass(slots=True)
class ManagerBox:
    """A manager with its HTTP server and an authenticated client."""

    manager: Manager
    http: aiohttp.ClientSession
    url: str
    token: str
    blobs: NoBlobs
    _tasks: TaskSet

    def connect(self, agent: ScriptedAgent, inventory: tuple[KernelReport, ...] = ()) -> None:
        """Link an agent; it says hello."""
        ours, theirs = memory_link()
        self._tasks.spawn(self.manager.serve_agent(ours), "serve")
        self._tasks.spawn(agent.run(theirs, inventory), "agent")

    async def add_agent(self, agent: ScriptedAgent | None = None) -> ScriptedAgent:
        """Link an agent and wait until it was told what to run."""
        agent = agent or ScriptedAgent()
        told = len(agent.messages)
        self.connect(agent)
        await agent.until(lambda: len(agent.messages) > told)
        return agent

    async def call(
        self, method: str, path: str, body: Any = None, *, status: int | None = None, **kw: Any
    ) -> Any:
        """The decoded answer; *status*: what it must be (2xx if not given)."""
        async with self.http.request(method, path, json=body, **kw) as response:
            data = await response.read()
            if status is None:
                assert response.ok, (response.status, data)
            else:
                assert response.status == status, (response.status, data)
            if "json" in response.content_type:
                return await response.json(content_type=None)
            return data

    async def until(self, ref: str, status: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The session once it has *status*."""
        async with asyncio.timeout(timeout_s):
            found: dict[str, Any] = await self.call("GET", f"/v1/sessions/{ref}")
            while found["status"] != status:
                query = f"?wait=5&version={found['version']}"
                found = await self.call("GET", f"/v1/sessions/{ref}{query}")
        return found

    async def new_user(self, name: str) -> dict[str, str]:
        """An ordinary user; the headers of their requests."""
        token = f"mdg_of-{name}"
        digest = hashlib.sha256(token.encode()).hexdigest()
        async with self.manager.database.begin() as tx:
            await identity.add_user(
                tx, user_id=name, name=name, role="user", project_id="default", created_at=0
            )
            await identity.add_token(
                tx, token_id=name, user_id=name, name="t", digest=digest, created_at=0
            )
        return {"Authorization": f"Bearer {token}"}

    async def stop_links(self) -> None:
        await self.manager.fleet.close()


@asynccontextmanager
async def manager_box(
    settings: ManagerSettings, clock: Clock | None = None, blobs: Blobs | None = None
) -> AsyncIterator[ManagerBox]:
    """Open, served on loopback, and closed again."""
    stand_in = NoBlobs()
    if clock is None:  # Scripted agents have no heartbeat, and a busy machine takes its time.
        settings = replace(settings, fleet=replace(settings.fleet, lost_after_s=10 * PATIENCE_S))
    manager = Manager(settings, blobs or stand_in, clock or SystemClock())
    tasks = TaskSet()
    await manager.open()
    try:
        secret = await manager.ensure_admin() or await manager.new_admin_token("test")
        runner = web.AppRunner(manager.web_app(), access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        try:
            await Site(runner, socket.create_server(("127.0.0.1", 0))).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            headers = {"Authorization": f"Bearer {secret.reveal()}"}
            async with aiohttp.ClientSession(url, headers=headers) as http:
                yield ManagerBox(manager, http, url, secret.reveal(), stand_in, tasks)
        finally:
            await runner.cleanup()
    finally:
        await manager.close()
        await tasks.close()
