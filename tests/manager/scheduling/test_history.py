"""The past once more: the log of decisions comes out as it went in, simulations keep the rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.planner.history import Figures, Job, Rerun, Span, figures
from madang.manager.scheduling.service.journal import EVERY, Journal, digest_of, read
from madang.manager.scheduling.types import Ask, Policy, Room, Snapshot
from madang.testing.planners import NOW, snapshots

UNTIL = 10_000.0
CPU = {"cpu_milli": 4000}


@dataclass(frozen=True)
class Stored:
    whole: bool
    inputs: bytes
    digest: str


def written(journal: Journal, several: Iterable[Snapshot], policy: Policy) -> list[Stored]:
    rows = []
    for snapshot in several:
        groups = {one.group for one in snapshot.pending}
        policies = dict.fromkeys(groups, policy)
        entry = journal.entry(snapshot, policies, NOW, plan(snapshot, policies, NOW))
        rows.append(Stored(entry.whole, entry.inputs, entry.digest))
    return rows


@given(several=st.lists(snapshots(), min_size=1, max_size=4), limit=st.integers(0, 4))
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_what_was_decided_comes_out_again_by_hash(several: list[Snapshot], limit: int) -> None:
    policy = Policy(order="fair", limits={"o1": {"cpu_milli": limit}}, weights={"o0": 2.0})
    rows = written(Journal(), several, policy)
    found = list(read(rows))
    assert len(found) == len(several)
    for (snapshot, policies, now, digest), before in zip(found, several, strict=True):
        assert sorted(one.session for one in snapshot.pending) == sorted(
            one.session for one in before.pending
        )
        assert digest_of(plan(snapshot, policies, now)) == digest


def test_a_log_begins_anew_now_and_then_and_after_a_failure() -> None:
    journal = Journal()
    snapshot = Snapshot(pending=(ask("a", 0.0),), rooms=rooms(1))
    rows = written(journal, [snapshot] * (EVERY + 2), Policy())
    assert [at for at, row in enumerate(rows) if row.whole] == [0, EVERY]
    assert len(rows[1].inputs) < len(rows[0].inputs)
    journal.forget()
    assert written(journal, [snapshot], Policy())[0].whole


def test_a_log_whose_beginning_is_gone_is_read_from_the_next_whole_entry() -> None:
    snapshot = Snapshot(pending=(ask("a", 0.0),), rooms=rooms(1))
    rows = written(Journal(), [snapshot] * (EVERY + 2), Policy())
    assert len(list(read(rows[5:]))) == 2


def ask(session: str, at: float, **more: object) -> Ask:
    values = {"name": session, "priority": 0, "slots": {"cpu_milli": 1000}, "owner": "ann"}
    return Ask(session=session, created_at=at, **(values | more))  # type: ignore[arg-type]


def rooms(count: int) -> tuple[Room, ...]:
    return tuple(Room(node=f"n{n}", capacity=CPU, free=dict(CPU)) for n in range(count))


@st.composite
def jobs(draw: st.DrawFn) -> list[Job]:
    return [
        Job(
            ask(
                f"s{number:02d}",
                float(draw(st.integers(0, 600))),
                slots={"cpu_milli": draw(st.integers(1, 4)) * 1000},
                owner=draw(st.sampled_from(["ann", "bob"])),
                priority=draw(st.integers(0, 2)),
                preempts=draw(st.booleans()),
            ),
            float(draw(st.integers(1, 400))),
            preemptible=draw(st.booleans()),
        )
        for number in range(draw(st.integers(1, 15)))
    ]


@given(jobs(), st.integers(1, 3), st.sampled_from(["fifo", "drf", "fair", "short"]))
@settings(deadline=None, max_examples=40)
def test_a_simulation_never_uses_more_than_there_is_and_starts_all(
    past: list[Job], count: int, order: str
) -> None:
    policy = Policy(order=order, reserve_after_s=60.0, min_run_s=10.0)
    spans = Rerun(past, rooms(count), policy, UNTIL).run()
    assert all(span.started_at is not None for span in spans)
    moments = {span.started_at for span in spans if span.started_at is not None}
    for at in moments:
        assert sum(span.slots["cpu_milli"] for span in spans if _runs(span, at)) <= 4000 * count
    again = Rerun(list(reversed(past)), rooms(count), policy, UNTIL).run()
    assert {s.session: s.started_at for s in again} == {s.session: s.started_at for s in spans}


def _runs(span: Span, at: float) -> bool:
    assert span.started_at is not None
    assert span.ended_at is not None
    return span.started_at <= at < span.ended_at


def test_more_machines_and_dependencies_in_a_simulation() -> None:
    past = [Job(ask(f"s{n}", 0.0, slots=CPU), 100.0) for n in range(3)]
    past.append(Job(ask("last", 0.0, after=("s2",)), 10.0))
    one = figure(Rerun(past, rooms(1), Policy(), 1000.0).run(), 1)
    assert (one.mean_wait_s, one.p90_wait_s) == ((0 + 100 + 200 + 300) / 4, 300.0)
    three = figure(Rerun(past, rooms(3), Policy(), 1000.0).run(), 3)
    assert three.mean_wait_s == 25.0
    failed = [replace(job, ended_well=False) for job in past]
    assert figure(Rerun(failed, rooms(1), Policy(), 1000.0).run(), 1).given_up == 1


def figure(spans: list[Span], count: int, weights: Mapping[str, float] = {}) -> Figures:
    return figures(spans, {"cpu_milli": 4000 * count}, weights, 0.0, 1000.0)


def test_figures_of_a_known_past() -> None:
    spans = [
        Span("a", "ann", {"cpu_milli": 4000}, 0.0, 0.0, 500.0),
        Span("b", "bob", {"cpu_milli": 2000}, 100.0, 500.0, 1000.0),
        Span("c", "bob", {"cpu_milli": 2000}, 900.0),
    ]
    found = figure(spans, 1)
    assert (found.jobs, found.started) == (3, 2)
    assert found.p50_wait_s == 100.0
    assert found.mean_wait_s == (0 + 400 + 100) / 3
    assert found.utilisation == 0.75
    assert found.fairness == (500 + 250) ** 2 / (2 * (500**2 + 250**2))
    assert figure(spans, 1, {"ann": 2.0}).fairness == 1.0
