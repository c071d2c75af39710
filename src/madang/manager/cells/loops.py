"""Background duties of the cells slice."""

from __future__ import annotations

from typing import Final

from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.manager.cells.service import CellService
from madang.wire.api import Event
from madang.wire.session import SessionStatus


class CellKeeper(Loop):
    """Writes down how cells ended; follows interpreters to their end, also after a restart."""

    period_s = 5.0

    def __init__(self, cells: CellService, clock: Clock) -> None:
        super().__init__(clock)
        self._cells: Final = cells
        cells.on_news = self.wake

    def listen(self, event: Event) -> None:
        """Interpreters end with their session."""
        if event.payload.get("target") == SessionStatus.TERMINATED:
            self.wake()

    async def tick(self, now: float) -> None:
        await self._cells.tend()
        await self._cells.flush()

    async def stop(self) -> None:
        await super().stop()
        await self._cells.close()
