"""What can be asked about the queue. Nothing here changes anything."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json
from madang.manager.db import Database, Reader, seconds
from madang.manager.http import Caller
from madang.manager.scheduling.planner.options import options
from madang.manager.scheduling.service import Memory
from madang.manager.session import store
from madang.manager.session.service.snapshots import SnapshotReader, View
from madang.manager.session.service.users import SEEN, SessionService
from madang.manager.session.types import SessionRow
from madang.wire.queue import Forecast, Option, Queue, QueueEntry, Why
from madang.wire.session import Pending, SessionSpec, SessionStatus

S = SessionStatus


class QueueService:
    def __init__(
        self,
        database: Database,
        sessions: SessionService,
        reader: SnapshotReader,
        memory: Memory,
        clock: Clock,
    ) -> None:
        self._database: Final = database
        self._sessions: Final = sessions
        self._reader: Final = reader
        self._memory: Final = memory
        self._clock: Final = clock
        self._turn: Final = asyncio.Semaphore(1)
        """Questions are answered one by one: each may take as long as some passes."""

    async def why(self, caller: Caller, ref: str) -> Why:
        """Raises NotFound, Ambiguous."""
        row = await self._sessions.get(caller, ref)
        if row.status != S.PENDING:
            return Why(name=row.name, group=row.group_name, node=row.node)
        async with self._database.read() as tx:
            pending = await store.list_pending(tx, SEEN)
            view = await self._reader.read(tx, pending, self._clock.now())
            await self._memory.catch_up(tx, view.groups)
        return await self._answer(caller, row, pending, view)

    async def preview(self, caller: Caller, spec: SessionSpec) -> Why:
        """Raises what ``create`` would."""
        row, view = await self._sessions.draft(caller, spec)
        async with self._database.read() as tx:
            pending = await store.list_pending(tx, SEEN)
            await self._memory.catch_up(tx, view.groups)
        if row.node is not None:
            return Why(name=row.name, group=row.group_name, node=row.node)
        return await self._answer(caller, row, [*pending, row], view)

    async def _answer(
        self, caller: Caller, row: SessionRow, pending: Sequence[Any], view: View
    ) -> Why:
        before = [other for other in pending if other.group_name == row.group_name]
        before.sort(key=_turn)
        place = next((at for at, other in enumerate(before, 1) if other.id == row.id), None)
        return Why(
            name=row.name,
            group=row.group_name,
            place=place,
            waiting=len(before),
            pending=_reason(row),
            options=() if place is None else await self._options(caller, row, view),
            forecast=self._forecast(row.group_name),
        )

    async def _options(self, caller: Caller, row: SessionRow, view: View) -> tuple[Option, ...]:
        """In groups that *caller* may use."""
        now = self._clock.now()
        rooms = [
            room
            for room in view.snapshot.rooms
            if room.group == row.group_name or _may_use(view, room.group, caller)
        ]
        snapshot = replace(view.snapshot, rooms=tuple(rooms))
        async with self._turn:
            found = await asyncio.to_thread(options, snapshot, view.policies, row.id, now)
        return tuple(Option(text=option.text, after=option.after) for option in found)

    async def queue(self, caller: Caller, *, group: str | None, after: int, limit: int) -> Queue:
        """From the place *after* on, of one group or of all; places count those of everybody."""
        async with self._database.read() as tx:
            pending, visible = await self._pending(tx, caller, group)
        entries = [
            _entry(row, place)
            for place, row in enumerate(pending, 1)
            if place > after and row.id in visible
        ]
        names = sorted({row.group_name for row in pending})
        return Queue(
            items=tuple(entries[:limit]),
            waiting=len(pending),
            forecasts={name: self._forecast(name) for name in names},
        )

    async def _pending(
        self, tx: Reader, caller: Caller, group: str | None
    ) -> tuple[list[Any], set[str]]:
        rows = await store.list_pending(tx, SEEN)
        wanted = [row for row in rows if group in (None, row.group_name)]
        return sorted(wanted, key=_turn), await store.list_visible_pending(tx, caller)

    def _forecast(self, group: str) -> Forecast:
        known = self._memory.forecaster(group)
        return Forecast(
            told=known.told,
            coverage=None if math.isnan(known.coverage) else known.coverage,
            median_error_s=None if math.isnan(known.median_error_s) else known.median_error_s,
        )


def _turn(row: Any) -> tuple[int, int, str]:
    return -row.priority, row.created_at, row.id


def _may_use(view: View, group: str, caller: Caller) -> bool:
    return group in view.groups.rules and view.groups.allows(group, caller)


def _entry(row: Any, place: int) -> QueueEntry:
    return QueueEntry(
        id=row.id,
        name=row.name,
        owner=row.owner,
        group=row.group_name,
        priority=row.priority,
        place=place,
        created_at=seconds(row.created_at),
        pending=_reason(row),
    )


def _reason(row: Any) -> Pending:
    """There is one from the start."""
    if row.pending is not None:
        return from_json(Pending, row.pending)
    text = "waits to be looked at: it is new, the next pass will say more."
    return Pending(code="queue.new", text=text, since=seconds(row.created_at))
