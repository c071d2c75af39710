"""What the planner looks at, from rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from madang.manager.db import Reader, seconds
from madang.manager.fleet import store as ledger
from madang.manager.fleet.service import FleetService
from madang.manager.fleet.tables import SLOTS
from madang.manager.fleet.types import NodeRow
from madang.manager.limits.service import LimitService
from madang.manager.policy.service import PolicyService
from madang.manager.policy.types import Demands
from madang.manager.scheduling import store as scheduling
from madang.manager.scheduling.rules import OWN, offers
from madang.manager.scheduling.service import Groups, GroupService, Memory
from madang.manager.scheduling.service.memory import owner_of
from madang.manager.scheduling.types import Ask, GroupRules, Held, Policy, Room, Snapshot, wishes_of
from madang.manager.session import store
from madang.manager.session.rules import accounts_of
from madang.manager.session.service.keeping import lacks_of, needs_of, runtime_of
from madang.wire.session import Result, SessionStatus

S = SessionStatus
_NO_RULES: Final = GroupRules()


@dataclass(frozen=True, slots=True)
class View:
    """A snapshot, and by which rules it is planned."""

    snapshot: Snapshot
    policies: Mapping[str, Policy]
    groups: Groups


class SnapshotReader:
    def __init__(
        self,
        fleet: FleetService,
        groups: GroupService,
        memory: Memory,
        limits: LimitService,
        policies: PolicyService,
    ) -> None:
        self._fleet: Final = fleet
        self._groups: Final = groups
        self._memory: Final = memory
        self._limits: Final = limits
        self._policies: Final = policies
        self._asks: dict[str, tuple[int, Ask]] = {}
        """By session, with the version of its row; as long as ``_basis`` holds."""
        self._basis: tuple[Groups, Demands] | None = None

    async def read(self, tx: Reader, pending: Sequence[Any], now: float) -> View:
        """*pending*: rows of ``store.list_pending``, or session rows."""
        groups = await self._groups.current(tx)
        nodes = await ledger.list_nodes(tx)
        online = self._fleet.online()
        group_of = {node.name: node.group for node in nodes}
        placed = await store.list_placed(tx)
        held = tuple([_held(row, group_of.get(row.node, ""), groups) for row in placed])
        demands = await self._policies.demands(tx)
        asks = self._asks_of(pending, groups, demands)
        rooms = tuple([_room(node, groups) for node in nodes if node.name in online])
        asks, rooms = _kept(asks, rooms, {node.name: node for node in nodes}, groups, demands)
        fair = any(_rules(groups, ask.group).policy.order == "fair" for ask in asks)
        if fair:
            await self._memory.catch_up(tx, groups)
        snapshot = Snapshot(
            pending=asks,
            rooms=rooms,
            held=held,
            reservations=tuple(await scheduling.list_reservations(tx)),
            used=self._memory.used(groups.rules, rooms, held, now) if fair else {},
            ended=await _ended(tx, asks, held),
        )
        return View(snapshot, await self._planned_by(tx, groups, (*pending, *placed), asks), groups)

    def _asks_of(self, pending: Sequence[Any], groups: Groups, demands: Demands) -> tuple[Ask, ...]:
        """Most rows are as they were in the pass before."""
        basis = groups, demands
        known = self._asks if self._basis == basis else {}
        self._basis, self._asks = basis, {}
        for row in pending:
            version, ask = known.get(row.id, (0, None))
            if ask is None or version != row.version:
                ask = ask_of(row, groups, demands)
            self._asks[row.id] = row.version, ask
        return tuple([ask for _, ask in self._asks.values()])

    async def _planned_by(
        self, tx: Reader, groups: Groups, rows: Sequence[Any], asks: Sequence[Ask]
    ) -> dict[str, Policy]:
        """Of all groups, with the limits of those who wait."""
        accounts = list(dict.fromkeys(account for ask in asks for account in ask.accounts))
        assigned = await self._limits.assigned(tx)
        limits = assigned.slots_at_once(accounts)
        names = _names(limits, rows, groups) if limits else {}
        waited_for = {ask.group for ask in asks}
        deserved = {group: assigned.deserved(group) for group in waited_for}
        return {
            group: replace(
                _rules(groups, group).policy,
                limits=limits,
                names=names,
                deserved=deserved.get(group, {}),
            )
            for group in sorted({*groups.rules, *(ask.group for ask in asks)})
        }


def _rules(groups: Groups, name: str) -> GroupRules:
    return groups.rules.get(name, _NO_RULES)


def _names(accounts: Iterable[str], rows: Sequence[Any], groups: Groups) -> dict[str, str]:
    """What people call them."""
    users = {row.owner_id: row.owner for row in rows}
    known = {"user": users, "project": groups.projects, "domain": groups.domains}
    found: dict[str, str] = {}
    for account in accounts:
        kind, _, identifier = account.partition(":")
        called = known.get(kind, {}).get(identifier)
        found[account] = f"this {kind}" if called is None else f"{kind} {called}"
    return found


def _room(node: NodeRow, groups: Groups) -> Room:
    capacity, used = node.capacity.amounts, node.used.amounts
    labels, arch = offers(node.facts, _rules(groups, node.group).labels)
    return Room(
        node=node.name,
        capacity=capacity,
        free={slot: capacity[slot] - used[slot] for slot in capacity},
        group=node.group,
        labels=labels,
        arch=arch,
    )


def _kept(
    asks: Sequence[Ask],
    rooms: Sequence[Room],
    nodes: Mapping[str, NodeRow],
    groups: Groups,
    demands: Demands,
) -> tuple[tuple[Ask, ...], tuple[Room, ...]]:
    """With what each machine can't keep of what is asked for, its own layer included."""
    if not (demands.of_nodes or any(ask.keeps for ask in asks)):
        return tuple(asks), tuple(rooms)
    runtimes = {runtime_of(ask.labels) for ask in asks}
    wanted = {need for ask in asks for need in ask.keeps}
    wanted |= {f"{runtime}:{OWN}" for runtime in runtimes}
    found = []
    for room in rooms:
        lacks = lacks_of(nodes[room.node], runtimes, demands, _rules(groups, room.group))
        found.append(replace(room, lacks=lacks & wanted) if lacks & wanted else room)
    own = {need for room in found for need in room.lacks if need.endswith(f":{OWN}")}
    if own:
        asks = [
            replace(ask, keeps=ask.keeps | ({f"{runtime_of(ask.labels)}:{OWN}"} & own))
            for ask in asks
        ]
    return tuple(asks), tuple(found)


def ask_of(row: Any, groups: Groups, demands: Demands) -> Ask:
    """Of a ``SessionRow`` or a row of ``store.list_pending``."""
    rules, wishes = _rules(groups, row.group_name), wishes_of(row.wishes)
    least = rules.preempts_from
    return Ask(
        session=row.id,
        name=row.name,
        priority=row.priority,
        created_at=seconds(row.created_at),
        slots=_slots(row),
        owner=owner_of(rules, row.owner, groups.called(row.project_id)),
        group=row.group_name,
        labels=frozenset(wishes.needs),
        arch=wishes.arch,
        apart=wishes.apart,
        after=wishes.after,
        after_any=wishes.after_any,
        not_before=wishes.not_before or 0.0,
        give_up_at=wishes.give_up_at,
        limit_s=None if row.time_us is None else seconds(row.time_us),
        reservation=wishes.reservation,
        preempts=least is not None and row.priority >= least,
        accounts=accounts_of(row),
        kind=wishes.kind,
        keeps=needs_of(wishes, row.group_name, row.project_id, demands, rules),
    )


def _held(row: Any, group: str, groups: Groups) -> Held:
    rules, wishes = _rules(groups, group), wishes_of(row.wishes)
    began = seconds(row.status_since if row.started_at is None else row.started_at)
    return Held(
        node=row.node,
        name=row.name,
        slots=_slots(row),
        session=row.id,
        owner=owner_of(rules, row.owner, groups.called(row.project_id)),
        priority=row.priority,
        started_at=began,
        ends_at=None if row.time_us is None else began + seconds(row.time_us),
        apart=wishes.apart,
        preemptible=wishes.preemptible,
        leaving=row.status == S.TERMINATING,
        reservation=wishes.reservation,
        accounts=accounts_of(row),
        kind=wishes.kind,
    )


def _slots(row: Any) -> dict[str, int]:
    return {slot: getattr(row, slot) for slot in SLOTS}


async def _ended(tx: Reader, asks: Sequence[Ask], held: Sequence[Held]) -> dict[str, bool]:
    """Of those that somebody waits for: whether they ended well."""
    wanted = {one for ask in asks for one in ask.after}
    wanted -= {ask.session for ask in asks}
    wanted -= {one.session for one in held}
    found: dict[str, bool] = {}
    for session in sorted(wanted):
        if (result := await _result(tx, session)) is not None:
            found[session] = result == Result.SUCCESS
    return found


async def _result(tx: Reader, session: str) -> str | None:
    """None: it has not ended."""
    row = await store.find_result(tx, session)
    if row is not None:
        status, result = row
        return result if status == S.TERMINATED else None
    return await scheduling.find_result(tx, session) or str(Result.LOST)
