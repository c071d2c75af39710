"""What every order and every placement must keep to, as property tests (needs hypothesis).

    class TestMyOrder(PlannerSuite):
        policy = Policy(order="mine")

The properties are those of whole plans, so that an order or a placement is tested with everything
around it: never more than there is, gangs whole or not at all, nobody where they may not be, each
answered once, the same for the same snapshot in any order.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Final, TypeVar

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from madang.manager.scheduling.planner import plan, plugins
from madang.manager.scheduling.planner.book import Book, shape_of
from madang.manager.scheduling.types import (
    WHOLE,
    Ask,
    Held,
    Place,
    Plan,
    Policy,
    Reservation,
    Room,
    Snapshot,
)  # fmt: skip

NOW: Final = 10_000.0
OWNERS: Final = ("ann", "bob", "cho")
SLOTS: Final = ("cpu_milli", "mem_bytes")
T = TypeVar("T")

_LABELS: Final = ("fast", "near")


@st.composite
def _room(draw: st.DrawFn, number: int) -> Room:
    capacity = {slot: draw(st.integers(1, 12)) for slot in SLOTS}
    return Room(
        node=f"n{number}",
        group=draw(st.sampled_from(("", "b"))),
        capacity=capacity,
        free=dict(capacity),
        devices=(WHOLE,) * draw(st.integers(0, 4)),
        model=draw(st.sampled_from(("t4", "h200"))),
        arch=draw(st.sampled_from(("x86_64", "aarch64"))),
        labels=draw(st.frozensets(st.sampled_from(_LABELS))),
    )


@st.composite
def _held(draw: st.DrawFn, number: int, room: Room) -> Held:
    """Within what is free in *room*."""
    free = [at for at, milli in enumerate(room.devices) if milli == WHOLE]
    devices = draw(st.lists(st.sampled_from(free), unique=True)) if free else []
    started = NOW - draw(st.integers(0, 2000))
    limit = draw(st.none() | st.integers(1, 5000))
    return Held(
        node=room.node, name=f"held-{number}", session=f"h{number}",
        owner=draw(st.sampled_from(OWNERS)),
        slots={slot: draw(st.integers(0, room.free[slot])) for slot in SLOTS},
        devices=tuple((at, draw(st.sampled_from((WHOLE, 500, 250)))) for at in devices),
        priority=draw(st.integers(0, 2)), started_at=started,
        ends_at=None if limit is None else NOW + limit,
        apart=draw(st.sampled_from(("", "", "db"))),
        preemptible=draw(st.booleans()), leaving=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def _ask(draw: st.DrawFn, number: int) -> Ask:
    devices = draw(st.integers(0, 3))
    return Ask(
        session=f"s{number}", name=f"ask-{number}", priority=draw(st.integers(0, 2)),
        created_at=NOW - draw(st.integers(0, 3000)),
        slots={slot: draw(st.integers(0, 8)) for slot in SLOTS},
        owner=draw(st.sampled_from(OWNERS)), group=draw(st.sampled_from(("", "", "b"))),
        devices=devices,
        device_milli=draw(st.sampled_from((WHOLE, 500, 250))) if devices == 1 else WHOLE,
        models=draw(st.sampled_from((frozenset(), frozenset(), frozenset({"t4"})))),
        labels=draw(st.sampled_from((frozenset(), frozenset(), frozenset({"fast"})))),
        arch=draw(st.sampled_from(("", "", "x86_64"))),
        members=draw(st.sampled_from((1, 1, 1, 2, 3))),
        apart=draw(st.sampled_from(("", "", "db"))),
        after=draw(st.sampled_from(((), (), (), ("done",), ("failed",), ("h0",)))),
        not_before=draw(st.sampled_from((0.0, 0.0, 0.0, NOW + 10))),
        give_up_at=draw(st.sampled_from((None, None, NOW - 1, NOW + 1))),
        limit_s=draw(st.none() | st.integers(1, 5000).map(float)),
        reservation=draw(st.sampled_from(("", "", "", "class"))),
        preempts=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Small ones, in which everything that the planner knows occurs."""
    rooms = [draw(_room(number)) for number in range(draw(st.integers(0, 4)))]
    held: list[Held] = []
    for number in range(draw(st.integers(0, 5)) if rooms else 0):
        at = draw(st.integers(0, len(rooms) - 1))
        held.append(draw(_held(number, rooms[at])))
        rooms[at] = _less(rooms[at], held[-1])
    starts_at = NOW + draw(st.sampled_from((-500, -2000, 100, 3000)))
    nodes = frozenset(room.node for room in rooms if draw(st.booleans()))
    reservation = Reservation(
        name="class", nodes=nodes, starts_at=starts_at, ends_at=NOW + 4000, no_show_s=1000
    )
    return Snapshot(
        pending=tuple(draw(_ask(number)) for number in range(draw(st.integers(0, 10)))),
        rooms=tuple(rooms),
        held=tuple(held),
        reservations=(reservation,) if draw(st.booleans()) else (),
        used={owner: draw(st.floats(0, 1e6)) for owner in OWNERS},
        ended={"done": True, "failed": False},
    )


def check(found: Plan, snapshot: Snapshot, policy: Policy, now: float) -> None:
    """Raises AssertionError where a plan does what none may do."""
    asks = {ask.session: ask for ask in snapshot.pending}
    _answered_once(found, asks)
    _within_machines(found, asks, snapshot)
    _where_they_may(found, asks, snapshot, now)
    _within_limits(found, asks, snapshot, policy)
    _only_who_may_be_ended(found, asks, snapshot, policy, now)


def _answered_once(found: Plan, asks: Mapping[str, Ask]) -> None:
    members = Counter(place.session for place in found.places)
    assert all(count == asks[session].members for session, count in members.items()), "half a gang"
    said = [wait.session for wait in (*found.waits, *found.given_up)]
    assert sorted([*members, *said]) == sorted(asks)
    assert all(w.code and w.text.endswith(".") for w in (*found.waits, *found.given_up))


def _within_machines(found: Plan, asks: Mapping[str, Ask], snapshot: Snapshot) -> None:
    rooms = {room.node: room for room in snapshot.rooms}
    taken: defaultdict[tuple[str, str], int] = defaultdict(int)
    left = {room.node: list(room.devices) for room in snapshot.rooms}
    for place in found.places:
        ask = asks[place.session]
        for slot, amount in ask.slots.items():
            taken[place.node, slot] += amount
        assert [milli for _, milli in place.devices] == [ask.device_milli] * ask.devices
        assert len({at for at, _ in place.devices}) == ask.devices
        for at, milli in place.devices:
            left[place.node][at] -= milli
    for (node, slot), amount in taken.items():
        assert amount <= max(0, rooms[node].free.get(slot, 0)), f"{node} is given too much {slot}"
    assert all(milli >= 0 for row in left.values() for milli in row), "a device is given twice"


def _where_they_may(found: Plan, asks: Mapping[str, Ask], snapshot: Snapshot, now: float) -> None:
    rooms = {room.node: room for room in snapshot.rooms}
    apart = {(one.node, one.apart) for one in snapshot.held if one.apart}
    claimed = any(ask.reservation for ask in snapshot.pending)
    claimed |= any(one.reservation for one in snapshot.held)
    for place in found.places:
        ask, room = asks[place.session], rooms[place.node]
        assert ask.group == room.group
        assert ask.labels <= room.labels
        assert ask.arch in ("", room.arch)
        assert not ask.models or room.model in ask.models
        assert now >= ask.not_before
        assert all(snapshot.ended.get(one) for one in ask.after)
        assert ask.give_up_at is None or now < ask.give_up_at
        if ask.apart:
            assert (place.node, ask.apart) not in apart, "two that must be apart"
            apart.add((place.node, ask.apart))
        for one in snapshot.reservations:
            over = now >= one.ends_at or (not claimed and now >= one.starts_at + one.no_show_s)
            if ask.reservation == one.name:
                assert one.starts_at <= now < one.ends_at
                assert place.node in one.nodes
            elif place.node in one.nodes and not over:
                assert now < one.starts_at, "on a machine that is reserved"
                assert ask.limit_s is None or now + ask.limit_s <= one.starts_at


def _within_limits(
    found: Plan, asks: Mapping[str, Ask], snapshot: Snapshot, policy: Policy
) -> None:
    """By group; whoever is above already gets nothing more."""
    groups = {room.node: room.group for room in snapshot.rooms}
    for group in set(groups.values()):
        for owner, limit in policy.limits.items():
            parts: list[tuple[str, int, int]] = []
            for one in snapshot.held:
                if one.owner == owner and groups[one.node] == group:
                    parts += [(slot, amount, 0) for slot, amount in one.slots.items()]
                    parts += [("device_milli", milli, 0) for _, milli in one.devices]
            for place in found.places:
                ask = asks[place.session]
                if ask.owner == owner and ask.group == group:
                    parts += [(slot, amount, amount) for slot, amount in ask.slots.items()]
                    parts += [("device_milli", m, m) for _, m in place.devices]
            for slot, most in limit.items():
                new = sum(n for s, _, n in parts if s == slot)
                all_ = sum(amount for s, amount, _ in parts if s == slot)
                assert not new or all_ <= most, f"{owner} is above the limit of {slot}"


def _only_who_may_be_ended(
    found: Plan, asks: Mapping[str, Ask], snapshot: Snapshot, policy: Policy, now: float
) -> None:
    held = {one.session: one for one in snapshot.held}
    ended = [one.session for one in found.preempts]
    assert len(ended) == len(set(ended))
    waiting = {wait.session for wait in found.waits}
    for one in found.preempts:
        victim, ask = held[one.session], asks[one.wanted_by]
        assert ask.preempts and ask.session in waiting
        assert victim.preemptible and not victim.leaving and victim.priority < ask.priority
        assert now - victim.started_at >= policy.min_run_s
        assert one.grace_s == policy.grace_s


class PlannerSuite:
    """Derive from it and name a policy; pytest collects the tests."""

    policy: ClassVar[Policy] = Policy()

    @given(snapshots(), st.booleans())
    @settings(
        max_examples=60, deadline=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )  # fmt: skip
    def test_no_plan_does_what_none_may_do(self, snapshot: Snapshot, limited: bool) -> None:
        limits = {"ann": {"cpu_milli": 6, "device_milli": 1500}} if limited else {}
        policy = replace(self.policy, limits=limits)
        check(plan(snapshot, policy, NOW), snapshot, policy, NOW)

    @given(snapshots(), st.randoms())
    @settings(
        max_examples=30, deadline=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )  # fmt: skip
    def test_the_order_of_the_snapshot_changes_nothing(
        self, snapshot: Snapshot, rng: random.Random
    ) -> None:
        def shuffled(parts: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(rng.sample(parts, len(parts)))

        other = replace(
            snapshot,
            pending=shuffled(snapshot.pending),
            rooms=shuffled(snapshot.rooms),
            held=shuffled(snapshot.held),
        )
        assert plan(snapshot, self.policy, NOW) == plan(other, self.policy, NOW)

    @given(snapshots())
    @settings(
        max_examples=20, deadline=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )  # fmt: skip
    def test_scores_are_the_same_in_all_three_ways(self, snapshot: Snapshot) -> None:
        assume(snapshot.rooms and snapshot.pending)
        shapes = list({shape_of(ask, SLOTS, 0): None for ask in snapshot.pending})
        book = Book(snapshot.rooms, SLOTS, shapes)
        placement = plugins.placement(self.policy.placement)(book, self.policy)
        nodes, numbers = range(len(snapshot.rooms)), np.arange(len(shapes))
        slack = book.slack(nodes, numbers)
        block = placement.block(nodes, numbers, slack)
        for shape in numbers.tolist():
            row = placement.row(shape)
            for node in np.flatnonzero(book.fits(shape)).tolist():
                assert row[node] == block[node, shape] == placement.score(node, shape)

    @given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
    @settings(
        max_examples=8, deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )  # fmt: skip
    def test_a_gang_starts_in_the_end_among_a_stream_of_others(
        self, run: int, rate: int, members: int
    ) -> None:
        """Nobody waits for ever: the stream has enough for all machines, for ever."""
        assert starts_among_others(self.policy, run=run, rate=rate, members=members)

    @given(st.data())
    @settings(
        max_examples=20, deadline=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )  # fmt: skip
    def test_backfill_never_delays_the_one_that_keeps_room(self, data: st.DataObject) -> None:
        """It starts no later with a stream of others behind it than without (limits are true)."""
        policy = replace(self.policy, order="fifo", reserve_after_s=0.0, reserve_at_most=1)
        running = [data.draw(_runs(number)) for number in range(data.draw(st.integers(0, 6)))]
        first = replace(data.draw(_needs(0)), session="a-first", created_at=-1.0)
        others = [data.draw(_needs(number)) for number in range(data.draw(st.integers(1, 12)))]
        alone = start_of(first, running, [], policy)
        assert start_of(first, running, others, policy) <= alone


@st.composite
def _needs(draw: st.DrawFn, number: int) -> Ask:
    devices = draw(st.integers(0, 2))
    return Ask(
        session=f"later-{number}", name=f"later-{number}", priority=0,
        created_at=float(draw(st.integers(0, 12))),
        slots={"cpu_milli": draw(st.integers(1, 4))}, devices=devices,
        device_milli=draw(st.sampled_from((WHOLE, 500))) if devices == 1 else WHOLE,
        members=draw(st.sampled_from((1, 1, 2))),
        limit_s=draw(st.none() | st.integers(1, 12).map(float)),
    )  # fmt: skip


@st.composite
def _runs(draw: st.DrawFn, number: int) -> Ask:
    """Something that was placed before the first; all of these have a limit."""
    one = draw(_needs(number))
    limit = float(draw(st.integers(1, 15)))
    return replace(one, session=f"old-{number}", created_at=-2.0, members=1, limit_s=limit)


def start_of(first: Ask, before: list[Ask], later: list[Ask], policy: Policy) -> float:
    """When *first* starts on two machines, if what has no limit never ends."""
    rooms = {
        node: Room(
            node=node, capacity={"cpu_milli": 4}, free={"cpu_milli": 4}, devices=(WHOLE, WHOLE)
        )
        for node in ("m", "n")
    }
    held: list[Held] = []
    pending = list(before)

    def start(now: float) -> bool:
        snapshot = Snapshot(pending=tuple(pending), rooms=tuple(rooms.values()), held=tuple(held))
        found = plan(snapshot, policy, now)
        asks = {ask.session: ask for ask in pending}
        for place in found.places:
            ask = asks[place.session]
            held.append(
                Held(
                    node=place.node, name=ask.name, session=ask.session, slots=ask.slots,
                    devices=place.devices, started_at=now,
                    ends_at=None if ask.limit_s is None else now + ask.limit_s,
                )
            )  # fmt: skip
            rooms[place.node] = _less(rooms[place.node], held[-1])
        started = {place.session for place in found.places}
        pending[:] = [ask for ask in pending if ask.session not in started]
        return first.session in started

    start(-1.0)
    pending[:] = [first]
    for now in range(60):
        for one in [one for one in held if one.ends_at is not None and one.ends_at <= now]:
            held.remove(one)
            rooms[one.node] = _less(rooms[one.node], one, sign=-1)
        pending += [ask for ask in later if ask.created_at == now]
        if start(float(now)):
            return float(now)
    return float("inf")


def _less(room: Room, one: Held, sign: int = 1) -> Room:
    devices = list(room.devices)
    for at, milli in one.devices:
        devices[at] -= sign * milli
    free = {slot: left - sign * one.slots.get(slot, 0) for slot, left in room.free.items()}
    return replace(room, free=free, devices=tuple(devices))


def starts_among_others(policy: Policy, *, run: int, rate: int, members: int) -> bool:
    """Whether a gang of whole machines starts while small ones keep coming."""
    machines = tuple(
        Room(node=f"n{n}", capacity={"cpu_milli": 4}, free={"cpu_milli": 4}) for n in range(4)
    )
    gang = Ask(
        session="gang", name="gang", priority=0, created_at=0.0, owner="ann",
        slots={"cpu_milli": 4}, members=members, limit_s=10.0,
    )  # fmt: skip
    policy = replace(policy, reserve_after_s=20.0)
    running: list[tuple[int, Place, Ask]] = []
    pending = [gang]
    for now in range(150):
        running = [one for one in running if one[0] > now]
        pending += [
            Ask(
                session=f"small-{now}-{n}", name="small", priority=0, created_at=float(now),
                owner="bob", slots={"cpu_milli": 2}, limit_s=float(run),
            )
            for n in range(rate)
        ]  # fmt: skip
        used = Counter[str]()
        for _, place, ask in running:
            used[place.node] += ask.slots["cpu_milli"]
        found = plan(
            Snapshot(
                pending=tuple(pending),
                rooms=tuple(replace(r, free={"cpu_milli": 4 - used[r.node]}) for r in machines),
                held=tuple(
                    Held(
                        node=place.node, name=ask.name, session=ask.session, owner=ask.owner,
                        slots=ask.slots, started_at=end - run, ends_at=float(end),
                    )
                    for end, place, ask in running
                ),
            ),
            policy,
            float(now),
        )  # fmt: skip
        placed = {place.session for place in found.places}
        if "gang" in placed:
            return True
        asks = {ask.session: ask for ask in pending}
        running += [(now + run, place, asks[place.session]) for place in found.places]
        pending = [ask for ask in pending if ask.session not in placed][:200]
    return False
