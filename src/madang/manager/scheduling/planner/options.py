"""What would let a waiting session start: tried with the planner before it is said.

Each change is put in the place of the ask, as if it were made now, and planned with all the others;
it is offered only if the session starts then. Nobody else is placed because of it who would not
have been, and the offer holds as long as nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from madang.manager.scheduling.planner.plan import plan
from madang.manager.scheduling.planner.reasons import show, slot_name
from madang.manager.scheduling.types import WHOLE, Ask, Held, Policy, Room, Snapshot
from madang.wire.size import format_duration

ENDS_TRIED: Final = 8
"""Sessions whose end is tried."""
LIMITS_S: Final = (3600.0, 600.0)


@dataclass(frozen=True, slots=True)
class Option:
    """*ask* in place of the one that waits; or, if *after* is named, the same ask once it ended."""

    text: str
    ask: Ask
    after: str = ""


def options(
    snapshot: Snapshot, policy: Policy | Mapping[str, Policy], session: str, now: float
) -> list[Option]:
    """At most one of each kind: fewer devices, members, slots; another group; less time; an end.

    Raises LookupError where *session* is not pending.
    """
    ask = next((one for one in snapshot.pending if one.session == session), None)
    if ask is None:
        raise LookupError(f"{session} is not pending")
    found: list[Option] = []
    for kind in (_devices, _members, _slots, _time):
        for option in kind(ask):
            if starts(snapshot, policy, option.ask, now):
                found.append(option)
                break
    groups = sorted({room.group for room in snapshot.rooms} - {ask.group})
    for group in groups:
        option = Option(f"starts now in group {group}", replace(ask, group=group))
        if starts(snapshot, policy, option.ask, now):
            found.append(option)
            break
    found += _ends(snapshot, policy, ask, now)
    return found


def starts(snapshot: Snapshot, policy: Policy | Mapping[str, Policy], ask: Ask, now: float) -> bool:
    """Whether *ask*, made now in the place of the one of the same id, is placed at once."""
    others = tuple(one for one in snapshot.pending if one.session != ask.session)
    changed = replace(snapshot, pending=(*others, replace(ask, created_at=now)))
    return any(place.session == ask.session for place in plan(changed, policy, now).places)


def _devices(ask: Ask) -> Iterator[Option]:
    count = ask.devices
    while count > 1:
        count //= 2
        yield Option(f"starts now with gpu {count}", replace(ask, devices=count))
    if ask.devices:
        milli = ask.device_milli
        while milli > WHOLE // 4:
            milli //= 2
            smaller = replace(ask, devices=1, device_milli=milli)
            yield Option(f"starts now with gpu {milli / WHOLE:g}", smaller)


def _members(ask: Ask) -> Iterator[Option]:
    count = ask.members
    while count > 1:
        count //= 2
        yield Option(f"starts now with {count} members", replace(ask, members=count))


def _slots(ask: Ask) -> Iterator[Option]:
    for part in (2, 4):
        for slot in sorted(ask.slots):
            amount = ask.slots[slot] // part
            if amount:
                text = f"starts now with {slot_name(slot)} {show(slot, amount)}"
                yield Option(text, replace(ask, slots={**ask.slots, slot: amount}))


def _time(ask: Ask) -> Iterator[Option]:
    for limit_s in LIMITS_S:
        if ask.limit_s is None or limit_s < ask.limit_s:
            text = f"starts now with a time limit of {format_duration(limit_s)}"
            yield Option(text, replace(ask, limit_s=limit_s))


def _ends(
    snapshot: Snapshot, policy: Policy | Mapping[str, Policy], ask: Ask, now: float
) -> list[Option]:
    """The end of one other session, the earliest that is enough."""
    nodes = {room.node for room in snapshot.rooms if room.group == ask.group}
    by_session: dict[str, list[Held]] = {}
    for one in snapshot.held:
        if one.node in nodes:
            by_session.setdefault(one.session or one.name, []).append(one)

    def when(parts: list[Held]) -> tuple[bool, float, str]:
        first = parts[0]
        return first.ends_at is None, first.ends_at or first.started_at, first.name

    for parts in sorted(by_session.values(), key=when)[:ENDS_TRIED]:
        later = without(snapshot, parts)
        # It keeps its turn: nothing is asked for anew.
        if any(place.session == ask.session for place in plan(later, policy, now).places):
            return [Option(f"starts after {parts[0].name} ends", ask, after=parts[0].name)]
    return []


def without(snapshot: Snapshot, ended: list[Held]) -> Snapshot:
    """As if these had ended."""
    on: dict[str, list[Held]] = {}
    for one in ended:
        on.setdefault(one.node, []).append(one)
    return replace(
        snapshot,
        rooms=tuple(
            _freed(room, on[room.node]) if room.node in on else room for room in snapshot.rooms
        ),
        held=tuple(one for one in snapshot.held if one not in ended),
    )


def _freed(room: Room, ended: list[Held]) -> Room:
    free, devices = dict(room.free), list(room.devices)
    for one in ended:
        for slot, amount in one.slots.items():
            free[slot] = free.get(slot, 0) + amount
        for number, milli in one.devices:
            devices[number] += milli
    return replace(room, free=free, devices=tuple(devices))
