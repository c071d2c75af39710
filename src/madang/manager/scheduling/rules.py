"""The planner; see the package's docstring for the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from madang.manager.scheduling.types import Amounts, Ask, Held, Place, Plan, Room, Wait
from madang.wire.size import format_bytes, format_duration

RESERVE_AFTER_S: Final = 120.0
_SHOWN: Final = {"cpu_milli": "cpu", "mem_bytes": "mem", "disk_bytes": "disk", "pids": "pids"}


def plan(
    pending: Sequence[Ask],
    rooms: Sequence[Room],
    now: float,
    *,
    held: Sequence[Held] = (),
    reserve_after_s: float = RESERVE_AFTER_S,
) -> Plan:
    """Place what fits, in order; say why the rest waits."""
    free = {room.node: dict(room.free) for room in rooms}
    kept: dict[str, Ask] = {}
    most = _most(held)
    places: list[Place] = []
    waits: list[Wait] = []
    said: dict[tuple[tuple[str, int], ...], tuple[str, str]] = {}
    """Why a size does not fit, since anything was taken: long queues hold few sizes."""
    for ask in sorted(pending, key=lambda a: (-a.priority, a.created_at, a.session)):
        size = tuple(ask.slots.items())
        if size not in said:
            room = _choose(ask, rooms, free)
            if room is not None:
                _take(free[room.node], ask.slots)
                places.append(Place(ask.session, room.node))
                said.clear()
                continue
            said[size] = _why(ask, rooms, free, kept, most, now)
        waits.append(Wait(ask.session, *said[size]))
        if now - ask.created_at >= reserve_after_s and _reserve(ask, rooms, free, kept):
            said.clear()
    return Plan(tuple(places), tuple(waits))


def _fits(asked: Amounts, free: Amounts) -> bool:
    return all(amount <= free.get(slot, 0) for slot, amount in asked.items())


def _choose(ask: Ask, rooms: Sequence[Room], free: dict[str, dict[str, int]]) -> Room | None:
    """The machine that is fullest afterwards: large gaps stay for large sessions."""
    fitting = [room for room in rooms if _fits(ask.slots, free[room.node])]
    return min(fitting, key=lambda r: (_left(ask, r, free[r.node]), r.node), default=None)


def _left(ask: Ask, room: Room, free: Amounts) -> float:
    return sum(
        (free[slot] - amount) / room.capacity[slot]
        for slot, amount in ask.slots.items()
        if room.capacity.get(slot)
    )


def _take(free: dict[str, int], slots: Amounts) -> None:
    for slot, amount in slots.items():
        free[slot] = max(0, free.get(slot, 0) - amount)


def _lack(ask: Ask, room: Room, free: Amounts) -> tuple[float, str]:
    """How much is missing at most, as a fraction of the machine, and of which slot."""
    return max(
        ((amount - free.get(slot, 0)) / max(1, room.capacity.get(slot, 0)), slot)
        for slot, amount in ask.slots.items()
    )


def _possible(ask: Ask, rooms: Sequence[Room]) -> list[Room]:
    return [room for room in rooms if _fits(ask.slots, room.capacity)]


def _reserve(
    ask: Ask, rooms: Sequence[Room], free: dict[str, dict[str, int]], kept: dict[str, Ask]
) -> bool:
    """Whether there was a machine to keep room on."""
    if len(kept) == len(rooms):
        return False
    open_rooms = [room for room in _possible(ask, rooms) if room.node not in kept]
    if open_rooms:
        best = min(open_rooms, key=lambda r: (_lack(ask, r, free[r.node])[0], r.node))
        kept[best.node] = ask
        _take(free[best.node], ask.slots)
    return bool(open_rooms)


def _why(
    ask: Ask,
    rooms: Sequence[Room],
    free: dict[str, dict[str, int]],
    kept: dict[str, Ask],
    most: Mapping[tuple[str, str], Held],
    now: float,
) -> tuple[str, str]:
    """Code and text."""
    if not rooms:
        return "node.none", "waits for a machine: none is connected."
    possible = _possible(ask, rooms)
    if not possible:
        return "size.impossible", _impossible(ask, rooms)
    room = min(possible, key=lambda r: (_lack(ask, r, r.free)[0], r.node))
    if (first := kept.get(room.node)) is not None and _fits(ask.slots, room.free):
        waited = format_duration(now - first.created_at)
        text = f"waits its turn: {room.node} is kept for {first.name}, which has waited {waited}."
        return "capacity.reserved", text
    _, slot = _lack(ask, room, free[room.node])
    left, has = free[room.node].get(slot, 0), room.capacity.get(slot, 0)
    text = (
        f"waits for {_SHOWN[slot]}: asks {show(slot, ask.slots[slot])}, "
        f"{show(slot, left)} of {show(slot, has)} free on {room.node}"
    )
    return f"capacity.{_SHOWN[slot]}", text + _holder(room.node, slot, most)


def _most(held: Sequence[Held]) -> dict[tuple[str, str], Held]:
    """By node and slot, who holds most."""
    most: dict[tuple[str, str], Held] = {}
    for one in held:
        for slot, amount in one.slots.items():
            other = most.get((one.node, slot))
            if amount and (other is None or (amount, one.name) > (other.slots[slot], other.name)):
                most[one.node, slot] = one
    return most


def _holder(node: str, slot: str, most: Mapping[tuple[str, str], Held]) -> str:
    holder = most.get((node, slot))
    return "." if holder is None else f"; {holder.name} holds {show(slot, holder.slots[slot])}."


def _impossible(ask: Ask, rooms: Sequence[Room]) -> str:
    slot, most = lacking(ask.slots, [room.capacity for room in rooms])
    return (
        f"no machine is large enough: asks {show(slot, ask.slots[slot])} of {_SHOWN[slot]}, "
        f"the largest has {show(slot, most)}."
    )


def lacking(asked: Amounts, capacities: Sequence[Amounts]) -> tuple[str, int]:
    """The slot for which *asked* is furthest beyond any machine, and the most that one has."""
    most = {slot: max((c.get(slot, 0) for c in capacities), default=0) for slot in asked}
    slot = max(asked, key=lambda s: (asked[s] / max(1, most[s]), s))
    return slot, most[slot]


def show(slot: str, amount: int) -> str:
    """An amount for people."""
    if slot == "cpu_milli":
        return f"{amount / 1000:g}"
    return str(amount) if slot == "pids" else format_bytes(amount)


def slot_name(slot: str) -> str:
    """``mem_bytes`` → ``mem``."""
    return _SHOWN[slot]
