"""Background duties: place, keep deadlines, tidy up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.kit.loop import Loop
from madang.manager.db import Database, micros, seconds
from madang.manager.db.events import EventFeed, prune_events
from madang.manager.fleet.service import FleetService
from madang.manager.fleet.types import NodeRow
from madang.manager.scheduling.rules import plan
from madang.manager.scheduling.types import Place, Wait
from madang.manager.session import store
from madang.manager.session.service import AgentService, moves
from madang.manager.session.service.users import ask_of, read_snapshot
from madang.manager.session.types import LIFE, SessionRow, SessionSettings
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
CLOCK_STEP_S: Final = 2.0
"""A larger difference between the two clocks means that somebody set the time."""


class Scheduler(Loop):
    """Woken by each creation, end and new link; plans over a snapshot, applies guarded.

    A pass costs as much as there is waiting. While some have to wait, passes keep a distance, so
    that they leave most of the time to those who ask; otherwise each wake-up is followed at once.
    """

    period_s = 5.0

    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        fleet: FleetService,
        clock: Clock,
        settings: SessionSettings,
    ) -> None:
        super().__init__(clock)
        self._database: Final = database
        self._feed: Final = feed
        self._fleet: Final = fleet
        self._settings: Final = settings
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
            snapshot = await read_snapshot(tx, self._fleet.online())
        found = plan(
            [ask_of(row) for row in pending],
            snapshot.rooms,
            now,
            held=snapshot.held,
            reserve_after_s=self._settings.reserve_after_s,
        )
        rows = {row.id: row for row in pending}
        for start in range(0, len(found.places), BATCH):
            await self._place(found.places[start : start + BATCH])
        await self._explain(rows, found.waits)
        return bool(found.waits)

    async def _place(self, places: tuple[Place, ...]) -> None:
        at = micros(self.clock.now())
        async with self._database.begin() as tx:
            for place in places:
                row = await store.find(tx, place.session)
                if row is not None and await moves.assign(tx, row, place.node, at=at) is None:
                    self.wake()  # another was faster, or the room is gone: plan again
        self._feed.wake()

    async def _explain(self, rows: dict[str, Any], waits: tuple[Wait, ...]) -> None:
        """Write down why; a new reason at once, newer figures now and then."""
        stamp = self.clock.monotonic()
        refresh = stamp - self._refreshed >= REFRESH_S
        if refresh:
            self._refreshed = stamp
        news = [w for w in waits if _is_news(rows[w.session], w, refresh=refresh)]
        for start in range(0, len(news), BATCH):
            at = micros(self.clock.now())
            reasons = {
                wait.session: to_json(_pending(rows[wait.session], wait, at)).decode()
                for wait in news[start : start + BATCH]
            }
            async with self._database.begin() as tx:
                await store.explain(tx, rows, reasons, at=at)
            self._feed.wake()
            await self.clock.sleep(0)  # let others have their turn


def _pending(row: Any, wait: Wait, at: int) -> Pending:
    new = Pending(code=wait.code, text=wait.text, since=seconds(at))
    if row.pending is None:
        return replace(new, since=seconds(row.created_at))
    old = from_json(Pending, row.pending)
    return replace(new, since=old.since) if old.code == new.code else new


def _is_news(row: Any, wait: Wait, *, refresh: bool) -> bool:
    if row.pending is None:
        return True
    old = from_json(Pending, row.pending)
    return old.code != wait.code or (refresh and old.text != wait.text)


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
