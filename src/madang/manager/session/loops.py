"""Background duties: place, keep deadlines, stop what is idle, tidy up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.kit.loop import Loop
from madang.manager.audit.service import AuditLog, madang
from madang.manager.db import Database, Transaction, micros, seconds
from madang.manager.db.events import EventFeed, prune_events
from madang.manager.fleet.service import FleetService
from madang.manager.fleet.types import NodeRow
from madang.manager.limits.rules import idle
from madang.manager.limits.service import LimitService
from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.service import Journal, Memory
from madang.manager.scheduling.store import add_decision
from madang.manager.scheduling.store import prune as prune_decisions
from madang.manager.scheduling.types import Place, Plan, Preempt, Told, Wait
from madang.manager.session import store
from madang.manager.session.rules import accounts_of, look_of
from madang.manager.session.service import AgentService, moves
from madang.manager.session.service.estimates import estimates, pending_of, reason_in
from madang.manager.session.service.snapshots import SnapshotReader, View
from madang.manager.session.types import LIFE, SessionRow, SessionSettings
from madang.wire.kernel import KernelId, KernelReport
from madang.wire.session import Ended, Pending, Reason, SessionStatus
from madang.wire.size import format_duration

S = SessionStatus

PASS: Final = 2000
"""Pending sessions that one pass looks at."""
BATCH: Final = 50
"""Placements or reasons in one transaction."""
PAUSE_TIMES: Final = 4
"""Where many wait, a pass is followed by a pause of so many times its own length."""
MAX_PAUSE_S: Final = 0.5
REFRESH_S: Final = 5.0
"""How old the evidence in a waiting session's reason may grow."""
RUNS: Final = (S.SCHEDULED, S.PREPARING, S.RUNNING)
MOVED_S: Final = 30.0
MOVED: Final = 0.2
"""An estimate is told anew when it moved by so many seconds, and this part of the whole wait."""
CLOCK_STEP_S: Final = 2.0
"""A larger difference between the two clocks means that somebody set the time."""


class Scheduler(Loop):
    """Woken by each creation, end and new link; plans over a snapshot, applies guarded.

    A pass costs as much as there is waiting. While some have to wait, passes keep a distance, so
    that they leave most of the time to those who ask; otherwise each wake-up is followed at once.
    What a pass decided is written down in the transaction that carries it out.
    """

    period_s = 5.0

    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        reader: SnapshotReader,
        memory: Memory,
        limits: LimitService,
        clock: Clock,
    ) -> None:
        super().__init__(clock)
        self._database: Final = database
        self._feed: Final = feed
        self._reader: Final = reader
        self._memory: Final = memory
        self._limits: Final = limits
        self._journal: Final = Journal()
        self._refreshed = 0.0

    async def tick(self, now: float) -> None:
        began = self.clock.monotonic()
        if await self._pass(now):
            spent = self.clock.monotonic() - began
            await self.clock.sleep(min(spent * PAUSE_TIMES, MAX_PAUSE_S))

    async def _pass(self, now: float) -> bool:
        """Whether some have to wait."""
        async with self._database.read() as tx:
            pending = await store.list_pending(tx, PASS)
            if not pending:
                return False
            view = await self._reader.read(tx, pending, now)
        found = plan(view.snapshot, view.policies, now)
        rows = {row.id: row for row in pending}
        await self._carry_out(view, found, rows, now)
        if found.waits:
            await self._explain(view, rows, found.waits, now)
        return bool(found.waits)

    async def _carry_out(self, view: View, found: Plan, rows: dict[str, Any], now: float) -> None:
        """What was decided; the first transaction also has the note about it."""
        if not (found.places or found.preempts or found.given_up):
            return
        entry = self._journal.entry(view.snapshot, view.policies, now, found)
        try:
            async with self._database.begin() as tx:
                at = micros(self.clock.now())
                await add_decision(
                    tx, at=micros(now), whole=entry.whole, inputs=entry.inputs, digest=entry.digest
                )
                for wait in found.given_up[:BATCH]:
                    await self._give_up(tx, wait, at)
                for one in found.preempts:
                    await self._preempt(tx, one, rows, at)
                await self._place(tx, found.places[:BATCH], rows, at)
        except BaseException:
            self._journal.forget()
            raise
        self._feed.wake()
        if len(found.given_up) > BATCH:
            self.wake()
        for start in range(BATCH, len(found.places), BATCH):
            async with self._database.begin() as tx:
                batch = found.places[start : start + BATCH]
                await self._place(tx, batch, rows, micros(self.clock.now()))
            self._feed.wake()

    async def _place(
        self, tx: Transaction, places: Sequence[Place], rows: dict[str, Any], at: int
    ) -> None:
        for place in places:
            row = await store.find(tx, place.session)
            if row is None:
                continue
            if await self._limits.find_over(tx, accounts_of(row), row.slots.amounts) is not None:
                continue  # a limit was changed meanwhile, which has woken us
            if await moves.assign(tx, row, place.node, at=at) is None:
                self.wake()  # another was faster, or the room is gone: plan again
            elif told := rows[row.id].told:
                estimate = from_json(Told, told)
                self._memory.started(row.id, row.group_name, estimate, seconds(at))

    async def _preempt(self, tx: Transaction, one: Preempt, rows: dict[str, Any], at: int) -> None:
        row = await store.find(tx, one.session)
        if row is None or row.status not in RUNS:
            return
        wanted = rows[one.wanted_by]
        why = "it takes back room that was borrowed beyond a deserved share"
        if row.priority < wanted.priority:
            why = f"its priority is {wanted.priority}"
        text = f"gave way to {wanted.name}: {why}."
        await moves.stop(
            tx,
            row,
            at=at,
            actor="scheduler",
            reason=Reason.PREEMPTED,
            text=text,
            grace_us=min(row.grace_us, micros(one.grace_s)),
        )

    async def _give_up(self, tx: Transaction, wait: Wait, at: int) -> None:
        row = await store.find(tx, wait.session)
        if row is not None and row.status == S.PENDING:
            ended = Ended(reason=Reason.GIVEN_UP, text=wait.text, at=seconds(at))
            await moves.end(tx, row, ended, at=at, actor="scheduler")

    async def _explain(
        self, view: View, rows: dict[str, Any], waits: tuple[Wait, ...], now: float
    ) -> None:
        """Write down why; a new reason at once, newer figures now and then."""
        stamp = self.clock.monotonic()
        refresh = stamp - self._refreshed >= REFRESH_S
        if refresh:
            self._refreshed = stamp
        elif not any(_is_news(rows[wait.session], wait) for wait in waits):
            return
        async with self._database.read() as tx:
            await self._memory.catch_up(tx, view.groups)
        told = estimates(view, waits, self._memory, now)
        at = micros(now)
        reasons = {
            w.session: pending_of(rows[w.session], w, told.get(w.session), at) for w in waits
        }
        news = [w for w in waits if _is_news(rows[w.session], w, reasons[w.session], refresh)]
        for start in range(0, len(news), BATCH):
            batch = [wait.session for wait in news[start : start + BATCH]]
            first = {
                session: to_json(told[session]).decode()
                for session in batch
                if session in told and not rows[session].told
            }
            texts = {session: to_json(reasons[session]).decode() for session in batch}
            async with self._database.begin() as tx:
                await store.explain(tx, rows, texts, first, at=micros(self.clock.now()))
            self._feed.wake()
            await self.clock.sleep(0)  # let others have their turn


def _is_news(row: Any, wait: Wait, new: Pending | None = None, refresh: bool = False) -> bool:
    if row.pending is None:
        return True
    old = reason_in(row.pending)
    if old.code != wait.code:
        return True
    return refresh and (old.text != wait.text or (new is not None and _moved(old, new)))


def _moved(old: Pending, new: Pending) -> bool:
    """Whether the estimate is another one to somebody who waits."""
    if old.start_p90 is None or new.start_p90 is None:
        return old.start_p90 is not new.start_p90
    return abs(new.start_p90 - old.start_p90) > max(MOVED_S, MOVED * (old.start_p90 - old.since))


class Reaper(Loop):
    """Moves on what has outstayed the deadline of its status, and what is on a lost machine."""

    period_s = 1.0

    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        fleet: FleetService,
        agents: AgentService,
        clock: Clock,
        settings: SessionSettings,
    ) -> None:
        super().__init__(clock)
        self._database: Final = database
        self._feed: Final = feed
        self._fleet: Final = fleet
        self._agents: Final = agents
        self._settings: Final = settings
        self._opened = clock.monotonic()
        self._difference: float | None = None

    async def tick(self, now: float) -> None:
        await self._follow_clock(now)
        async with self._database.read() as tx:
            overdue = await store.list_overdue(tx, micros(now))
        for row in overdue:
            await self._act(row, now)
        for node in await self._lost_nodes(now):
            await self._give_up(node, now)

    async def _follow_clock(self, now: float) -> None:
        """If somebody set the time, deadlines go with it: they mean spans."""
        difference = now - self.clock.monotonic()
        before, self._difference = self._difference, difference
        if before is not None and abs(difference - before) > CLOCK_STEP_S:
            async with self._database.begin() as tx:
                await store.shift_deadlines(tx, micros(difference - before))

    async def _act(self, row: SessionRow, now: float) -> None:
        at = micros(now)
        async with self._database.begin() as tx:
            current = await store.find(tx, row.id)
            if current is None or current.deadline is None or current.deadline >= at:
                return
            limit = format_duration(seconds(at - current.status_since))
            if current.status == S.TERMINATING:
                ended = moves.lost(f"its machine did not say in {limit} how it ended.")
                await moves.end(tx, current, ended, at=at, actor="reaper", keep=False)
                self._agents.forget(row.id)
            else:
                text = f"not running after {limit} in {current.status}."
                await moves.stop(
                    tx,
                    current,
                    at=at,
                    actor=LIFE[S(current.status)].owner,
                    reason=Reason.START_FAILED,
                    text=text,
                    grace_us=0,
                )
        self._feed.wake()

    async def _lost_nodes(self, now: float) -> list[NodeRow]:
        """Silent for too long; counted from our own start at the earliest."""
        limit = self._settings.node_lost_after_s
        if self.clock.monotonic() - self._opened < limit:
            return []
        online = self._fleet.online()
        return [
            node
            for node in await self._fleet.nodes()
            if node.name not in online and now - seconds(node.seen_at) > limit
        ]

    async def _give_up(self, node: NodeRow, now: float) -> None:
        async with self._database.read() as tx:
            rows = await store.list_placed_on(tx, node.name)
        silent = format_duration(now - seconds(node.seen_at))
        for row in rows:
            text = f"machine {node.name} silent for {silent}."
            last_heard = seconds(node.seen_at)
            ended = Ended(reason=Reason.NODE_LOST, text=text, at=last_heard)
            async with self._database.begin() as tx:
                current = await store.find(tx, row.id)
                if current is not None and current.kernel == row.kernel:
                    at = micros(now)
                    await moves.end(tx, current, ended, at=at, actor="watcher", keep=False)
                    self._agents.forget(row.id)
            self._feed.wake()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known of a session's use."""

    report: KernelReport
    """The newest that was looked at."""
    marks: idle.Marks


class IdleWatch(Loop):
    """Warns of sessions that nobody uses, and stops them; what that means: ``limits.rules.idle``.

    Each server judges by the machines that are linked to it, once a report.
    """

    period_s = 2.0

    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        fleet: FleetService,
        agents: AgentService,
        limits: LimitService,
        audit: AuditLog,
        clock: Clock,
    ) -> None:
        super().__init__(clock)
        self._database: Final = database
        self._feed: Final = feed
        self._fleet: Final = fleet
        self._agents: Final = agents
        self._limits: Final = limits
        self._audit: Final = audit
        self._seen: dict[KernelId, _Seen] = {}

    async def tick(self, now: float) -> None:
        async with self._database.read() as tx:
            assigned = await self._limits.assigned(tx)
            span_s = assigned.idle_span_s
            running = await store.list_running(tx) if span_s else []
        seen: dict[KernelId, _Seen] = {}
        for row in running:
            known = self._seen.get(row.kernel)
            fresh = self._look(row, known, span_s)
            if (last := fresh or known) is not None:
                seen[row.kernel] = last
            if fresh is not None:
                in_force = assigned.of(accounts_of(row))
                await self._act(row, idle.judge(fresh.marks, in_force), now)
        self._seen = seen

    def _look(self, row: SessionRow, known: _Seen | None, span_s: float) -> _Seen | None:
        """None: there is no news of it."""
        report = self._agents.live.get(row.id)
        if report is None or report.kernel != row.kernel or row.node not in self._fleet.online():
            return None
        if known is not None and known.report is report:
            return None
        look = look_of(report, self.clock.monotonic())
        marks = (
            idle.begin(look) if known is None else idle.observe(known.marks, look, span_s=span_s)
        )
        return _Seen(report, marks)

    async def _act(self, row: SessionRow, judged: idle.Judged, now: float) -> None:
        if _idle_step(row, judged, now) is None:
            return
        at = micros(now)
        async with self._database.begin() as tx:
            current = await store.find(tx, row.id)
            if current is None or current.status != S.RUNNING or current.kernel != row.kernel:
                return
            match _idle_step(current, judged, now):
                case idle.Warn(stop_at, text):
                    columns = {"idle_stop_at": micros(stop_at), "idle_text": text}
                    await store.change(tx, current, at=at, what="idle", **columns)
                case idle.Withdraw():
                    columns = {"idle_stop_at": None, "idle_text": ""}
                    await store.change(tx, current, at=at, what="not idle", **columns)
                case idle.Stop(by, text):
                    shown = await self._limits.shown(tx, by.account)
                    text = f"idle: {text} (limits {by.name} of {shown})"
                    await self._stop(tx, current, text, at)
        self._feed.wake()

    async def _stop(self, tx: Transaction, row: SessionRow, text: str, at: int) -> None:
        actor = madang("idle watch")
        reason = Reason.IDLE
        await moves.stop(tx, row, at=at, actor=actor.name, reason=reason, text=text)
        await self._audit.record(
            tx,
            actor=actor,
            action="session.stopped",
            kind="session",
            id=row.id,
            name=row.name,
            after={"reason": str(reason), "text": text},
        )


def _idle_step(row: SessionRow, judged: idle.Judged, now: float) -> idle.Step | None:
    return idle.next_step(
        judged,
        stop_at=None if row.idle_stop_at is None else seconds(row.idle_stop_at),
        protected_until=None if row.protected_until is None else seconds(row.protected_until),
        now=now,
    )


class Retention(Loop):
    """Removes ended sessions that are too old or too many, old events, old idempotency keys."""

    period_s = 30.0

    def __init__(
        self, database: Database, feed: EventFeed, clock: Clock, settings: SessionSettings
    ) -> None:
        super().__init__(clock)
        self._database: Final = database
        self._feed: Final = feed
        self._settings: Final = settings

    async def tick(self, now: float) -> None:
        settings = self._settings
        async with self._database.read() as tx:
            doomed = await store.list_old(tx, micros(now - settings.retention_s))
            doomed += await store.list_surplus(tx, settings.retention_count)
        if doomed:
            async with self._database.begin() as tx:
                for row in {row.id: row for row in doomed}.values():
                    await moves.remove(tx, row, at=micros(now), actor="retention")
            self._feed.wake()
            self.wake()
        async with self._database.begin() as tx:
            await prune_events(tx, before=micros(now - settings.event_retention_s))
            await store.prune_keys(tx, micros(now - settings.key_retention_s))
            await prune_decisions(tx, before=micros(now - settings.decision_retention_s))
