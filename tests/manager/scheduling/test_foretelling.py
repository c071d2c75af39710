"""Forecasts and counterfactuals."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.planner.forecast import Forecaster, RunTimes, work_before
from madang.manager.scheduling.planner.options import options, without
from madang.manager.scheduling.types import Ask, Held, Policy, Room, Snapshot
from madang.testing.planners import NOW, snapshots

POLICY = Policy(reserve_after_s=0.0)


def ask(session: str = "s", **more: object) -> Ask:
    values = {"name": session, "priority": 0, "created_at": 0.0, "slots": {"cpu_milli": 4000}}
    return Ask(session=session, **(values | more))  # type: ignore[arg-type]


def room(node: str, free: int, **more: object) -> Room:
    return Room(node=node, capacity={"cpu_milli": 4000}, free={"cpu_milli": free}, **more)  # type: ignore[arg-type]


def held(node: str, name: str, cpu: int, **more: object) -> Held:
    return Held(node=node, name=name, session=name, slots={"cpu_milli": cpu}, **more)  # type: ignore[arg-type]


def told(snapshot: Snapshot, session: str = "s", now: float = 0.0) -> list[str]:
    return [option.text for option in options(snapshot, POLICY, session, now)]


# What if


def test_less_of_it_another_group_and_an_end_are_offered() -> None:
    snapshot = Snapshot(
        pending=(ask(),),
        rooms=(room("a", 2000), room("b", 4000, group="big")),
        held=(held("a", "calm-otter", 2000, ends_at=60.0),),
    )
    assert told(snapshot) == [
        "starts now with cpu 2",
        "starts now in group big",
        "starts after calm-otter ends",
    ]


def test_half_a_device_is_offered_where_no_whole_one_is_free() -> None:
    snapshot = Snapshot(
        pending=(ask(slots={}, devices=1),), rooms=(room("a", 0, devices=(500, 250)),)
    )
    assert told(snapshot) == ["starts now with gpu 0.5"]


def test_a_time_limit_is_offered_where_room_is_only_kept() -> None:
    large = ask("large", priority=1)
    small = ask(slots={"cpu_milli": 1000})
    runs = (held("a", "x", 3000, ends_at=700.0),)
    snapshot = Snapshot(pending=(large, small), rooms=(room("a", 1000),), held=runs)
    assert told(snapshot)[0] == "starts now with a time limit of 10m"


def test_the_end_of_one_that_is_not_enough_is_not_offered() -> None:
    runs = (held("a", "x", 2000), held("a", "y", 2000))
    assert told(Snapshot(pending=(ask(),), rooms=(room("a", 0),), held=runs)) == []


def test_who_does_not_wait_can_not_be_asked_about() -> None:
    with pytest.raises(LookupError):
        options(Snapshot(pending=(), rooms=()), POLICY, "x", 0.0)


@given(snapshots())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_offered_is_what_the_planner_does(snapshot: Snapshot) -> None:
    for wait in plan(snapshot, POLICY, NOW).waits[:2]:
        for option in options(snapshot, POLICY, wait.session, NOW):
            if option.after:
                ended = [one for one in snapshot.held if one.name == option.after]
                changed = without(snapshot, ended)
            else:
                others = [one for one in snapshot.pending if one.session != wait.session]
                now = replace(option.ask, created_at=NOW)
                changed = replace(snapshot, pending=(*others, now))
            found = plan(changed, POLICY, NOW)
            assert wait.session in {place.session for place in found.places}


# When


def test_what_runs_and_what_comes_first_is_counted() -> None:
    snapshot = Snapshot(
        pending=(
            ask("first", created_at=1.0, limit_s=100.0), ask(created_at=2.0),
            ask("z", created_at=3.0),
        ),
        rooms=(room("a", 2000), room("b", 4000)),
        held=(held("a", "x", 2000, ends_at=50.0),),
    )  # fmt: skip
    mine = snapshot.pending[1]
    # A quarter of the group for 40 s, then half of it for 100 s.
    assert work_before(snapshot, mine, POLICY, 10.0, RunTimes()) == pytest.approx(10 + 50)


def test_learned_run_times_stand_in_for_limits() -> None:
    times = RunTimes()
    for seconds in (10.0, 20.0, 300.0):
        times.learn("ann", seconds)
    assert times.quantile("ann", 0.5, 1.0) == 20.0
    assert times.quantile("bob", 0.5, 1.0) == 20.0, "of all, where the owner is new"
    runs = (held("a", "x", 4000, owner="ann", started_at=0.0),)
    snapshot = Snapshot(pending=(ask(),), rooms=(room("a", 0),), held=runs)
    assert work_before(snapshot, ask(), POLICY, 5.0, times) == pytest.approx(15.0)
    for seconds in (1.0, 2.0, 3.0):
        times.learn("ann", seconds, "eval.py")
    assert times.quantile("ann", 0.5, 1.0, "eval.py") == 2.0
    assert RunTimes().quantile("ann", 0.5, 1.0) == 1.0


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_nine_of_ten_start_before_p90_however_wrong_the_base_is(scale: float) -> None:
    """Also when what was learned stops being true half-way."""
    rng, forecaster = random.Random(1), Forecaster()
    for number in range(4000):
        base = rng.uniform(100.0, 10_000.0)
        shift = 8.0 if number > 2000 else 1.0
        estimate = forecaster.estimate(ask(), base)
        assert estimate.p50_s <= estimate.p90_s
        forecaster.learn(estimate, base * scale * shift * rng.lognormvariate(0.0, 1.0))
    assert forecaster.told == 4000
    assert 0.87 <= forecaster.coverage <= 0.93
    assert forecaster.median_error_s > 0


def test_before_anything_is_learned_there_is_no_coverage() -> None:
    assert math.isnan(Forecaster().coverage)
    assert Forecaster().estimate(ask(), 600.0).p90_s > 600.0
