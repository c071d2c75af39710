"""The agent: makes this node be as the manager wants it, and says what is.

One link at a time; sessions do not depend on it. What the manager wants is level-triggered: the
newest desired state is all that counts, an end is reported until the manager's desired state shows
that it knows, and nothing depends on one message arriving.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from madang.agent.audit import Audit
from madang.agent.build import BuildHook
from madang.agent.capacity import capacity, facts_as_text, place_as_text
from madang.agent.host import HostMeter
from madang.agent.journal import Journal, Record, boot_id, ensure_folder
from madang.agent.keepers import Keepers, SocketKeepers
from madang.agent.kernel import Kernel, Surroundings, found_record, new_record
from madang.agent.layers import LayerStore
from madang.agent.meter import Meter
from madang.agent.names import Names
from madang.agent.reconcile import Phase
from madang.agent.runtime.contract import Found, Runtime, RuntimeFacts
from madang.agent.saving import Saver
from madang.agent.settings import AgentSettings
from madang.agent.streams import Streams
from madang.agent.warmth import WarmMeter
from madang.kit.broadcast import Broadcast
from madang.kit.clock import Clock
from madang.kit.tasks import TaskSet
from madang.wire.errors import LogGone, StorageFull
from madang.wire.kernel import Assignment, Desired, Hello, HostLoad, KernelId, Reports
from madang.wire.link import AgentEnd, BlobSource

log = logging.getLogger(__name__)

_LAYER_NAME: Final = 64


class Agent:
    """One per node. ``open``, then ``serve`` for each link, one after the other, then ``close``."""

    def __init__(
        self,
        settings: AgentSettings,
        runtime: Runtime,
        blobs: BlobSource,
        clock: Clock,
        *,
        hook: BuildHook | None = None,
        keepers: Keepers | None = None,
    ) -> None:
        self.settings = settings
        self._runtime = runtime
        self._blobs = blobs
        self._clock = clock
        self._hook = hook
        self._keepers: Keepers = keepers or SocketKeepers()
        self._tasks = TaskSet()
        self._kernels: dict[KernelId, Kernel] = {}
        self._attempts: defaultdict[str, list[Kernel]] = defaultdict(list)
        """The same by session: ended kernels are kept by the thousand."""
        self._later: dict[KernelId, Assignment] = {}
        """Assigned again under another nonce: started once the former one is removed."""
        self._due: dict[KernelId, float] = {}
        """Reports to be sent, and when."""
        self._report_due = asyncio.Event()
        self.kernels_changed = Broadcast()
        """Some were assigned, or have ended, or were removed."""
        self._synced = False
        self._link: AgentEnd | None = None
        self._meter = Meter(settings, runtime, clock, lambda: list(self._kernels.values()))
        self._audit = Audit(runtime, clock, settings.audit_s, self._kernels, self._meet)
        self._names = Names(clock, self._kernels.values)
        self._host = HostMeter()
        self._warm = WarmMeter(runtime, clock, settings.heartbeat_s)
        saver = Saver(runtime, LayerStore(settings.layers, clock))
        self._streams = Streams(self._find, runtime, self._keepers, clock, self._tasks, saver)

    @property
    def kernels(self) -> Mapping[KernelId, Kernel]:
        """All that is not removed."""
        return self._kernels

    # --- life

    async def open(self) -> None:
        """Read the journal, adopt what runs, go on with what was begun."""
        ensure_folder(self.settings.journal)
        boot = self.settings.boot_id or boot_id()
        self._journal = Journal(self.settings.journal, boot, self._clock.now())
        try:
            self._facts: RuntimeFacts = await self._runtime.open()
            if self._hook is not None:
                await self._hook.open()
            await self._adopt()
        except BaseException:
            await self.close()
            raise
        self._meter.start()
        self._audit.start()
        self._names.start()
        self._warm.start()
        for kernel in list(self._kernels.values()):
            kernel.wake()

    async def _adopt(self) -> None:
        around = Surroundings(
            settings=self.settings,
            runtime=self._runtime,
            journal=self._journal,
            blobs=self._blobs,
            clock=self._clock,
            keepers=self._keepers,
            names=self._names,
            hook=self._hook,
            tasks=self._tasks,
            confirmed=lambda: self._synced,
            rival=self._has_rival,
            touched=self._touch,
            left=self._left,
        )
        self._around = around
        found = {each.kernel: each for each in await self._runtime.adopt()}
        records = {record.kernel: record for record in self._journal.records()}
        for each in found.values():
            records.setdefault(each.kernel, found_record(each))
        for record in records.values():
            kernel = self._add(record)
            kernel.recover(found.get(kernel.id), rebooted=self._journal.boot_changed)
            await self._reopen_build(kernel)

    def _add(self, record: Record) -> Kernel:
        kernel = self._kernels[record.kernel] = Kernel(record, self._around)
        self._attempts[record.kernel.session].append(kernel)
        return kernel

    async def _reopen_build(self, kernel: Kernel) -> None:
        spec = kernel.assignment.spec if kernel.assignment is not None else None
        if spec is not None and spec.build and kernel.running and self._hook is not None:
            await self._hook.before_start(kernel.id, spec)

    async def close(self) -> None:
        """Let go of everything; what runs goes on."""
        if self._link is not None:
            await self._link.close()
        await self._meter.stop()
        await self._audit.stop()
        await self._names.stop()
        await self._warm.stop()
        await self._tasks.close()
        if self._hook is not None:
            await self._hook.close()
        await self._runtime.close()
        self._journal.close()

    # --- link

    async def serve(self, link: AgentEnd) -> None:
        """Until the link ends. A newer link ends an older one."""
        former, self._link = self._link, link
        if former is not None:
            await former.close()
        try:
            await link.send(self._hello())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(link))
                group.create_task(self._send_reports(link))
                group.create_task(self._accept(link, group))
        except* ConnectionError as exc:
            log.info("link ended", extra={"error": str(exc.exceptions[0])})
        finally:
            if self._link is link:
                self._link = None
            await link.close()

    def _hello(self) -> Hello:
        kernels = [kernel for kernel in self._kernels.values() if kernel.assignment is not None]
        return Hello(
            node=self.settings.node,
            incarnation=self._journal.incarnation,
            capacity=capacity(self.settings, self._facts, self._held_disk()),
            facts=facts_as_text(self._facts) | place_as_text(self.settings),
            inventory=tuple(kernel.report() for kernel in kernels),
            layers=tuple(_layer_names(self.settings.layers)),
            revision=self._journal.revision,
        )

    def _held_disk(self) -> int:
        """Bytes of the disk that kernels use at present: promised to them, so not missing."""
        reports = [kernel.report() for kernel in self._kernels.values()]
        used = (r.usage.disk_bytes if r.usage else None for r in reports)
        kept = (r.ended.disk_used_bytes if r.ended else None for r in reports)
        return sum(bytes_ or 0 for bytes_ in (*used, *kept))

    async def _accept(self, link: AgentEnd, group: asyncio.TaskGroup) -> None:
        while True:
            request, stream = await link.accept()
            group.create_task(
                self._streams.serve(request, stream), name=f"stream:{type(request).__name__}"
            )

    async def _find(self, kernel_id: KernelId) -> Kernel:
        """A stream may overtake the assignment of its kernel: wait for it a little."""
        deadline = self._clock.monotonic() + self.settings.stream_patience_s
        while (kernel := self._kernels.get(kernel_id)) is None:
            left = deadline - self._clock.monotonic()
            if left <= 0:
                raise LogGone(f"kernel {kernel_id} is not on node {self.settings.node} (any more).")
            await self._clock.wait(self.kernels_changed.next(), left)
        return kernel

    # --- desired state

    async def _receive(self, link: AgentEnd) -> None:
        begun = False
        while True:
            desired = await link.receive()
            if self._is_news(desired, begun=begun):
                begun = True
                self._take_in(desired)

    def _is_news(self, desired: Desired, *, begun: bool) -> bool:
        """Whether to follow it.

        The manager's counter is durable and only grows, so what is older than anything seen, on
        whatever link, comes from the past: following it could end what was started since. On each
        link a full list comes first, and it may repeat what is known.
        """
        last = self._journal.revision
        if desired.full:
            news = desired.revision >= last
        else:
            news = begun and desired.revision > last
        if not news:
            log.warning(
                "desired state ignored",
                extra={"revision": desired.revision, "last": last, "full": desired.full},
            )
        return news

    def _take_in(self, desired: Desired) -> None:
        """Journal the intent, then wake whom it concerns."""
        changed = [kernel for each in desired.set if (kernel := self._assign(each)) is not None]
        named = {each.kernel for each in desired.set}
        unwanted = self._kernels.keys() - named if desired.full else set(desired.forget)
        for kernel_id in unwanted:
            self._later.pop(kernel_id, None)
            kernel = self._kernels.get(kernel_id)
            if kernel is not None and kernel.phase is not Phase.REMOVING:
                kernel.forget()
                changed.append(kernel)
        self._save(changed, desired.revision)
        first, self._synced = not self._synced, self._synced or desired.full
        for kernel in list(self._kernels.values()) if first else changed:
            kernel.wake()
        self.kernels_changed.notify()
        self._report_due.set()
        if desired.full and desired.keep_layers is not None and self._hook is not None:
            self._collect(desired.keep_layers)

    def _assign(self, assignment: Assignment) -> Kernel | None:
        """The kernel that it changes, if any."""
        kernel = self._kernels.get(assignment.kernel)
        if kernel is None:
            kernel = self._add(new_record(assignment))
        elif kernel.phase is Phase.REMOVING:
            self._later[kernel.id] = assignment
            return None
        elif kernel.assignment == assignment:
            return None
        elif kernel.assignment is not None and kernel.assignment.nonce != assignment.nonce:
            self._later[kernel.id] = assignment
            kernel.forget()
        else:
            kernel.assign(assignment)
        return kernel

    def _save(self, kernels: Iterable[Kernel], revision: int) -> None:
        try:
            self._journal.save([kernel.record() for kernel in kernels], revision)
        except StorageFull as exc:  # stops need no journal; starts look at ``unsaved``
            log.error("journal not written", extra={"error": exc.text})
            for kernel in kernels:
                kernel.unsaved = True

    def _collect(self, keep: Iterable[str]) -> None:
        assert self._hook is not None
        wanted = set(keep)
        for kernel in self._kernels.values():
            if kernel.assignment is not None:
                image = kernel.assignment.spec.image
                wanted.update(image.layers, image.offers)
        self._tasks.spawn(self._hook.collect(wanted), "collect layers")

    def _meet(self, found: Found) -> None:
        """A kernel that neither the journal nor the manager named until now."""
        kernel = self._add(found_record(found))
        kernel.recover(found, rebooted=False)
        kernel.wake()

    # --- what kernels tell

    def _has_rival(self, kernel: Kernel) -> bool:
        return any(
            other.may_run
            for other in self._attempts.get(kernel.id.session, ())
            if other is not kernel
        )

    def _left(self, kernel: Kernel) -> None:
        if kernel.removed and self._kernels.get(kernel.id) is kernel:
            del self._kernels[kernel.id]
            self._attempts[kernel.id.session].remove(kernel)
            self._due.pop(kernel.id, None)
            if (assignment := self._later.pop(kernel.id, None)) is not None:
                self._take_in_later(assignment)
        self.kernels_changed.notify()
        for other in list(self._attempts[kernel.id.session]):
            other.wake()
        if not self._attempts[kernel.id.session]:
            del self._attempts[kernel.id.session]

    def _take_in_later(self, assignment: Assignment) -> None:
        kernel = self._assign(assignment)
        if kernel is not None:
            self._save([kernel], self._journal.revision)
            kernel.wake()

    def _touch(self, kernel: Kernel, within_s: float) -> None:
        due = self._clock.monotonic() + within_s
        self._due[kernel.id] = due if within_s == 0 else self._due.get(kernel.id, due)
        self._report_due.set()
        self._meter.wake()

    # --- reports

    async def _send_reports(self, link: AgentEnd) -> None:
        heartbeat_at = self._clock.monotonic()
        while True:
            self._report_due.clear()
            now = self._clock.monotonic()
            heartbeat = now >= heartbeat_at
            if heartbeat:
                heartbeat_at = now + self.settings.heartbeat_s
            kernels = self._to_report(now, heartbeat=heartbeat)
            if kernels or heartbeat:
                reports = tuple(kernel.report() for kernel in kernels)
                await link.send(
                    Reports(
                        node=self.settings.node,
                        incarnation=self._journal.incarnation,
                        kernels=reports,
                        load=self._load() if heartbeat else None,
                    )
                )
            wake_at = min([heartbeat_at, *self._due.values()])
            await self._clock.wait(self._report_due, max(0.0, wake_at - self._clock.monotonic()))

    def _load(self) -> HostLoad:
        return replace(self._host.load(), warm=self._warm.seen)

    def _to_report(self, now: float, *, heartbeat: bool) -> list[Kernel]:
        """What changed; with a heartbeat everything that the manager does not know for good."""
        due = [kernel_id for kernel_id, at in self._due.items() if at <= now]
        for kernel_id in due:
            del self._due[kernel_id]
        if heartbeat:
            return [kernel for kernel in self._kernels.values() if not kernel.known]
        return [self._kernels[kernel_id] for kernel_id in due if kernel_id in self._kernels]


def _layer_names(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if len(name) == _LAYER_NAME)
    except FileNotFoundError:
        return []
