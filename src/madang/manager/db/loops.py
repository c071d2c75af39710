"""Background duty of the database."""

from __future__ import annotations

from typing import Final

from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.manager.db.database import Database


class Checkpointer(Loop):
    """Keeps the database's write-ahead log short."""

    period_s = 5.0

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__(clock)
        self._database: Final = database

    async def tick(self, now: float) -> None:
        await self._database.maintain()
