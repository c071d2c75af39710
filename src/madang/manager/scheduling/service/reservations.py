"""Reservations by calendar: made by administrators, used by a project."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.manager.audit.service import AuditLog
from madang.manager.db import Database, Reader, micros, seconds
from madang.manager.db.events import EventFeed
from madang.manager.fleet import store as fleet
from madang.manager.http import Caller
from madang.manager.scheduling import store
from madang.manager.scheduling.service.changes import announce, note
from madang.manager.scheduling.service.groups import Groups, GroupService
from madang.wire.errors import Conflict, Forbidden, GroupRefused, InvalidRequest, NotFound
from madang.wire.labels import GROUP
from madang.wire.queue import Reservation, ReservationDraft

LONGEST_S: Final = 366 * 86400.0


class ReservationService:
    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        groups: GroupService,
        audit: AuditLog,
        clock: Clock,
    ) -> None:
        self._database: Final = database
        self._feed: Final = feed
        self._groups: Final = groups
        self._audit: Final = audit
        self._clock: Final = clock

    async def list(self, caller: Caller) -> list[Reservation]:
        """Those of the project that *caller* works in; all, for who sees all."""
        async with self._database.read() as tx:
            groups, rows = await self._groups.current(tx), await store.list_booked(tx)
        return [
            _view(row, groups)
            for row in rows
            if caller.sees_all or row.project_id == caller.project_id
        ]

    async def add(self, caller: Caller, draft: ReservationDraft) -> Reservation:
        """Raises Forbidden, InvalidRequest, NotFound, Conflict."""
        _check_admin(caller)
        now = self._clock.now()
        _check(draft, now)
        async with self._database.begin() as tx:
            groups, booked = await self._groups.current(tx), await store.list_booked(tx)
            if any(row.name == draft.name for row in booked):
                raise Conflict(f"a reservation {draft.name} exists.", name=draft.name)
            if draft.group not in groups.rules:
                raise NotFound(f"no group {draft.group[:60]!r}.", group=draft.group[:60])
            project_id = _project(draft, groups, caller)
            nodes = await _choose(tx, draft, booked)
            made = {
                "project": groups.called(project_id),
                "group": draft.group,
                "nodes": nodes,
                "starts_at": draft.starts_at,
                "ends_at": draft.ends_at,
            }
            await note(self._audit, tx, caller, "reservation.created", draft.name, None, made)
            await store.add_reservation(
                tx,
                name=draft.name,
                project_id=project_id,
                group_name=draft.group,
                nodes=to_json(nodes).decode(),
                starts_at=micros(draft.starts_at),
                ends_at=micros(draft.ends_at),
                no_show_us=micros(draft.no_show_s),
                owner_id=caller.user_id,
                created_at=micros(now),
            )
            await announce(tx, draft.name, micros(self._clock.now()))
        self._feed.wake()
        return next(one for one in await self.list(caller) if one.name == draft.name)

    async def remove(self, caller: Caller, name: str) -> None:
        """What runs there goes on. Raises Forbidden, NotFound."""
        _check_admin(caller)
        async with self._database.begin() as tx:
            if not await store.remove_reservation(tx, name):
                raise NotFound(f"no reservation {name[:60]!r}. `madang reserve ls` lists them.")
            await note(self._audit, tx, caller, "reservation.removed", name, {}, None)
            await announce(tx, name, micros(self._clock.now()))
        self._feed.wake()


async def check_use(tx: Reader, name: str, group: str, project_id: str) -> None:
    """Whether a session of that group and project may use it. Raises NotFound, GroupRefused."""
    row = next((row for row in await store.list_booked(tx) if row.name == name), None)
    if row is None or row.project_id != project_id:
        text = f"no reservation {name!r} of this project. `madang reserve ls` lists them."
        raise NotFound(text, reservation=name)
    if row.group_name != group:
        text = f"reservation {name} is in group {row.group_name}: take `--group {row.group_name}`."
        raise GroupRefused(text, group=row.group_name)


def _check_admin(caller: Caller) -> None:
    if not caller.administers:
        raise Forbidden("only an administrator reserves machines.")


def _check(draft: ReservationDraft, now: float) -> None:
    if not GROUP.fullmatch(draft.name):
        raise InvalidRequest(f"{draft.name[:60]!r} is no name of a reservation.", field="name")
    times = (draft.starts_at, draft.ends_at, draft.no_show_s)
    if not all(map(math.isfinite, times)) or not (
        now < draft.ends_at and draft.starts_at < draft.ends_at <= draft.starts_at + LONGEST_S
    ):
        text = "a reservation ends after it starts and after now, and lasts a year at most."
        raise InvalidRequest(text, field="ends_at")
    if not 0 < draft.no_show_s <= LONGEST_S or draft.count < 1:
        raise InvalidRequest("no_show_s and count must be above 0.", field="no_show_s")


def _project(draft: ReservationDraft, groups: Groups, caller: Caller) -> str:
    wanted = draft.project or caller.project_id
    found = [key for key, name in groups.projects.items() if wanted in (key, name)]
    if len(found) != 1:
        what = "several projects are" if found else "no project is"
        raise NotFound(f"{what} named {wanted[:60]!r}.", project=wanted[:60])
    return found[0]


async def _choose(tx: Reader, draft: ReservationDraft, booked: Sequence[Any]) -> list[str]:
    """Machines that nobody else has reserved then."""
    there = [node.name for node in await fleet.list_nodes(tx) if node.group == draft.group]
    taken = {
        node: row.name
        for row in booked
        if seconds(row.starts_at) < draft.ends_at and draft.starts_at < seconds(row.ends_at)
        for node in from_json(list[str], row.nodes)
    }
    for node in draft.nodes:
        if node not in there:
            raise NotFound(f"group {draft.group} has no machine {node[:60]!r}.", node=node[:60])
        if node in taken:
            raise Conflict(f"machine {node} is reserved then: {taken[node]}.", node=node)
    if draft.nodes:
        return sorted(set(draft.nodes))
    free = [node for node in there if node not in taken]
    if len(free) < draft.count:
        text = f"group {draft.group} has {len(free)} machines that are not reserved then"
        raise Conflict(f"{text}, {draft.count} are asked for.", free=len(free))
    return free[: draft.count]


def _view(row: Any, groups: Groups) -> Reservation:
    return Reservation(
        name=row.name,
        project=groups.called(row.project_id),
        group=row.group_name,
        nodes=tuple(from_json(list[str], row.nodes)),
        starts_at=seconds(row.starts_at),
        ends_at=seconds(row.ends_at),
        no_show_s=seconds(row.no_show_us),
    )
