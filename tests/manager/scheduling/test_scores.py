"""Plans are those of the slow, plain way: each row of scores computed anew for each ask."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from madang.manager.scheduling.planner import passes, plan
from madang.manager.scheduling.planner.scores import Scores
from madang.manager.scheduling.types import Ask, Held, Plan, Policy, Room, Snapshot
from madang.testing.planners import NOW, snapshots

QUICK = settings(
    max_examples=60, deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)  # fmt: skip
POLICIES = st.builds(
    Policy,
    order=st.sampled_from(("fifo", "fair", "short")),
    placement=st.sampled_from(("pack", "spread", "fragments")),
    reserve_after_s=st.sampled_from((0.0, 120.0, 1e18)),
)


class Afresh(Scores):
    """Remembers nothing."""

    def best(self, shape: int) -> int | None:
        self._current.clear()
        return super().best(shape)


def plain(snapshot: Snapshot, policy: Policy) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "Scores", Afresh)
        return plan(snapshot, policy, NOW)


@given(snapshots(), POLICIES)
@QUICK
def test_small_plans_are_those_of_the_plain_way(snapshot: Snapshot, policy: Policy) -> None:
    assert plan(snapshot, policy, NOW) == plain(snapshot, policy)


@given(st.integers(0, 1 << 32), POLICIES)
@QUICK
def test_larger_plans_are_those_of_the_plain_way(seed: int, policy: Policy) -> None:
    """So large that many machines change between two asks of one shape."""
    snapshot = cluster(random.Random(seed))
    assert plan(snapshot, policy, NOW) == plain(snapshot, policy)


def cluster(rng: random.Random) -> Snapshot:
    rooms, held = [], []
    for number in range(rng.randint(5, 40)):
        capacity = {"cpu_milli": rng.choice((8, 16, 32)), "mem_bytes": rng.choice((7, 13, 29))}
        free = {slot: rng.randint(0, amount) for slot, amount in capacity.items()}
        devices = tuple(rng.choice((1000, 500, 0)) for _ in range(rng.choice((0, 1, 4))))
        room = Room(node=f"n{number:02d}", capacity=capacity, free=free, devices=devices)
        rooms.append(replace(room, labels=frozenset({"fast"} if rng.random() < 0.5 else ())))
        rest = {slot: capacity[slot] - free[slot] for slot in capacity}
        ends_at = rng.choice((None, NOW + rng.randint(1, 2000)))
        held.append(Held(node=room.node, name=f"h{number}", slots=rest, ends_at=ends_at))
    kinds = [_kind(rng) for _ in range(rng.randint(1, 12))]
    asks = [
        replace(
            rng.choice(kinds), session=f"s{number}", name=f"s{number}",
            created_at=NOW - rng.randint(0, 1000), owner=rng.choice("abc"),
        )
        for number in range(rng.randint(1, 150))
    ]  # fmt: skip
    return Snapshot(pending=tuple(asks), rooms=tuple(rooms), held=tuple(held))


def _kind(rng: random.Random) -> Ask:
    devices = rng.choice((0, 0, 1, 1, 2))
    return Ask(
        session="", name="", priority=0, created_at=0.0, devices=devices,
        slots={"cpu_milli": rng.randint(0, 8), "mem_bytes": rng.randint(0, 5)},
        device_milli=rng.choice((1000, 500, 300)) if devices == 1 else 1000,
        labels=frozenset({"fast"} if rng.random() < 0.2 else ()),
        members=rng.choice((1, 1, 1, 1, 3)), apart=rng.choice(("", "", "", "db")),
        limit_s=rng.choice((None, 100.0, 1500.0)),
    )  # fmt: skip


def test_nothing_is_lent_that_another_has_taken_since() -> None:
    """2 of 8 are free beside the keeper. *stays* takes them, so 6 are left to lend, not 7."""
    machine = Room(node="n", capacity={"cpu_milli": 8}, free={"cpu_milli": 8}, devices=(0,))
    runs = Held(node="n", name="old", slots={}, devices=((0, 1000),), ends_at=NOW + 1000)

    def ask(session: str, at: float, cpu: int, **more: object) -> Ask:
        values = {"name": session, "priority": 0, "slots": {"cpu_milli": cpu}} | more
        return Ask(session=session, created_at=at, **values)  # type: ignore[arg-type]

    pending = (
        ask("large", 0, 6, devices=1),
        ask("ends-late", 1, 7, limit_s=5000.0),
        ask("stays", 2, 2),
        ask("ends-soon", 3, 7, limit_s=10.0),
        ask("smaller", 4, 6, limit_s=10.0),
    )
    snapshot = Snapshot(pending=pending, rooms=(machine,), held=(runs,))
    found = plan(snapshot, Policy(reserve_after_s=0.0), NOW)
    assert [place.session for place in found.places] == ["stays", "smaller"]
