"""Kernels that nobody comes back to."""

from __future__ import annotations

from typing import Final

from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.manager.db import Database, micros
from madang.manager.db.events import EventFeed
from madang.manager.jupyter.rules import kernels as rules
from madang.manager.jupyter.service.kernels import Kernels
from madang.manager.jupyter.types import ALONE
from madang.manager.session import store
from madang.manager.session.service import moves
from madang.manager.session.types import SessionRow
from madang.wire.session import Reason, SessionStatus
from madang.wire.size import format_duration


class AloneWatch(Loop):
    """Ends kernels whose client asked for it and has gone: its process may have been killed.

    The time counts from when the last client went, or from when this server first saw the kernel.
    """

    period_s = 5.0

    def __init__(self, database: Database, feed: EventFeed, kernels: Kernels, clock: Clock) -> None:
        super().__init__(clock)
        self._database: Final = database
        self._feed: Final = feed
        self._kernels: Final = kernels

    async def tick(self, now: float) -> None:
        async with self._database.read() as tx:
            running = await store.list_running(tx)
        for row in running:
            if ALONE in row.spec and self._is_over(row):
                await self._end(row, now)

    def _is_over(self, row: SessionRow) -> bool:
        limit_s = rules.alone_after(row)
        if limit_s is None:
            return False
        memory, at = self._kernels.memory(row.id), self.clock.monotonic()
        if memory.clients:
            return False
        if memory.left_at is None:
            memory.left_at = at
        return at - memory.left_at >= limit_s

    async def _end(self, row: SessionRow, now: float) -> None:
        limit = format_duration(rules.alone_after(row) or 0)
        text = f"no Jupyter client was connected for {limit}, as was asked for at its start"
        async with self._database.begin() as tx:
            current = await store.find(tx, row.id)
            if current is not None and current.status == SessionStatus.RUNNING:
                await moves.stop(
                    tx, current, at=micros(now), actor="madang", reason=Reason.IDLE, text=text
                )
        self._feed.wake()
