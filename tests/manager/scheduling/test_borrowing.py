"""Deserved shares: idle room is lent, and given back, but never more than was borrowed."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.types import Ask, Held, Policy, Room, Snapshot

NOW = 1000.0
SHARES = {"project:lab": {"cpu_milli": 4000}, "project:shop": {"cpu_milli": 4000}}
POLICY = Policy(reserve_after_s=60.0, min_run_s=300.0, deserved=SHARES)


def held(name: str, project: str, cpu: int, **more: object) -> Held:
    values = {"node": "n", "session": name, "started_at": 0.0, "slots": {"cpu_milli": cpu}}
    return Held(name=name, accounts=(f"project:{project}",), **(values | more))  # type: ignore[arg-type]


def ask(project: str, cpu: int, **more: object) -> Ask:
    values = {"session": "ask", "name": "ask", "priority": 0, "created_at": 0.0}
    return Ask(
        slots={"cpu_milli": cpu},
        accounts=(f"project:{project}",),
        **(values | more),  # type: ignore[arg-type]
    )


def ended(one: Ask, *runs: Held, policy: Policy = POLICY) -> set[str]:
    free = 8000 - sum(each.slots["cpu_milli"] for each in runs)
    room = Room(node="n", capacity={"cpu_milli": 8000}, free={"cpu_milli": free})
    found = plan(Snapshot(pending=(one,), rooms=(room,), held=runs), policy, NOW)
    return {each.session for each in found.preempts}


def test_borrowed_room_is_given_back_and_no_more() -> None:
    runs = (held("a", "lab", 2000), held("b", "lab", 2000), held("c", "lab", 4000))
    assert ended(ask("shop", 4000), *runs) in ({"c"}, {"a", "b"})
    assert ended(ask("shop", 2000), *runs) in ({"a"}, {"b"}), "one of them is enough"


def test_a_project_within_its_share_keeps_what_it_has() -> None:
    runs = (held("a", "lab", 4000), held("b", "shop", 2000), held("c", "shop", 2000))
    assert ended(ask("shop", 2000), *runs) == set(), "it would itself be beyond its share"
    assert ended(ask("other", 2000), *runs) == set(), "who has no share is owed nothing"


def test_higher_priorities_and_the_young_are_left_alone() -> None:
    assert ended(ask("shop", 4000), held("a", "lab", 8000, priority=1)) == set()
    assert ended(ask("shop", 4000), held("a", "lab", 8000, started_at=NOW - 10)) == set()
    assert ended(ask("shop", 4000), held("a", "lab", 8000)) == {"a"}
    assert (
        ended(ask("shop", 4000), held("a", "lab", 8000), policy=replace(POLICY, deserved={}))
        == set()
    )


@given(st.lists(st.tuples(st.sampled_from(["lab", "shop"]), st.integers(1, 4)), max_size=8))
@settings(deadline=None)
def test_nobody_falls_below_its_share_by_more_than_one_session(
    sizes: list[tuple[str, int]],
) -> None:
    runs: list[Held] = []
    for number, (project, cpu) in enumerate(sizes):
        if sum(one.slots["cpu_milli"] for one in runs) + cpu * 1000 <= 8000:
            runs.append(held(f"r{number}", project, cpu * 1000))
    gone = ended(ask("shop", 4000), *runs)
    assert not any(one.name in gone and one.payers == ("project:shop",) for one in runs) or (
        sum(one.slots["cpu_milli"] for one in runs if one.payers == ("project:shop",)) > 4000
    )
    before = sum(one.slots["cpu_milli"] for one in runs if one.payers == ("project:lab",))
    victims = [one for one in runs if one.name in gone and one.payers == ("project:lab",)]
    for last in victims:
        others = sum(one.slots["cpu_milli"] for one in victims if one is not last)
        assert before - others > 4000, "without it the rest would have been enough"
