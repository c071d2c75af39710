"""REST of groups of machines."""

from __future__ import annotations

from typing import Any, Final

from madang.manager.http import Call, Reply, endpoint
from madang.manager.http.versions import version_of
from madang.manager.scheduling.service import GroupService, HistoryService, ReservationService
from madang.wire.queue import (
    MAX_GROUP_TEXT,
    Group,
    GroupDraft,
    NodeDraft,
    ReplayReport,
    ReplayRequest,
    Reservation,
    ReservationDraft,
)

BODY_LIMIT: Final = 8 * MAX_GROUP_TEXT
"""A text takes up to six times as much as JSON escapes."""


class ReservationApi:
    def __init__(self, reservations: ReservationService) -> None:
        self._reservations: Final = reservations

    @endpoint("GET", "/v1/reservations", returns=tuple[Reservation, ...])
    async def list_reservations(self, call: Call[Any, Any]) -> tuple[Reservation, ...]:
        """Machines that are kept for the caller's project; all, for administrators."""
        return tuple(await self._reservations.list(call.caller))

    @endpoint("POST", "/v1/reservations", body=ReservationDraft, returns=Reservation, status=201)
    async def add_reservation(self, call: Call[Any, ReservationDraft]) -> Reservation:
        """Keep machines for a project for some time; administrators only."""
        return await self._reservations.add(call.caller, call.body)

    @endpoint("DELETE", "/v1/reservations/{name}", status=204)
    async def remove_reservation(self, call: Call[Any, Any]) -> None:
        """Give the machines back; what runs goes on. Administrators only."""
        await self._reservations.remove(call.caller, call.path("name"))


class GroupApi:
    def __init__(self, groups: GroupService, history: HistoryService) -> None:
        self._groups: Final = groups
        self._history: Final = history

    @endpoint("GET", "/v1/groups", returns=tuple[Group, ...])
    async def list_groups(self, call: Call[Any, Any]) -> tuple[Group, ...]:
        """Groups of machines that the caller may use."""
        return tuple(await self._groups.list(call.caller))

    @endpoint("GET", "/v1/groups/{name}", returns=Group)
    async def get_group(self, call: Call[Any, Any]) -> Reply:
        """One group: its settings and machines."""
        return _tagged(await self._groups.get(call.caller, call.path("name")))

    @endpoint(
        "PUT",
        "/v1/groups/{name}",
        body=GroupDraft,
        returns=Group,
        body_limit=BODY_LIMIT,
        headers=("If-Match",),
    )
    async def put_group(self, call: Call[Any, GroupDraft]) -> Reply:
        """Make a group, or with If-Match change its settings; administrators only."""
        version = version_of(call.header("If-Match"))
        name = call.path("name")
        return _tagged(await self._groups.put(call.caller, name, call.body.text, version))

    @endpoint("DELETE", "/v1/groups/{name}", status=204)
    async def remove_group(self, call: Call[Any, Any]) -> None:
        """Remove a group without machines; administrators only."""
        await self._groups.remove(call.caller, call.path("name"))

    @endpoint("PATCH", "/v1/nodes/{name}", body=NodeDraft, status=204)
    async def change_node(self, call: Call[Any, NodeDraft]) -> None:
        """Put a machine into another group; what runs on it goes on. Administrators only."""
        await self._groups.move_node(call.caller, call.path("name"), call.body.group)

    @endpoint("POST", "/v1/queue/replay", body=ReplayRequest, returns=ReplayReport)
    async def replay_queue(self, call: Call[Any, ReplayRequest]) -> ReplayReport:
        """Plan the past once more, under other settings or on more machines; nothing is stored."""
        return await self._history.replay(call.caller, call.body)


def _tagged(group: Group) -> Reply:
    return Reply(group, {"ETag": f'"{group.version}"'})
