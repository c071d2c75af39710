"""What the planner must never do, and what must end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from madang.manager.scheduling import planner
from madang.manager.scheduling.types import Ask, Held, Plan, Policy, Room, Snapshot

SLOTS = ("cpu_milli", "mem_bytes")


def plan(
    pending: Sequence[Ask],
    rooms: Sequence[Room],
    now: float,
    *,
    held: Sequence[Held] = (),
    reserve_after_s: float = 120.0,
) -> Plan:
    snapshot = Snapshot(pending=tuple(pending), rooms=tuple(rooms), held=tuple(held))
    return planner.plan(snapshot, Policy(reserve_after_s=reserve_after_s), now)


@st.composite
def amounts(draw: st.DrawFn, top: int = 10) -> dict[str, int]:
    return {slot: draw(st.integers(1, top)) for slot in SLOTS}


@st.composite
def rooms(draw: st.DrawFn) -> list[Room]:
    found = []
    for number in range(draw(st.integers(0, 4))):
        capacity = draw(amounts())
        free = {slot: draw(st.integers(0, capacity[slot])) for slot in SLOTS}
        found.append(Room(node=f"n{number}", capacity=capacity, free=free))
    return found


@st.composite
def asks(draw: st.DrawFn) -> list[Ask]:
    return [
        Ask(
            session=f"s{number}",
            name=f"name-{number}",
            priority=draw(st.integers(0, 2)),
            created_at=float(draw(st.integers(0, 1000))),
            slots=draw(amounts()),
        )
        for number in range(draw(st.integers(0, 12)))
    ]


@given(asks(), rooms(), st.integers(0, 2000))
@settings(max_examples=300)
def test_no_machine_is_given_more_than_is_free(a: list[Ask], r: list[Room], now: int) -> None:
    found = plan(a, r, float(now), reserve_after_s=100)
    by_id = {ask.session: ask for ask in a}
    taken: defaultdict[tuple[str, str], int] = defaultdict(int)
    for place in found.places:
        for slot, amount in by_id[place.session].slots.items():
            taken[place.node, slot] += amount
    free = {room.node: room.free for room in r}
    assert all(amount <= free[node][slot] for (node, slot), amount in taken.items())


@given(asks(), rooms(), st.integers(0, 2000))
def test_each_is_placed_or_told_why_exactly_once(a: list[Ask], r: list[Room], now: int) -> None:
    found = plan(a, r, float(now), reserve_after_s=100)
    answered = [p.session for p in found.places] + [w.session for w in found.waits]
    assert sorted(answered) == sorted(ask.session for ask in a)
    assert all(wait.code and wait.text.endswith(".") for wait in found.waits)


@given(asks(), rooms(), st.integers(0, 2000), st.randoms())
def test_the_order_of_the_input_changes_nothing(a: list[Ask], r: list[Room], now: int, rng) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(a)
    rng.shuffle(shuffled)
    first = plan(a, r, float(now), reserve_after_s=100)
    assert first == plan(shuffled, r, float(now), reserve_after_s=100)


@given(asks(), rooms())
def test_before_anybody_reserves_nothing_that_fits_is_left(a: list[Ask], r: list[Room]) -> None:
    found = plan(a, r, 0.0, reserve_after_s=1e9)
    by_id = {ask.session: ask for ask in a}
    free = {room.node: dict(room.free) for room in r}
    for place in found.places:
        for slot, amount in by_id[place.session].slots.items():
            free[place.node][slot] -= amount
    for wait in found.waits:
        slots = by_id[wait.session].slots
        assert not any(all(slots[s] <= f[s] for s in SLOTS) for f in free.values())


@given(st.data())
@settings(max_examples=100)
def test_nobody_waits_for_ever_behind_smaller_ones(data: st.DataObject) -> None:
    """A stream of small sessions, each ending after a while; the large one starts all the same."""
    capacity = {"cpu_milli": 10, "mem_bytes": 10}
    large = Ask(
        session="large", name="large", priority=0, created_at=0.0,
        slots={"cpu_milli": data.draw(st.integers(6, 10)), "mem_bytes": 1},
    )  # fmt: skip
    running: dict[str, tuple[float, int]] = {"small-0": (3.0, 5)}
    for now in range(1, 200):
        running = {name: (end, cpu) for name, (end, cpu) in running.items() if end > now}
        free = 10 - sum(cpu for _, cpu in running.values())
        room = Room(node="n", capacity=capacity, free={"cpu_milli": free, "mem_bytes": 10})
        small = [
            Ask(
                session=f"small-{now}-{number}", name="small", priority=0,
                created_at=float(now),
                slots={"cpu_milli": data.draw(st.integers(1, 5)), "mem_bytes": 1},
            )
            for number in range(2)
        ]  # fmt: skip
        found = plan([large, *small], [room], float(now), reserve_after_s=20)
        placed = {place.session for place in found.places}
        if "large" in placed:
            return
        for ask in small:
            if ask.session in placed:
                running[ask.session] = (now + 6.0, ask.slots["cpu_milli"])
    raise AssertionError("the large session never started")


def test_the_reason_names_the_slot_the_room_and_who_holds_it() -> None:
    room = Room(
        node="n1",
        capacity={"cpu_milli": 4000, "mem_bytes": 8 << 30},
        free={"cpu_milli": 500, "mem_bytes": 8 << 30},
    )
    ask = Ask(
        session="s", name="x", priority=0, created_at=0,
        slots={"cpu_milli": 2000, "mem_bytes": 1},
    )  # fmt: skip
    held = [Held(node="n1", name="calm-otter", slots={"cpu_milli": 3500, "mem_bytes": 5})]
    wait = plan([ask], [room], 0, held=held).waits[0]
    assert wait.code == "capacity.cpu"
    assert wait.text == "waits for cpu: asks 2, 0.5 of 4 free on n1; calm-otter holds 3.5."


def test_a_reason_tells_what_is_free_when_its_turn_comes() -> None:
    room = Room(node="n", capacity={"cpu_milli": 9000}, free={"cpu_milli": 5000})
    queue = [
        Ask(session=f"s{at}", name="x", priority=0, created_at=at, slots={"cpu_milli": milli})
        for at, milli in enumerate((8000, 8000, 2000, 8000))
    ]
    found = plan(queue, [room], 10)
    texts = [wait.text for wait in found.waits]
    assert [place.session for place in found.places] == ["s2"]
    assert texts == [f"waits for cpu: asks 8, {n} of 9 free on n." for n in (5, 5, 3)]


def test_no_machine_and_too_small_machines_are_told_apart() -> None:
    ask = Ask(session="s", name="x", priority=0, created_at=0, slots={"pids": 100})
    assert plan([ask], [], 0).waits[0].code == "node.none"
    room = Room(node="n", capacity={"pids": 50}, free={"pids": 50})
    assert plan([ask], [room], 0).waits[0].code == "size.impossible"


def test_a_reserved_machine_is_told_to_those_who_would_fit() -> None:
    room = Room(node="n", capacity={"cpu_milli": 10_000}, free={"cpu_milli": 5000})
    large = Ask(session="l", name="large", priority=0, created_at=0, slots={"cpu_milli": 8000})
    small = Ask(session="s", name="small", priority=0, created_at=200, slots={"cpu_milli": 1000})
    found = plan([large, small], [room], 201, reserve_after_s=120)
    assert not found.places
    assert found.waits[1].code == "capacity.reserved"
    assert "large" in found.waits[1].text
