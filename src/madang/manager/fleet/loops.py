"""Background duties of the fleet."""

from __future__ import annotations

from typing import Final

from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.manager.fleet.service import FleetService


class NodeWatch(Loop):
    """Gives silent links up, and writes down who was seen."""

    period_s = 5.0

    def __init__(self, fleet: FleetService, clock: Clock) -> None:
        super().__init__(clock)
        self._fleet: Final = fleet

    async def tick(self, now: float) -> None:
        await self._fleet.disconnect_silent()
        await self._fleet.mark_seen()
