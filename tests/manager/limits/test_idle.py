"""When a session is idle, and what follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.manager.limits.rules import idle
from madang.manager.limits.rules.idle import Busy, Idle, Look, Stop, Warn, Withdraw
from madang.manager.limits.types import Check, IdleKind, InForce, Limits

NOTHING = Look(at=0.0, outputs=0, inputs=0, visits=0, clients=0, cpu_s=0.0, network_bytes=0)
SPAN = 100.0


def rules(*checks: Check, grace_s: float = 60.0, name: str = "basic") -> InForce:
    return InForce(
        account="user:ann", shown="user ann", name=name, version=1, target="user:ann", text="",
        limits=Limits(idle=checks, idle_grace_s=grace_s),
    )  # fmt: skip


def check(kind: IdleKind, after_s: float = SPAN, below: float = 0.0) -> Check:
    return Check(kind=kind, after_s=after_s, below=below)


def seen(*looks: Look) -> idle.Marks:
    marks = idle.begin(looks[0])
    for look in looks[1:]:
        marks = idle.observe(marks, look, span_s=SPAN)
    return marks


ALL = (
    check(IdleKind.OUTPUT),
    check(IdleKind.CONNECTION),
    check(IdleKind.CPU, below=0.1),
    check(IdleKind.NETWORK, below=10.0),
)


def test_quiet_for_long_enough_is_idle_and_not_before() -> None:
    looks = [replace(NOTHING, at=float(at)) for at in range(0, 105, 5)]
    assert idle.judge(seen(*looks[:-1]), [rules(*ALL)]) is None
    judged = idle.judge(seen(*looks), [rules(*ALL)])
    assert isinstance(judged, Idle)
    assert judged.text == (
        "no output or input for 1m40s, nobody connected for 1m40s, "
        "under 0.1 CPU for 1m40s, under 10 B/s of network for 1m40s"
    )


@pytest.mark.parametrize(
    "work",
    [
        {"outputs": 1}, {"inputs": 1}, {"visits": 1}, {"cpu_s": 11.0}, {"network_bytes": 1100},
    ],
    ids=str,
)  # fmt: skip
def test_one_thing_that_goes_on_is_enough(work: dict[str, float]) -> None:
    before = [replace(NOTHING, at=float(at)) for at in range(0, 55, 5)]
    after = [replace(NOTHING, at=float(at), **work) for at in range(55, 105, 5)]  # type: ignore[arg-type]
    assert isinstance(idle.judge(seen(*before, *after), [rules(*ALL)]), Busy)


def test_somebody_who_stays_attached_is_a_connection() -> None:
    looks = [replace(NOTHING, at=float(at), clients=1, visits=1) for at in range(0, 205, 5)]
    connection = [rules(check(IdleKind.CONNECTION))]
    assert isinstance(idle.judge(seen(*looks), connection), Busy)
    assert isinstance(idle.judge(seen(*looks), [rules(check(IdleKind.OUTPUT))]), Idle)


def test_what_can_not_be_measured_is_never_idle() -> None:
    blind = Look(
        at=0.0, outputs=None, inputs=None, visits=None, clients=None, cpu_s=None, network_bytes=None
    )
    looks = [replace(blind, at=float(at)) for at in range(0, 305, 5)]
    for one in ALL:
        assert isinstance(idle.judge(seen(*looks), [rules(one)]), Busy)


def test_a_short_burst_of_cpu_does_not_reset_the_average() -> None:
    """One second of CPU in a hundred is less than a tenth of a core."""
    looks = [replace(NOTHING, at=float(at), cpu_s=0.0 if at < 50 else 1.0) for at in range(101)]
    assert isinstance(idle.judge(seen(*looks), [rules(check(IdleKind.CPU, below=0.1))]), Idle)


def test_after_a_restart_of_the_agent_everything_begins_anew() -> None:
    looks = [replace(NOTHING, at=float(at), inputs=7, cpu_s=3.0) for at in range(0, 200, 5)]
    marks = idle.observe(seen(*looks), replace(NOTHING, at=200.0), span_s=SPAN)
    assert idle.judge(marks, [rules(*ALL)]) is None


def test_nobody_asks_where_no_limits_do() -> None:
    marks = seen(NOTHING, replace(NOTHING, at=500.0))
    assert idle.judge(marks, []) is None
    assert idle.judge(marks, [rules()]) is None


def test_of_several_limits_the_shortest_grace_counts() -> None:
    marks = seen(NOTHING, replace(NOTHING, at=500.0))
    output = check(IdleKind.OUTPUT)
    judged = idle.judge(marks, [rules(output, name="a"), rules(output, name="b", grace_s=5.0)])
    assert isinstance(judged, Idle)
    assert (judged.by.name, judged.grace_s) == ("b", 5.0)


numbers = st.lists(st.tuples(st.floats(0.1, 30.0), st.booleans()), min_size=1, max_size=80)


@given(numbers, st.sampled_from(list(IdleKind)))
def test_idle_means_that_nothing_grew_within_the_time(
    steps: list[tuple[float, bool]], kind: IdleKind
) -> None:
    """Whatever the looks: with a threshold of none, idle is the same as no growth since then."""
    at, count = 0.0, 0
    looks = [NOTHING]
    grew = 0.0
    for step, works in steps:
        at += step
        if works:
            count, grew = count + 1, at
        looks.append(
            Look(at=at, outputs=count, inputs=count, visits=count, clients=0, cpu_s=float(count),
                 network_bytes=count)
        )  # fmt: skip
    marks = seen(*looks)
    assert len(marks.samples) <= idle.SAMPLES + 2
    judged = idle.judge(marks, [rules(check(kind))])
    if isinstance(judged, Idle):
        assert at - grew >= SPAN - 1e-6
    if isinstance(judged, Busy):
        assert count > 0


FOUND = Idle(by=rules(), grace_s=60.0, text="no output for 1m")


def test_it_is_warned_first_and_stopped_after_the_grace() -> None:
    def step(judged: idle.Judged, stop_at: float | None, now: float) -> idle.Step | None:
        return idle.next_step(judged, stop_at=stop_at, protected_until=None, now=now)

    assert step(FOUND, None, 1000.0) == Warn(1060.0, "no output for 1m")
    assert step(FOUND, 1060.0, 1059.0) is None
    assert step(FOUND, 1060.0, 1060.0) == Stop(FOUND.by, "no output for 1m")
    assert step(Busy(), 1060.0, 1060.0) == Withdraw()
    assert step(None, 1060.0, 2000.0) is None
    assert step(Busy(), None, 1000.0) is None


@given(
    st.sampled_from([FOUND, Busy(), None]),
    st.none() | st.floats(0, 2000),
    st.none() | st.floats(0, 2000),
    st.floats(0, 2000),
)
def test_the_protected_and_the_unwarned_are_never_stopped(
    judged: idle.Judged, stop_at: float | None, protected_until: float | None, now: float
) -> None:
    step = idle.next_step(judged, stop_at=stop_at, protected_until=protected_until, now=now)
    if isinstance(step, Stop):
        assert judged is FOUND
        assert stop_at is not None and stop_at <= now
        assert protected_until is None or protected_until <= now
    if isinstance(step, Warn):
        assert step.stop_at > now


def test_what_worked_hard_before_the_time_is_idle_after_it() -> None:
    """Only the time that the check asks about counts, however long it worked before."""
    looks = [
        replace(NOTHING, at=float(at), cpu_s=float(min(at, 1000)), network_bytes=min(at, 1000) * 99)
        for at in range(0, 1110, 5)
    ]
    both = [rules(check(IdleKind.CPU, below=0.1), check(IdleKind.NETWORK, below=10.0))]
    assert isinstance(idle.judge(seen(*looks), both), Idle)
    assert isinstance(idle.judge(seen(*looks[:-4]), both), Busy)
