"""One kernel's life on this node: look, decide (``reconcile``), act, one step at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from madang.agent import freezing
from madang.agent.build import BuildHook
from madang.agent.files import materialise
from madang.agent.guarding import UNKNOWN, Guarding
from madang.agent.journal import Journal, Record
from madang.agent.keepers import Keepers
from madang.agent.logs import LOG, end_offset
from madang.agent.names import Names
from madang.agent.reconcile import Actual, Phase, Step, plan
from madang.agent.refusals import Counting, were_any
from madang.agent.runtime.contract import Found, Prepared, Runtime, Started
from madang.agent.settings import AgentSettings
from madang.agent.watch import Watch
from madang.kit.broadcast import Broadcast
from madang.kit.clock import Clock
from madang.kit.codec import from_json
from madang.kit.tasks import TaskSet, is_cancelled
from madang.wire.api import WorkspaceManifest
from madang.wire.errors import (
    Conflict,
    HostLacks,
    ImageUnknown,
    LauncherUnavailable,
    PlatformError,
    PolicyInvalid,
    RuntimeFailed,
    SessionNotRunning,
    StorageFull,
)
from madang.wire.image import ImageKind
from madang.wire.kernel import (
    Activity,
    Assignment,
    Guarded,
    KernelReport,
    KernelSpec,
    KernelState,
    Wanted,
)
from madang.wire.link import BlobSource
from madang.wire.session import Ended, Reason, Usage
from madang.wire.size import format_bytes

log = logging.getLogger(__name__)

MAIN: Final = "main"
_REFUSALS_WITHIN_S: Final = 1.0
"""How late the manager may hear of numbers; streams tell of refusals at once."""
_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 10.0
_KILL_AGAIN_S: Final = 5.0
_SETTLE_TRIES: Final = 4
_START_TRIES: Final = 3
"""Most failures of a launcher (a process killed, none to be had) are over at the next try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all kernels of an agent share."""

    settings: AgentSettings
    runtime: Runtime
    journal: Journal
    blobs: BlobSource
    clock: Clock
    keepers: Keepers
    names: Names
    hook: BuildHook | None
    tasks: TaskSet
    confirmed: Callable[[], bool]
    """Whether a full list came since the agent started."""
    rival: Callable[[Kernel], bool]
    """Whether another attempt of the kernel's session may be alive here."""
    touched: Callable[[Kernel, float], None]
    """Its report changed; to be sent within the seconds given."""
    left: Callable[[Kernel], None]
    """It has ended or is removed."""


@dataclass(frozen=True, slots=True)
class StopOrder:
    reason: str
    text: str
    grace_s: float


class Kernel:
    """Owns one worker task, which exists only while there is something to do."""

    def __init__(self, record: Record, around: Surroundings) -> None:
        self.id: Final = record.kernel
        self.assignment = record.assignment
        self.phase = record.phase
        self.changed = Broadcast()
        """Phase, assignment or removal."""
        self.watch: Watch | None = None
        self.usage: Usage | None = None
        self.condemned: StopOrder | None = None
        self.removed = False
        self.unsaved = False
        """The journal could not take the intent; nothing starts before it can."""
        self._around = around
        self._clock = around.clock
        self._report = record.report
        self._gone = False
        self._reached = False
        """The runtime may know of it."""
        self._was_asked = False
        """Its program may run already: its files are left alone."""
        self._settled = record.phase is Phase.ENDED
        self._failure: Ended | None = None
        self._since: float | None = None
        self._sent: StopOrder | None = None
        self._kill_at = float("inf")
        self._frost = freezing.follow(freezing.reported(self._report), self.assignment)
        self._may_be_frozen = False
        self._stopping = False
        self._inputs = self._visits = self._clients = 0
        self._activity = freezing.Activity(self._clock.monotonic(), self._clock.monotonic())
        self._guarding: Final = Guarding()
        self._counting = False
        self._counts: Counting | None = None
        self._tries = 0
        self._start_tries = 0
        self._worker: asyncio.Task[None] | None = None
        self._steps: Final[dict[Step, Callable[[], Coroutine[Any, Any, None]]]] = {
            Step.START: self._start,
            Step.GUARD: self._guard,
            Step.FREEZE: self._freeze,
            Step.THAW: self._thaw,
            Step.STOP: self._stop,
            Step.SETTLE: self._settle,
            Step.ABANDON: self._abandon,
            Step.REMOVE: self._remove,
        }

    # --- what it is

    @property
    def may_run(self) -> bool:
        """Whether a program of it may be alive."""
        return self._reached and not self._settled and not self.removed

    @property
    def settled(self) -> bool:
        """It has ended, and nothing of it may be alive."""
        return self._settled

    @property
    def ended(self) -> Ended | None:
        return self._report.ended

    @property
    def running(self) -> bool:
        return self.phase is Phase.RUNNING and not self._gone

    @property
    def freeze_order(self) -> int:
        """Revision of the newest order to freeze or thaw that it has taken in."""
        return self._frost.revision

    @property
    def known(self) -> bool:
        """The manager knows all there is to know."""
        return self.assignment is None or self.assignment.wanted is Wanted.KEEP

    def folder(self, exec_id: str | None = None) -> str:
        """Where output and keeper socket of the main program or an exec lie."""
        return os.path.join(self._around.runtime.kernel_dir(self.id), "io", exec_id or MAIN)

    def report(self) -> KernelReport:
        """What is, now."""
        log_end = self._report.log_end
        if self.watch is not None and self.phase is Phase.RUNNING:
            log_end = self.watch.end
        used = Activity(inputs=self._inputs, visits=self._visits, clients=self._clients)
        return replace(self._report, usage=self.usage, log_end=log_end, activity=used)

    def record(self) -> Record:
        return Record(
            kernel=self.id, phase=self.phase, assignment=self.assignment, report=self._report
        )

    # --- what happens to it

    def assign(self, assignment: Assignment) -> None:
        """The manager's newest word; the caller journals, then wakes."""
        self.assignment = assignment
        self._report = replace(self._report, nonce=assignment.nonce)
        self._frost = freezing.follow(before := self._frost, assignment)
        if self._frost.revision != before.revision:
            self._report = replace(self._report, freeze_error="")

    def forget(self) -> None:
        """It is not wanted any more; the caller journals, then wakes."""
        self.phase = Phase.REMOVING

    def condemn(self, reason: Reason, text: str) -> None:
        """End it now: it is over a limit that only the agent watches."""
        if self.condemned is None:
            self.condemned = StopOrder(reason.value, text, 0.0)
            self.wake()

    async def awaken(self) -> None:
        """Somebody talks to its programs; returns once they hear.

        They stay awake until the next order, or until they have been left alone.
        """
        self._inputs += 1
        self._activity = freezing.touched(self._activity, self._clock.monotonic())
        if not self._may_be_frozen and not self._frost.frozen:
            return
        self._frost = freezing.woken(self._frost)
        self.wake()
        while self.running and self._may_be_frozen and not self._frost.frozen:
            await self.changed.wait()

    @contextlib.contextmanager
    def visited(self) -> Iterator[None]:
        """While a client follows or feeds it."""
        self._visits += 1
        self._clients += 1
        try:
            yield
        finally:
            self._clients -= 1

    def measured(self, usage: Usage) -> None:
        """Its newest figures; freezes it where it has rested for as long as the settings say."""
        self.usage = usage
        now, limit_s = self._clock.monotonic(), self._around.settings.freeze_idle_after_s
        self._activity = freezing.observe(self._activity, usage, now)
        if limit_s is not None and now - self._activity.since >= limit_s:
            self.leave_alone()

    def leave_alone(self) -> None:
        """Freeze it, if it waits for people."""
        spec = None if self.assignment is None else self.assignment.spec
        if self._frost.frozen or self._report.freeze_error:
            return
        if spec is not None and freezing.waits_for_people(spec):
            self._frost = freezing.left_alone(self._frost)
            self.wake()

    def renew_rules(self) -> None:
        """Give the runtime its live rules again: what they mean has changed."""
        self._guarding.renew()
        self.wake()

    def found_frozen(self, frozen: bool) -> None:
        """What the runtime sees; it may have changed without our doing."""
        if frozen != self._may_be_frozen and self.running and self._worker is None:
            self._may_be_frozen = frozen
            self.wake()

    def recover(self, found: Found | None, *, rebooted: bool) -> None:
        """Compare with what the runtime found after a restart of the agent."""
        self._reached = not self._settled
        if found is not None and found.running:
            self._report = replace(self._report, enforced=found.enforced)
            self._recover_frost(found)
            if self.phase is Phase.INTENDED:
                self._report = replace(self._report, guarded=UNKNOWN)
                self._enter_running(found.started_at)
            if self.phase is Phase.RUNNING:
                self._open_watch()
            return
        if self.phase is Phase.INTENDED and not rebooted and (found is None or not found.ended):
            # A start that our former self asked for may be under way: asking again tells.
            self._was_asked = found is not None and found.started_at is not None
        elif self.phase in {Phase.INTENDED, Phase.RUNNING}:
            self.phase = Phase.RUNNING
            self._gone = True

    def _recover_frost(self, found: Found) -> None:
        """What is counts for more than what was journalled; an order not yet followed for most."""
        since = self._report.frozen_since or self._clock.now()
        self._report = replace(self._report, frozen_since=since if found.frozen else None)
        self._may_be_frozen = found.frozen
        self._frost = freezing.follow(freezing.reported(self._report), self.assignment)

    def lose(self) -> None:
        """Its program has ended, or its keeper is away."""
        self._gone = True
        self.wake()

    def wake(self) -> None:
        """Look again whether there is something to do."""
        self.changed.notify()
        if self._worker is None and self._next() is not Step.REST:
            self._worker = self._around.tasks.spawn(self._work(), f"kernel:{self.id}")

    def _next(self) -> Step:
        if self.removed:
            return Step.REST
        actual = Actual(
            phase=self.phase,
            gone=self._gone,
            condemned=self.condemned is not None,
            failed=self._failure is not None,
            confirmed=self._around.confirmed(),
            rival=self._around.rival(self),
            stopping=self._stopping,
            freeze=self._frost.frozen,
            frozen=self._known_frozen(),
            stale=self._guarding.stale(self.assignment, self._report),
        )
        return plan(None if self.assignment is None else self.assignment.wanted, actual)

    def _known_frozen(self) -> bool | None:
        """None where the runtime, or the manager, has to be told once more."""
        told = freezing.reported(self._report)
        if told != freezing.Frost(self._may_be_frozen, self._frost.revision):
            return None
        return told.frozen

    async def _work(self) -> None:
        pause, last = _PAUSE_S, ""
        try:
            while (step := self._next()) is not Step.REST:
                try:
                    await self._steps[step]()
                    pause, last = _PAUSE_S, ""
                except Exception as exc:
                    if is_cancelled():
                        raise asyncio.CancelledError from exc
                    level = logging.WARNING if repr(exc) != last else logging.DEBUG
                    trace = None if isinstance(exc, PlatformError) else exc
                    extra = {"kernel": str(self.id), "step": step.value, "error": str(exc)}
                    log.log(level, "kernel step failed", extra=extra, exc_info=trace)
                    last = repr(exc)
                    await self._clock.wait(self.changed.next(), pause)
                    pause = min(pause * 2, _MAX_PAUSE_S)
        finally:
            self._worker = None

    # --- steps

    async def _start(self) -> None:
        assert self.assignment is not None
        if self._since is None:
            self._since = self._clock.monotonic()
            self._around.touched(self, self._around.settings.preparing_after_s)
        timings: dict[str, float] = {}
        try:
            self._check()
            self._reached = True
            ready = None if self._needs_nothing() else await self._make_ready(timings)
            asked = self.assignment
            spec = self._equipped(await self._around.names.filled(asked.spec))
            if self._next() is not Step.START:
                return
            first, self._was_asked = not self._was_asked, True
            async with _timed(self._clock, timings, "sandbox"):
                if ready is None:
                    prepared, started = await self._around.runtime.run(self.id, spec)
                else:
                    prepared, started = ready, await self._around.runtime.start(self.id, spec)
            guarded = Guarded(live=asked.live) if first else UNKNOWN
            self._report = replace(self._report, guarded=guarded)
        except LauncherUnavailable as exc:
            waited = self._clock.monotonic() - self._since
            if waited < self._around.settings.start_patience_s:
                raise
            self._fail(Reason.START_FAILED, exc)
        except RuntimeFailed as exc:
            self._start_tries += 1
            if self._start_tries < _START_TRIES:
                raise
            self._fail(Reason.START_FAILED, exc)
        except ImageUnknown as exc:
            self._fail(Reason.IMAGE_MISSING, exc)
        except PlatformError as exc:
            self._fail(Reason.START_FAILED, exc)
        else:
            self._started(prepared, started, timings)

    def _check(self) -> None:
        """Refuse what can't work, before anything is made."""
        assert self.assignment is not None
        settings, spec = self._around.settings, self.assignment.spec
        disk = os.statvfs(settings.state_dir)
        free = disk.f_bavail * disk.f_frsize
        if free < settings.disk_reserve_bytes:
            raise StorageFull(
                f"only {format_bytes(free)} are free under {settings.state_dir}; "
                f"{format_bytes(settings.disk_reserve_bytes)} are kept in reserve. "
                "Remove sessions (madang rm) or free space."
            )
        for digest in spec.image.layers:
            if not os.path.isdir(os.path.join(settings.layers, digest)):
                raise ImageUnknown(
                    f"image {spec.image.name!r}: layer {digest[:12]} is not on node "
                    f"{settings.node}. Build the image again."
                )
        if self.unsaved:
            self._around.journal.save([self.record()])

    def _needs_nothing(self) -> bool:
        """Between ``prepare`` and ``start`` there is nothing to do."""
        assert self.assignment is not None
        spec = self.assignment.spec
        return spec.workspace is None and not spec.build

    def _equipped(self, spec: KernelSpec) -> KernelSpec:
        """With what a build in a root of its own takes from its environment."""
        hook = self._around.hook
        if not spec.build or hook is None or spec.image.kind != ImageKind.ROOT:
            return spec
        return replace(spec, env={**hook.environment(), **spec.env})

    async def _make_ready(self, timings: dict[str, float]) -> Prepared:
        assert self.assignment is not None
        spec, around = self.assignment.spec, self._around
        async with _timed(self._clock, timings, "prepare"):
            prepared = await around.runtime.prepare(self.id, await around.names.filled(spec))
        if spec.workspace is not None and not self._was_asked:
            async with _timed(self._clock, timings, "workspace"):
                await self._while_wanted(self._put_workspace(spec.workspace))
        if spec.build and around.hook is not None:
            await self._while_wanted(around.hook.before_start(self.id, spec))
        return prepared

    async def _put_workspace(self, digest: str) -> None:
        path = await self._around.blobs.fetch(digest)
        manifest = from_json(WorkspaceManifest, await asyncio.to_thread(_read, path))
        sock = await self._around.runtime.files(self.id)
        try:
            await materialise(sock, manifest, self._around.blobs.fetch)
        except OSError as exc:
            raise RuntimeFailed(f"the working directory can't be put in place: {exc}.") from exc

    async def _while_wanted(self, work: Coroutine[Any, Any, None]) -> None:
        """Await *work*, but give it up as soon as the kernel is not to be started any more."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done() and self._next() is Step.START:
                await _either(task, self.changed.wait())
            if task.done():
                await task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, PlatformError):
                await task

    def _started(self, prepared: Prepared, started: Started, timings: dict[str, float]) -> None:
        if self.phase is Phase.REMOVING:  # forgotten while the start was under way: final
            return
        self._report = replace(
            self._report,
            enforced=dict(prepared.enforced),
            warnings=prepared.warnings,
            timings_ms={**timings, **started.timings_ms},
        )
        self._enter_running(started.at)
        self._open_watch()
        self._around.touched(self, 0.0)
        self.changed.notify()
        self._save()

    def _enter_running(self, at: float | None) -> None:
        self.phase = Phase.RUNNING
        self._report = replace(self._report, state=KernelState.RUNNING, started_at=at)

    def _open_watch(self) -> None:
        self.watch = Watch(self.folder(), self._around.keepers, self._clock)
        follow = self.watch.run(self.lose, self._be_stopping, self._hear_of_refusals)
        self._around.tasks.spawn(follow, f"watch:{self.id}")

    def _hear_of_refusals(self) -> None:
        if not self._counting:
            self._counting = True
            self._around.tasks.spawn(self._count_refusals(), f"refusals:{self.id}")

    async def _count_refusals(self) -> None:
        """Until all that the keeper told of is counted."""
        try:
            counted = -1
            while self.watch is not None and counted < self.watch.refusals:
                counted = self.watch.refusals
                await self._count_once()
        finally:
            self._counting = False

    async def _count_once(self) -> None:
        if self._counts is None:
            self._counts = Counting(self.folder())
        refused = await asyncio.to_thread(self._counts.now)
        self._report = replace(self._report, refused=refused)
        self._around.touched(self, _REFUSALS_WITHIN_S)

    def _be_stopping(self) -> None:
        self._stopping = True
        self.wake()

    async def _guard(self) -> None:
        assert self.assignment is not None
        try:
            around = self._around
            guarded = await self._guarding.tell(
                around.runtime, around.names, self.assignment, self._report.guarded
            )
        except Conflict:  # it has ended: its watch tells
            await self._clock.wait(self.changed.next(), _PAUSE_S)
            return
        except PolicyInvalid as exc:
            text = "stopped: its changed sandbox policy, with rules of its own, can't be kept"
            self.condemn(Reason.GUARD, f"{text}: {exc.text}")
            return
        self._report = replace(self._report, guarded=guarded)
        self.changed.notify()
        self._around.touched(self, 0.0)
        self._save()

    async def _freeze(self) -> None:
        revision, self._may_be_frozen = self._frost.revision, True
        try:
            await self._around.runtime.freeze(self.id)
        except Conflict:  # it has ended: its watch tells
            await self._clock.wait(self.changed.next(), _PAUSE_S)
        except (HostLacks, RuntimeFailed) as exc:
            if self._frost == freezing.Frost(True, revision):
                self._frost = freezing.woken(self._frost)
                self._report = replace(self._report, freeze_error=exc.text)
        else:
            self._froze(revision, self._report.frozen_since or self._clock.now())

    async def _thaw(self) -> None:
        revision = self._frost.revision
        try:
            await self._around.runtime.thaw(self.id)
        except Conflict:
            await self._clock.wait(self.changed.next(), _PAUSE_S)
        else:
            self._may_be_frozen = False
            self._activity = freezing.touched(self._activity, self._clock.monotonic())
            self._froze(revision, None)

    def _froze(self, revision: int, since: float | None) -> None:
        """The runtime has done it: tell whoever waits, then the manager, then the journal."""
        self._report = replace(self._report, frozen_since=since, freeze_revision=revision)
        self.changed.notify()
        self._around.touched(self, 0.0)
        self._save()

    async def _stop(self) -> None:
        order = self._stop_order()
        if order != self._sent:
            self._sent = order
            due = self._clock.monotonic() + order.grace_s + self._around.settings.kill_margin_s
            self._kill_at = min(self._kill_at, due)
            with contextlib.suppress(SessionNotRunning):  # then its watch tells the end
                await self._around.keepers.stop(
                    self.folder(), reason=order.reason, text=order.text, grace_s=order.grace_s
                )
        left = self._kill_at - self._clock.monotonic()
        if left <= 0:
            await self._around.runtime.kill(self.id)
            left = _KILL_AGAIN_S
            self._kill_at = self._clock.monotonic() + left
        if self._next() is Step.STOP and self._stop_order() == self._sent:
            await self._clock.wait(self.changed.next(), left)

    def _stop_order(self) -> StopOrder:
        if self.condemned is not None:
            return self.condemned
        assert self.assignment is not None
        reason = self.assignment.stop_reason or Reason.LOST.value
        text = self.assignment.stop_text or "its manager took it for ended"
        return StopOrder(reason, text, self.assignment.spec.grace_s)

    async def _settle(self) -> None:
        ended = await self._seen_end()
        if were_any(self.folder()):
            await self._count_once()
        if ended.reason is Reason.LOST and self._sent is not None:
            ended = replace(ended, reason=_reason(self._sent.reason), text=self._sent.text)
        hook = self._around.hook
        if self.assignment is not None and self.assignment.spec.build and hook is not None:
            ended = await hook.after_end(self.id, self.assignment.spec, ended)
        self._finish(ended)

    async def _seen_end(self) -> Ended:
        """How the runtime says it ended; LOST where it fails again and again to say so."""
        try:
            return await self._around.runtime.settle(self.id)
        except LauncherUnavailable:
            raise
        except PlatformError as exc:
            self._tries += 1
            if self._tries < _SETTLE_TRIES:
                raise
            text = f"nobody saw how it ended; cleaning up failed: {exc.text}"
            return Ended(reason=Reason.LOST, text=text, at=self._clock.now())

    async def _abandon(self) -> None:
        """End what was not started, or may have been without our knowing."""
        if self._failure is not None:
            ended = self._failure
        else:
            order = self._stop_order()
            text = order.text or "stopped before it started"
            ended = Ended(reason=_reason(order.reason), text=text, at=self._clock.now())
        if self._reached:
            await self._around.runtime.kill(self.id)
            try:
                seen = await self._around.runtime.settle(self.id)
            except LauncherUnavailable:
                raise
            except PlatformError:  # nothing of it was made
                pass
            else:
                ended = ended if seen.exit_code is None else seen
        hook = self._around.hook
        if self.assignment is not None and self.assignment.spec.build and hook is not None:
            ended = await hook.after_end(self.id, self.assignment.spec, ended)
        self._finish(ended)

    def _fail(self, reason: Reason, exc: PlatformError) -> None:
        self._failure = Ended(reason=reason, text=exc.text, at=self._clock.now())

    def _finish(self, ended: Ended) -> None:
        self.phase = Phase.ENDED if self.phase is not Phase.REMOVING else self.phase
        self._settled = True
        self.usage = None
        log_end = end_offset(os.path.join(self.folder(), LOG))
        self._report = replace(
            self._report,
            state=KernelState.ENDED,
            ended=ended,
            log_end=log_end,
            frozen_since=None,
        )
        self._around.touched(self, 0.0)
        self.changed.notify()
        self._save()
        self._around.left(self)

    async def _remove(self) -> None:
        await self._around.runtime.remove(self.id)
        with contextlib.suppress(StorageFull):  # found again, and removed again, after a restart
            self._around.journal.forget(self.id)
        self.removed = True
        self.changed.notify()
        self._around.left(self)

    def _save(self) -> None:
        try:
            self._around.journal.save([self.record()])
        except StorageFull as exc:  # the runtime remembers it too; adopting finds it out
            log.warning("journal not written", extra={"kernel": str(self.id), "error": str(exc)})


def new_record(assignment: Assignment) -> Record:
    """Of a kernel that was just assigned."""
    report = KernelReport(
        kernel=assignment.kernel, nonce=assignment.nonce, state=KernelState.PREPARING
    )
    return Record(
        kernel=assignment.kernel, phase=Phase.INTENDED, assignment=assignment, report=report
    )


def found_record(found: Found) -> Record:
    """Of a kernel that only the runtime knows; a full list names it, or it goes."""
    report = KernelReport(kernel=found.kernel, nonce="", state=KernelState.PREPARING)
    return Record(kernel=found.kernel, phase=Phase.INTENDED, assignment=None, report=report)


@contextlib.asynccontextmanager
async def _timed(clock: Clock, timings: dict[str, float], name: str) -> AsyncIterator[None]:
    begin = clock.monotonic()
    yield
    timings[name] = round((clock.monotonic() - begin) * 1000, 3)


async def _either(task: asyncio.Future[None], other: Coroutine[Any, Any, None]) -> None:
    """Wait for whichever is first; ends *other*."""
    waiter = asyncio.ensure_future(other)
    try:
        await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _reason(text: str) -> Reason:
    try:
        return Reason(text)
    except ValueError:
        return Reason.LOST
