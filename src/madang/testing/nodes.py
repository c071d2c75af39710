"""An agent with a test in its manager's place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

from madang.agent.keepers import Keepers
from madang.agent.runtime.contract import Runtime
from madang.agent.runtime.native import NativeRuntime
from madang.agent.runtime.process import ProcessRuntime
from madang.agent.service import Agent
from madang.agent.settings import AgentSettings
from madang.kit.broadcast import Broadcast
from madang.kit.clock import Clock, SystemClock
from madang.kit.link import MemoryManagerEnd, memory_link
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import Launcher
from madang.wire.kernel import (
    Assignment,
    Desired,
    Hello,
    KernelId,
    KernelReport,
    KernelState,
    Wanted,
)
from madang.wire.link import BlobSource, BulkStream, ReadLog, StreamItem, StreamRequest
from madang.wire.log import LogRecord
from madang.wire.session import Ended

_LATER: Final = 1_000_000
"""A revision after all that the manager of an earlier agent used."""


class NodeFolder:
    """A node's state folder, and the launcher that runs on it; None: plain processes."""

    def __init__(self, folder: str, launcher: Launcher | None) -> None:
        self.folder = folder
        self.launcher = launcher
        self.settings = AgentSettings(
            node="n1",
            state_dir=folder,
            disk_reserve_bytes=0,
            heartbeat_s=0.5,
            audit_s=1.0,
            stream_patience_s=0.5,
        )

    def runtime(self) -> Runtime:
        if self.launcher is None:
            return ProcessRuntime(self.folder)
        return NativeRuntime(self.launcher.socket, self.folder, SystemClock())


class NodeUnderTest:
    """Says what is wanted, hears what is."""

    def __init__(
        self,
        settings: AgentSettings,
        runtime: Callable[[], Runtime],
        blobs: BlobSource,
        clock: Clock,
        **more: Any,
    ) -> None:
        """*runtime* makes a new one for each start of the agent; *more* is for ``Agent``."""
        self.settings = settings
        self.reports: dict[KernelId, KernelReport] = {}
        """The newest of each kernel."""
        self.heard: list[KernelReport] = []
        self.heartbeats = 0
        self.hello: Hello | None = None
        self.wanted: dict[KernelId, Assignment] = {}
        self.revision = 0
        self._runtime = runtime
        self._blobs = blobs
        self._clock = clock
        self._more = more
        self._news = Broadcast()
        self._tasks: list[asyncio.Task[None]] = []
        self._greeted: MemoryManagerEnd | None = None
        """The link on which the newest Hello came."""

    # --- life

    async def start(self) -> None:
        runtime = self._runtime()
        self.agent = Agent(self.settings, runtime, self._blobs, self._clock, **self._more)
        await self.agent.open()
        await self.connect()

    async def connect(self) -> None:
        """A new link; the agent is told everything."""
        self.link, theirs = memory_link()
        self._tasks = [
            asyncio.create_task(self.agent.serve(theirs)),
            asyncio.create_task(self._listen(self.link)),
        ]
        await self.until(lambda: self._greeted is self.link)
        await self.tell_all()

    async def disconnect(self) -> None:
        await self.link.close()
        await self.link_ended()

    async def link_ended(self) -> None:
        await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        """The agent goes, what it runs does not."""
        await self.agent.close()
        await self.disconnect()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def _listen(self, link: MemoryManagerEnd) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                message = await link.receive()
                if isinstance(message, Hello):
                    self.hello = message
                    self._greeted = link
                    self._note(message.inventory)
                else:
                    self.heartbeats += 1
                    self._note(message.kernels)
                self._news.notify()

    def _note(self, reports: Iterable[KernelReport]) -> None:
        for report in reports:
            self.reports[report.kernel] = report
            self.heard.append(report)

    # --- what is wanted

    async def tell_all(self) -> None:
        everything = tuple(self.wanted.values())
        await self.link.send(Desired(revision=self.revision, full=True, set=everything))

    async def want(self, *assignments: Assignment) -> None:
        self.revision += 1
        self.wanted |= {each.kernel: each for each in assignments}
        await self.link.send(Desired(revision=self.revision, full=False, set=assignments))

    async def stop_kernel(self, kernel: KernelId, *, grace_s: float = 5.0) -> None:
        old = self.wanted[kernel]
        spec = replace(old.spec, grace_s=grace_s)
        new = replace(old, wanted=Wanted.STOP, stop_reason="user", stop_text="told to", spec=spec)
        await self.want(new)

    async def keep(self, kernel: KernelId) -> None:
        await self.want(replace(self.wanted[kernel], wanted=Wanted.KEEP))

    async def forget(self, *kernels: KernelId) -> None:
        self.revision += 1
        for kernel in kernels:
            self.wanted.pop(kernel, None)
        await self.link.send(Desired(revision=self.revision, full=False, forget=kernels))

    # --- what is

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for news from the agent after which *condition* holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self._news.wait()

    def is_in(self, kernel: KernelId, state: KernelState) -> bool:
        return kernel in self.reports and self.reports[kernel].state is state

    async def running(self, kernel: KernelId) -> KernelReport:
        await self.until(lambda: kernel in self.reports and self._has_started(kernel))
        report = self.reports[kernel]
        assert report.state is KernelState.RUNNING, report
        return report

    def _has_started(self, kernel: KernelId) -> bool:
        return self.reports[kernel].state is not KernelState.PREPARING

    async def ended(self, kernel: KernelId) -> Ended:
        await self.until(lambda: self.is_in(kernel, KernelState.ENDED))
        ended = self.reports[kernel].ended
        assert ended is not None
        return ended

    # --- streams

    async def open(self, request: StreamRequest) -> BulkStream:
        return await self.link.open(request)

    async def items(self, request: StreamRequest) -> list[StreamItem]:
        """All that a stream answers."""
        stream = await self.open(request)
        async with asyncio.timeout(PATIENCE_S):
            return [item async for item in stream]

    async def first_output(self, kernel: KernelId) -> bytes:
        """What it writes first, once it has."""
        stream = await self.open(ReadLog(kernel=kernel, follow=True))
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for item in stream:
                    if isinstance(item, LogRecord):
                        return item.data
        finally:
            await stream.close()
        raise AssertionError(f"{kernel} has ended without a word")

    async def output(self, kernel: KernelId, exec_id: str | None = None) -> bytes:
        """Followed to its end."""
        items = await self.items(ReadLog(kernel=kernel, exec_id=exec_id, follow=True))
        assert isinstance(items[-1], Ended)
        return b"".join(item.data for item in items if isinstance(item, LogRecord))


@asynccontextmanager
async def node(
    runtime: Callable[[], Runtime],
    settings: AgentSettings,
    blobs: BlobSource,
    *,
    clock: Clock | None = None,
    keepers: Keepers | None = None,
    wanted: Iterable[Assignment] = (),
) -> AsyncIterator[NodeUnderTest]:
    """A node for a test, told *wanted*; afterwards all its kernels are removed."""
    found = NodeUnderTest(settings, runtime, blobs, clock or SystemClock(), keepers=keepers)
    found.wanted = {each.kernel: each for each in wanted}
    found.revision = _LATER if found.wanted else 0
    await found.start()
    try:
        yield found
    finally:
        try:
            await found.forget(*found.wanted)
            await _until_removed(found)
        finally:
            await found.stop()


async def _until_removed(found: NodeUnderTest) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while found.agent.kernels:
            await found.agent.kernels_changed.wait()
