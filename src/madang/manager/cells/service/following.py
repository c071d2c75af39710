"""Events of an interpreter for one follower: from memory, and what that lacks from its output."""

from __future__ import annotations

from collections.abc import AsyncIterator

from madang.manager.cells import store
from madang.manager.cells.rules.narration import Narrator
from madang.manager.cells.service.hub import Hub
from madang.manager.db import Database
from madang.manager.session.service.kernels import KernelService
from madang.wire.cells import CellEvent, EventKind
from madang.wire.errors import LogGone, NotFound
from madang.wire.link import ReadLog
from madang.wire.log import LogGap, LogRecord


class Follower:
    """A slow one holds up nobody: it has a place, no queue."""

    def __init__(self, hub: Hub, database: Database, kernels: KernelService) -> None:
        self._hub = hub
        self._database = database
        self._kernels = kernels

    async def events(self, after: int) -> AsyncIterator[CellEvent]:
        """All with larger numbers, until the interpreter has ended. Raises Shutdown."""
        hub, at = self._hub, after
        while True:
            hub.check_closing()
            bell = hub.bell
            found = hub.recent.after(at)
            if found is None:
                gone = hub.recent.gone
                async for event in self._older(at, gone):
                    yield event
                at = gone
                continue
            for event in found:
                at = event.seq
                yield event
            if not found:
                if hub.over:
                    return
                await bell.wait()

    async def _older(self, after: int, until: int) -> AsyncIterator[CellEvent]:
        """Those up to *until*, told anew by the output; of programs before a restart, none."""
        row, session = self._hub.row, self._hub.session
        at = after
        if after < row.base:
            at = min(row.base, until)
            yield CellEvent(seq=at, at=row.started_at / 1e6, kind=EventKind.GAP)
        if at >= until:
            return
        async with self._database.read() as tx:
            cells = await store.list_cells(tx, row.id, row.base)
        narrator = Narrator(row.nonce, row.base, cells)
        request = ReadLog(kernel=session.kernel, exec_id=row.exec_id)
        try:
            async with self._kernels.open(session, request) as stream:
                async for item in stream:
                    if isinstance(item, LogRecord):
                        events = narrator.record(item)
                    elif isinstance(item, LogGap):
                        events = narrator.gap(item)
                    else:
                        continue
                    narrator.replies.clear()
                    narrator.outcomes.clear()
                    for event in events:
                        if event.seq > until:
                            return
                        if event.seq > at:
                            yield event
        except (LogGone, NotFound):
            yield CellEvent(seq=until, at=row.started_at / 1e6, kind=EventKind.GAP)
