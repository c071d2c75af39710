"""Machines over HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from madang.manager.fleet.service import FleetService
from madang.manager.http import Call, endpoint
from madang.wire.api import Node


class FleetApi:
    def __init__(self, fleet: FleetService, count: Callable[[], Awaitable[dict[str, int]]]) -> None:
        """*count*: sessions on each node."""
        self._fleet: Final = fleet
        self._count: Final = count

    @endpoint("GET", "/v1/nodes", returns=list[Node])
    async def list_nodes(self, call: Call[None, None]) -> list[Node]:
        """Machines, with what they have and what is allocated."""
        counts = await self._count()
        return [
            self._fleet.view(row, sessions=counts.get(row.name, 0))
            for row in await self._fleet.nodes()
        ]
