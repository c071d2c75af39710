"""Groups of machines: made and changed by administrators, chosen by sessions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from madang.kit.clock import Clock
from madang.manager.audit.service import AuditLog
from madang.manager.db import Database, Reader, micros
from madang.manager.db.events import EventFeed
from madang.manager.fleet import store as fleet
from madang.manager.fleet.types import DEFAULT_GROUP, GroupRow, NodeRow, Slots
from madang.manager.http import Caller
from madang.manager.scheduling import store
from madang.manager.scheduling.rules import group_rules
from madang.manager.scheduling.service.changes import announce, note
from madang.manager.scheduling.types import GroupRules
from madang.wire.errors import (
    Conflict,
    Forbidden,
    GroupInvalid,
    GroupRefused,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
)
from madang.wire.kernel import Capacity
from madang.wire.labels import GROUP
from madang.wire.queue import Group

log = logging.getLogger(__name__)

FRESH_S: Final = 5.0
"""How long what was read is believed; another server's change takes as long."""


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups as they are now."""

    rules: Mapping[str, GroupRules]
    projects: Mapping[str, str]
    """Id → name."""
    domains: Mapping[str, str]

    def allows(self, name: str, caller: Caller, project_id: str = "") -> bool:
        """Whether *caller* may use it in that project; empty: the one that they work in."""
        rules = self.rules[name]
        if caller.administers:
            return True
        project = project_id or caller.project_id
        return _among(rules.projects, project, self.projects) and _among(
            rules.domains, caller.domain_id, self.domains
        )

    def choose(self, wanted: str, caller: Caller, project_id: str) -> str:
        """The group of a new session. Raises GroupRefused that names those there are."""
        name = wanted or DEFAULT_GROUP
        if name in self.rules and self.allows(name, caller, project_id):
            return name
        usable = [each for each in self.rules if self.allows(each, caller, project_id)]
        others = f"there are {', '.join(usable)}" if usable else "you may use none"
        text = f"group {name[:60]!r} does not exist for project {self.called(project_id)}"
        raise GroupRefused(f"{text}; {others}.", group=name[:60])

    def called(self, project_id: str) -> str:
        return self.projects.get(project_id, project_id)


def _among(allowed: Sequence[str], one: str, names: Mapping[str, str]) -> bool:
    return not allowed or one in allowed or names.get(one) in allowed


class GroupService:
    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        audit: AuditLog,
        clock: Clock,
        reserve_after_s: float,
    ) -> None:
        """*reserve_after_s*: of groups that don't say."""
        self._database: Final = database
        self._feed: Final = feed
        self._audit: Final = audit
        self._clock: Final = clock
        self._reserve_after_s: Final = reserve_after_s
        self._known: Groups | None = None
        self._read_at = 0.0

    async def current(self, tx: Reader) -> Groups:
        """As of a few seconds ago at most."""
        now = self._clock.monotonic()
        if self._known is None or now - self._read_at > FRESH_S:
            rules = {row.name: self._rules(row) for row in await fleet.list_groups(tx)}
            self._known = Groups(rules, *await store.names(tx))
            self._read_at = now
        return self._known

    def _rules(self, row: GroupRow) -> GroupRules:
        try:
            return group_rules(row.text, self._reserve_after_s)
        except GroupInvalid as exc:  # it named a plugin that is not installed any more
            log.warning("a group's settings do not count", extra={"group": row.name, "error": exc})
            return GroupRules()

    # For people

    async def list(self, caller: Caller) -> list[Group]:
        """Those that *caller* may use."""
        async with self._database.read() as tx:
            current = await self.current(tx)
            rows, nodes = await fleet.list_groups(tx), await fleet.list_nodes(tx)
        return [
            _view(row, nodes)
            for row in rows
            if row.name in current.rules and current.allows(row.name, caller)
        ]

    async def get(self, caller: Caller, name: str) -> Group:
        """Raises NotFound."""
        for group in await self.list(caller):
            if group.name == name:
                return group
        raise NotFound(f"no group {name[:60]!r}. `madang group ls` lists them.", group=name[:60])

    async def put(self, caller: Caller, name: str, text: str, version: int | None) -> Group:
        """Make it (*version* None or 0) or change it. Raises Forbidden, GroupInvalid, …"""
        _check_admin(caller)
        if not GROUP.fullmatch(name):
            text = f"{name[:60]!r} is no name of a group: lower-case letters, digits, dashes."
            raise InvalidRequest(text, field="name")
        group_rules(text)
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            known = await _find(tx, name)
            if known is None:
                if version:
                    raise PreconditionFailed(f"group {name} does not exist any more.")
                await fleet.add_group(tx, name, text, at)
            elif not version:
                raise Conflict(f"group {name} exists; `madang group edit {name}` changes it.")
            elif not await fleet.edit_group(tx, name, text, version=version, at=at):
                found = f"group {name} is at version {known.version}, not {version}."
                raise PreconditionFailed(found, version=known.version)
            before = None if known is None else {"text": known.text, "version": known.version}
            after = {"text": text, "version": 1 if known is None else known.version + 1}
            action = "group.created" if known is None else "group.changed"
            await note(self._audit, tx, caller, action, name, before, after)
            await announce(tx, name, at)
        self._changed()
        return await self.get(caller, name)

    async def remove(self, caller: Caller, name: str) -> None:
        """Only without machines. Raises Forbidden, NotFound, Conflict."""
        _check_admin(caller)
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            known = await _find(tx, name)
            if known is None:
                raise NotFound(f"no group {name[:60]!r}.", group=name[:60])
            if name == DEFAULT_GROUP:
                raise Conflict("the default group stays: sessions that name none are in it.")
            inside = [node.name for node in await fleet.list_nodes(tx) if node.group == name]
            if inside:
                text = f"group {name} has machines: {', '.join(inside[:5])}. Put them elsewhere: "
                raise Conflict(f"{text}`madang node set {inside[0]} --group GROUP`.")
            await fleet.remove_group(tx, name, known.version)
            before = {"text": known.text, "version": known.version}
            await note(self._audit, tx, caller, "group.removed", name, before, None)
            await announce(tx, name, at)
        self._changed()

    async def move_node(self, caller: Caller, node: str, group: str) -> None:
        """Raises Forbidden, NotFound, Conflict."""
        _check_admin(caller)
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            row = await fleet.find_node(tx, node)
            if row is None:
                raise NotFound(f"no machine {node[:60]!r}. `madang node ls` lists them.")
            if await _find(tx, group) is None:
                raise NotFound(
                    f"no group {group[:60]!r}. `madang group add {group[:40]}` makes it."
                )
            if row.own_group and row.own_group != group:
                text = f"machine {node} is in {row.own_group} by its own settings (`node.group`)."
                raise Conflict(f"{text} Change them there.", node=node, group=row.own_group)
            await fleet.join_group(tx, node, group)
            before = {"group": row.group}
            await note(self._audit, tx, caller, "node.moved", node, before, {"group": group})
            await announce(tx, group, at)
        self._changed()

    def _changed(self) -> None:
        self._known = None
        self._feed.wake()


def _check_admin(caller: Caller) -> None:
    if not caller.administers:
        raise Forbidden("only an administrator changes groups of machines.")


async def _find(tx: Reader, name: str) -> GroupRow | None:
    return next((row for row in await fleet.list_groups(tx) if row.name == name), None)


def _view(row: GroupRow, nodes: Sequence[NodeRow]) -> Group:
    mine = [node for node in nodes if node.group == row.name]
    return Group(
        name=row.name,
        text=row.text,
        version=row.version,
        nodes=tuple(node.name for node in mine),
        capacity=_sum([node.capacity for node in mine]),
    )


def _sum(parts: Sequence[Slots]) -> Capacity:
    return Slots(
        sum(part.cpu_milli for part in parts),
        sum(part.mem_bytes for part in parts),
        sum(part.disk_bytes for part in parts),
        sum(part.pids for part in parts),
    ).capacity()
