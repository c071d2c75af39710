"""Every built-in order and placement under the property suite, and what each is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from madang.manager.scheduling.planner import plan, plugins
from madang.manager.scheduling.planner.book import Floats, Ints
from madang.manager.scheduling.planner.order import decayed, mean_share
from madang.manager.scheduling.planner.placement import Pack
from madang.manager.scheduling.planner.plugins import UnknownPlugin
from madang.manager.scheduling.types import Ask, Held, Place, Policy, Reservation, Room, Snapshot
from madang.testing.planners import PlannerSuite


class TestFifo(PlannerSuite):
    policy = Policy()


class TestShort(PlannerSuite):
    policy = Policy(order="short", reserve_after_s=0.0, reserve_at_most=1)


class TestDominantShare(PlannerSuite):
    policy = Policy(order="drf", placement="spread")


class TestFairShare(PlannerSuite):
    policy = Policy(order="fair", weights={"ann": 3.0}, reserve_after_s=0.0)


class TestFragments(PlannerSuite):
    policy = Policy(placement="fragments")


def ask(session: str, **more: object) -> Ask:
    values = {"name": session, "priority": 0, "created_at": 0.0, "slots": {"cpu_milli": 1000}}
    return Ask(session=session, **(values | more))  # type: ignore[arg-type]


def room(node: str = "n", cpu: int = 4000, **more: object) -> Room:
    capacity = {"cpu_milli": cpu}
    values = {"capacity": capacity, "free": capacity}
    return Room(node=node, **(values | more))  # type: ignore[arg-type]


def held(node: str, name: str, cpu: int, **more: object) -> Held:
    return Held(node=node, name=name, session=name, slots={"cpu_milli": cpu}, **more)  # type: ignore[arg-type]


def run(
    *pending: Ask,
    rooms: tuple[Room, ...] = (),
    now: float = 0.0,
    policy: Policy | None = None,
    **more: object,
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Nodes by session, code by session that waits or was given up."""
    snapshot = Snapshot(pending=pending, rooms=rooms or (room(),), **more)  # type: ignore[arg-type]
    found = plan(snapshot, policy or Policy(), now)
    places: dict[str, list[str]] = {}
    for place in found.places:
        places.setdefault(place.session, []).append(place.node)
    return places, {w.session: w.code for w in (*found.waits, *found.given_up)}


# Order


def test_the_one_with_less_comes_first_and_they_take_turns() -> None:
    queue = [ask(f"a{n}", owner="ann", created_at=n) for n in range(4)]
    queue += [ask(f"b{n}", owner="bob", created_at=10 + n) for n in range(4)]
    places, _ = run(*queue, policy=Policy(order="drf"))
    assert sorted(places) == ["a0", "a1", "b0", "b1"]


def test_the_dominant_share_counts_not_the_sum() -> None:
    machine = room(
        capacity={"cpu_milli": 10, "mem_bytes": 100}, free={"cpu_milli": 3, "mem_bytes": 90}
    )
    other = {"ann": {"cpu_milli": 2, "mem_bytes": 8}, "bob": {"cpu_milli": 5, "mem_bytes": 1}}
    pending = [ask(o, owner=o, slots={"cpu_milli": 2}) for o in ("bob", "ann")]
    holds = tuple(Held(node="n", name=o, owner=o, slots=s) for o, s in other.items())
    places, _ = run(*pending, rooms=(machine,), held=holds, policy=Policy(order="drf"))
    assert list(places) == ["ann"]


def test_weights_give_more_turns() -> None:
    queue = [ask(f"{o}{n}", owner=o, created_at=n) for n in range(4) for o in ("ann", "bob")]
    places, _ = run(*queue, policy=Policy(order="drf", weights={"bob": 3.0}))
    assert sorted(places) == ["ann0", "bob0", "bob1", "bob2"]


def test_who_used_less_in_the_past_comes_first_under_fair_share() -> None:
    queue = [ask("a", owner="ann", created_at=0), ask("b", owner="bob", created_at=1)]
    used = {"ann": 1e6, "bob": 1e3}
    one = (room(cpu=1000),)
    assert list(run(*queue, rooms=one, used=used, policy=Policy(order="fair"))[0]) == ["b"]
    assert list(run(*queue, rooms=one, used=used, policy=Policy(order="drf"))[0]) == ["a"]


def test_use_is_half_forgotten_after_a_half_life() -> None:
    assert decayed(100.0, 7.0, 7.0) == pytest.approx(50.0)
    used = 0.0
    for _ in range(10_000):  # a constant share of a half
        used = decayed(used, 1.0, 500.0) + 0.5
    assert mean_share(used, 500.0) == pytest.approx(0.5, rel=0.01)


def test_short_ones_come_first_but_wait_counts() -> None:
    policy = Policy(order="short", stretch=10.0)
    long_, short = ask("long", limit_s=1000.0), ask("short", created_at=100.0, limit_s=10.0)
    assert list(run(long_, short, rooms=(room(cpu=1000),), now=100, policy=policy)[0]) == ["short"]
    later = replace(short, created_at=9_950.0)
    assert list(run(long_, later, rooms=(room(cpu=1000),), now=1e4, policy=policy)[0]) == ["long"]


def test_priority_goes_before_any_share() -> None:
    queue = [ask("a", owner="ann"), ask("b", owner="bob", priority=1)]
    used = {"bob": 1e6}
    places, _ = run(*queue, rooms=(room(cpu=1000),), used=used, policy=Policy(order="fair"))
    assert list(places) == ["b"]


# Placement and devices


def test_a_share_goes_where_least_stays_or_where_most_stays() -> None:
    machine = (room(devices=(1000, 600, 0)),)
    half = ask("s", devices=1, device_milli=500)
    found = plan(Snapshot(pending=(half,), rooms=machine), Policy(), 0)
    assert found.places == (Place("s", "n", ((1, 500),)),)
    found = plan(Snapshot(pending=(half,), rooms=machine), Policy(placement="spread"), 0)
    assert found.places == (Place("s", "n", ((0, 500),)),)


def test_whole_devices_are_those_that_nobody_shares() -> None:
    machine = (room(devices=(500, 1000, 1000)),)
    found = plan(Snapshot(pending=(ask("s", devices=2),), rooms=machine), Policy(), 0)
    assert found.places[0].devices == ((1, 1000), (2, 1000))
    assert run(ask("s", devices=3), rooms=machine)[1] == {"s": "capacity.gpu"}


def test_fragments_leave_whole_devices_whole() -> None:
    """A share goes beside another share, although the fullest machine has a whole device left."""
    shared = room("a", cpu=8000, devices=(1000, 500), free={"cpu_milli": 8000})
    full = room("b", cpu=8000, devices=(1000, 0), free={"cpu_milli": 2000})
    half = ask("s", devices=1, device_milli=500)
    others = [ask(f"w{n}", devices=1, created_at=n + 1) for n in range(3)]
    snapshot = Snapshot(pending=(half, *others), rooms=(shared, full))
    found = plan(snapshot, Policy(placement="fragments"), 0)
    assert found.places[0] == Place("s", "a", ((1, 500),))


def test_fragments_do_not_take_the_cpus_beside_free_devices() -> None:
    """Without a device it goes where the CPUs are not needed, be that the emptier machine."""
    with_devices = room("a", cpu=16_000, devices=(1000,) * 4)
    without = room("b", cpu=64_000, devices=(1000,))
    pending = [ask("c", slots={"cpu_milli": 8000})]
    pending += [ask("g", devices=1, slots={"cpu_milli": 4000}, created_at=1)]
    snapshot = Snapshot(pending=tuple(pending), rooms=(with_devices, without))
    assert plan(snapshot, Policy(placement="fragments"), 0).places[0].node == "b"


def test_an_unknown_plugin_is_named_with_those_there_are() -> None:
    with pytest.raises(UnknownPlugin, match="no order 'fairest'; there are drf, fair, fifo, short"):
        run(ask("s"), policy=Policy(order="fairest"))
    with pytest.raises(UnknownPlugin, match="there are fragments, pack, spread"):
        run(ask("s"), policy=Policy(placement="x"))


# Gangs, constraints, time


def test_a_gang_is_placed_whole_or_leaves_everything_as_it_was() -> None:
    rooms = (room("a", 2000), room("b", 1000))
    places, codes = run(ask("g", members=4), ask("s", created_at=1), rooms=rooms)
    assert places == {"s": ["b"]}
    assert codes == {"g": "size.impossible"}
    assert run(ask("g", members=3), rooms=rooms)[0] == {"g": ["b", "a", "a"]}


class Picky(Pack):
    """A plugin that wants nothing on machine b."""

    def row(self, shape: int) -> Floats:
        return np.where([room.node == "b" for room in self._book.rooms], np.inf, super().row(shape))

    def block(self, nodes: Sequence[int], shapes: Ints, slack: Floats) -> Floats:
        found = super().block(nodes, shapes, slack)
        found[[self._book.rooms[node].node == "b" for node in nodes]] = np.inf
        return found

    def score(self, node: int, shape: int) -> float:
        return np.inf if self._book.rooms[node].node == "b" else super().score(node, shape)


def test_a_gang_that_a_plugin_stops_half_way_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(plugins.PLACEMENTS, "picky", Picky)
    rooms = (room("a", 2000), room("b", 1000))
    policy = Policy(placement="picky")
    two = ask("s", created_at=1, slots={"cpu_milli": 2000})
    places, codes = run(ask("g", members=3), two, rooms=rooms, policy=policy)
    assert places == {"s": ["a"]}
    assert codes == {"g": "capacity.gang"}


def test_members_that_must_be_apart_are() -> None:
    rooms = (room("a"), room("b"))
    places, _ = run(ask("g", members=2, apart="db"), rooms=rooms)
    assert sorted(places["g"]) == ["a", "b"]
    assert run(ask("g", members=3, apart="db"), rooms=rooms)[1] == {"g": "size.impossible"}
    beside = (held("a", "x", 0, apart="db"),)
    assert run(ask("s", apart="db"), rooms=rooms, held=beside)[0] == {"s": ["b"]}


def test_constraints_that_no_machine_meets_are_named() -> None:
    wanted = ask("s", labels=frozenset({"fast"}), arch="aarch64", models=frozenset({"h200"}))
    found = plan(Snapshot(pending=(wanted,), rooms=(room(),)), Policy(), 0)
    assert found.waits[0].code == "constraint.none"
    assert found.waits[0].text == (
        "no machine that is large enough has label fast, architecture aarch64, gpu model h200."
    )


def test_times_and_dependencies_come_before_room() -> None:
    _, codes = run(
        ask("later", not_before=10.0),
        ask("waits", after=("x",)),
        ask("failed", after=("y",)),
        ask("old", give_up_at=5.0),
        ask("ready", after=("z",)),
        now=5.0,
        ended={"y": False, "z": True},
    )
    assert codes == {
        "later": "time.later",
        "waits": "dependency.waits",
        "failed": "dependency.failed",
        "old": "pending.timeout",
    }


@pytest.mark.parametrize(
    "wrong", [{"members": 0}, {"devices": 2, "device_milli": 500}, {"device_milli": 0}]
)
def test_an_ask_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="s: "):
        ask("s", **wrong)


def test_a_policy_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Policy(weights={"ann": 0.0})


def test_a_limit_is_the_reason_before_room_is() -> None:
    policy = Policy(limits={"ann": {"cpu_milli": 1500}})
    found = plan(
        Snapshot(pending=(ask("a", owner="ann"), ask("b", owner="ann")), rooms=(room(),)), policy, 0
    )
    assert [place.session for place in found.places] == ["a"]
    assert found.waits[0].text == "waits for cpu within the limit of ann: asks 1, 0.5 of 1.5 left."


# Keeping room and backfill


def test_one_that_ends_in_time_may_use_what_is_kept() -> None:
    """The keeper starts when calm-otter ends, at 100; whoever ends before does not delay it."""
    machine = (room(free={"cpu_milli": 1000}),)
    runs = (held("n", "calm-otter", 3000, ends_at=100.0),)
    large = ask("large", slots={"cpu_milli": 4000})
    policy = Policy(reserve_after_s=0.0)

    def small(limit_s: float | None) -> dict[str, list[str]]:
        one = ask("small", created_at=1.0, limit_s=limit_s)
        return run(large, one, rooms=machine, held=runs, now=50.0, policy=policy)[0]

    assert small(50.0) == {"small": ["n"]}
    assert small(51.0) == {}
    assert small(None) == {}


def test_what_the_keeper_leaves_over_is_free_for_all() -> None:
    machine = (room(free={"cpu_milli": 1000}),)
    runs = (held("n", "calm-otter", 3000, ends_at=100.0),)
    large = ask("large", slots={"cpu_milli": 3000})
    places, _ = run(
        large, ask("small", created_at=1.0), rooms=machine, held=runs, now=50.0,
        policy=Policy(reserve_after_s=0.0),
    )  # fmt: skip
    assert places == {"small": ["n"]}


def test_what_is_lent_is_not_what_another_has_taken_meanwhile() -> None:
    """2 of 5 are free, 1 beside the keeper: who stays takes that, who ends may have the rest."""
    machine = (room(cpu=5000, free={"cpu_milli": 2000}),)
    runs = (held("n", "calm-otter", 3000, ends_at=100.0),)
    large = ask("large", slots={"cpu_milli": 4000})
    stays = ask("stays", created_at=1.0)
    policy = Policy(reserve_after_s=0.0)

    def also(cpu: int) -> list[str]:
        one = ask("ends", created_at=2.0, limit_s=10.0, slots={"cpu_milli": cpu})
        places, _ = run(large, stays, one, rooms=machine, held=runs, now=5.0, policy=policy)
        return list(places)

    assert also(2000) == ["stays"]
    assert also(1000) == ["stays", "ends"]


def test_room_is_kept_where_it_comes_first() -> None:
    rooms = (room("a", free={"cpu_milli": 0}), room("b", free={"cpu_milli": 1000}))
    runs = (held("a", "soon", 4000, ends_at=10.0), held("b", "late", 3000, ends_at=900.0))
    large = ask("large", slots={"cpu_milli": 4000})
    small = ask("small", created_at=1.0)
    places, _ = run(
        large, small, rooms=rooms, held=runs, now=5.0, policy=Policy(reserve_after_s=0.0)
    )
    assert places == {"small": ["b"]}


def test_an_end_elsewhere_in_between_does_not_hide_where_room_comes_first() -> None:
    rooms = (room("a", free={"cpu_milli": 1000}), room("b", free={"cpu_milli": 1000}))
    runs = (
        held("a", "x", 1000, ends_at=10.0),
        held("b", "y", 1000, ends_at=20.0),
        held("a", "z", 2000, ends_at=30.0),
        held("b", "w", 2000, ends_at=900.0),
    )
    large, small = ask("large", slots={"cpu_milli": 4000}), ask("small", created_at=1.0)
    both = (small, replace(small, session="other"))
    policy = Policy(reserve_after_s=0.0)
    places, codes = run(large, *both, rooms=rooms, held=runs, now=5.0, policy=policy)
    assert list(places.values()) == [["b"]]
    assert codes["large"] == "capacity.cpu"


def test_a_gang_keeps_room_on_several_machines_until_its_time() -> None:
    rooms = tuple(room(node, free={"cpu_milli": 1000}) for node in ("a", "b"))
    runs = (held("a", "x", 3000, ends_at=10.0), held("b", "y", 3000, ends_at=60.0))
    gang = ask("gang", slots={"cpu_milli": 4000}, members=2)
    policy = Policy(reserve_after_s=0.0)
    small = ask("small", created_at=1.0, limit_s=55.0)
    assert list(run(gang, small, rooms=rooms, held=runs, now=5.0, policy=policy)[0]) == ["small"]
    long_ = replace(small, limit_s=56.0)
    places, codes = run(gang, long_, rooms=rooms, held=runs, now=5.0, policy=policy)
    assert (places, codes["small"]) == ({}, "capacity.reserved")


# Reservations


CLASS = Reservation(name="class", nodes=frozenset({"n"}), starts_at=100.0, ends_at=200.0)


def test_before_a_reservation_only_those_that_end_in_time_start() -> None:
    both = (ask("short", limit_s=50.0), ask("long", limit_s=51.0), ask("open"))
    places, codes = run(*both, now=50.0, reservations=(CLASS,))
    assert list(places) == ["short"]
    assert codes == {"long": "constraint.none", "open": "constraint.none"}


def test_in_its_time_it_is_for_those_it_is_for_until_nobody_comes() -> None:
    mine, other = ask("mine", reservation="class"), ask("other")
    assert run(mine, other, now=50.0, reservations=(CLASS,))[1]["mine"] == "reservation.later"
    assert list(run(mine, other, now=150.0, reservations=(CLASS,))[0]) == ["mine"]
    short = replace(CLASS, no_show_s=30.0)
    assert list(run(other, now=129.0, reservations=(short,))[0]) == []
    assert list(run(other, now=130.0, reservations=(short,))[0]) == ["other"]
    assert run(mine, now=200.0, reservations=(CLASS,))[1] == {"mine": "reservation.none"}


# Preemption


def preempted(*runs: Held, now: float = 1000.0, free: int = 0, **more: object) -> list[str]:
    one = ask("urgent", priority=5, preempts=True, slots={"cpu_milli": 2000}, **more)
    snapshot = Snapshot(pending=(one,), rooms=(room(free={"cpu_milli": free}),), held=runs)
    found = plan(snapshot, Policy(reserve_after_s=0.0, min_run_s=600.0), now)
    codes = [wait.code for wait in found.waits]
    assert not found.preempts or codes == ["capacity.preempting"]
    return [preempt.session for preempt in found.preempts]


def test_the_least_loss_that_is_enough_gives_way() -> None:
    old = held("n", "old", 2000, preemptible=True, started_at=0.0)
    young = held("n", "young", 2000, preemptible=True, started_at=300.0)
    assert preempted(old, young) == ["young"]
    assert preempted(old, replace(young, priority=3)) == ["old"]
    small = [held("n", f"s{n}", 1000, preemptible=True, started_at=0.0) for n in range(4)]
    assert len(preempted(*small)) == 2
    assert len(preempted(*small[:3], free=1000)) == 1


def test_who_must_not_be_ended_is_not() -> None:
    one = held("n", "x", 4000, preemptible=True, started_at=0.0)
    assert preempted(one) == ["x"]
    assert preempted(replace(one, preemptible=False)) == []
    assert preempted(replace(one, priority=5)) == []
    assert preempted(replace(one, started_at=401.0)) == []


def test_nobody_is_told_twice_nor_another_in_its_place() -> None:
    leaving = held("n", "a", 2000, preemptible=True, leaving=True)
    other = held("n", "b", 2000, preemptible=True)
    assert preempted(leaving, other) == []


def test_what_is_given_up_goes_to_the_one_it_was_given_up_for() -> None:
    one = held("n", "a", 4000, preemptible=True)
    urgent = ask("urgent", priority=5, preempts=True, slots={"cpu_milli": 3000})
    quick = ask("quick", created_at=999.0)
    snapshot = Snapshot(
        pending=(urgent, quick), rooms=(room(free={"cpu_milli": 1000}, cpu=5000),), held=(one,)
    )
    found = plan(snapshot, Policy(reserve_after_s=0.0), 1000.0)
    assert not found.places
    assert [p.session for p in found.preempts] == ["a"]


def test_an_account_s_limit_holds_over_all_groups() -> None:
    """What a project holds in one group counts in the other, in the same pass too."""
    asks = tuple(
        Ask(
            session=f"s{group}{number}", name=f"s{number}", priority=0, created_at=float(number),
            slots={"cpu_milli": 1000}, group=group, accounts=("user:u", "project:p"),
        )
        for group in ("a", "b")
        for number in range(4)
    )  # fmt: skip
    rooms = tuple(
        Room(node=f"n{g}", group=g, capacity={"cpu_milli": 9000}, free={"cpu_milli": 8000})
        for g in ("a", "b")
    )
    held = (
        Held(node="na", name="x", session="x", slots={"cpu_milli": 1000}, accounts=("project:p",)),
    )
    policy = Policy(limits={"project:p": {"cpu_milli": 6000}}, names={"project:p": "project lab"})
    found = plan(Snapshot(pending=asks, rooms=rooms, held=held), policy, 100.0)
    assert len(found.places) == 5
    assert {wait.code for wait in found.waits} == {"limit.project.cpu"}
    assert all("project lab" in wait.text for wait in found.waits)
