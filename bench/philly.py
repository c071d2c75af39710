"""A simulated cluster that works through the jobs of Microsoft Philly, one real pass after another.

80 machines of 8 GPUs, rigid gangs, run times known and given as time limits, as in the reference
run: a job of more than 8 GPUs takes whole machines.
"""

from __future__ import annotations

import csv
import heapq
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.planner.forecast import Estimate, Forecaster, RunTimes, work_before
from madang.manager.scheduling.planner.options import options
from madang.manager.scheduling.types import Ask, Held, Place, Policy, Room, Snapshot

MACHINES: Final = 80
DEVICES: Final = 8
STEP_S: Final = 120.0
"""Passes are no closer than this: what comes meanwhile is planned together."""
ASKED: Final = 10
"""Of the jobs that wait, each so-many-th gets a forecast."""
OFFERED: Final = 150
"""Of the jobs that wait, each so-many-th is told what would let it start."""


@dataclass(frozen=True, slots=True)
class Job:
    at: float
    run_s: float
    devices: int
    tenant: str


@dataclass(slots=True)
class Outcome:
    completions_h: list[float]
    utilisation: float
    forecaster: Forecaster
    offered: int
    held_true: int
    passes: int


def read_jobs(path: Path, part: int = 1) -> list[Job]:
    """Every job; of a *part*, each so-many-th by time with the same load on fewer machines."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [
        Job(float(r["t"]), max(1.0, float(r["duration"])), int(r["num_gpus"]), r["vc"])
        for r in rows[::part]
    ]


def ask_of(job: Job, number: int) -> Ask:
    members = max(1, -(-job.devices // DEVICES))
    return Ask(
        session=f"{number:06d}", name=f"job-{number}", priority=0, created_at=job.at, slots={},
        owner=job.tenant, devices=min(job.devices, DEVICES), members=members, limit_s=job.run_s,
    )  # fmt: skip


class World:
    """What runs and what waits."""

    def __init__(self, jobs: list[Job], policy: Policy, machines: int) -> None:
        self._policy = policy
        self._asks = [ask_of(job, number) for number, job in enumerate(jobs)]
        self._left = {f"n{number:03d}": [1000] * DEVICES for number in range(machines)}
        self._pending: dict[str, Ask] = {}
        self._running: dict[str, list[Held]] = {}
        self._ends: list[tuple[float, str]] = []
        self._told: dict[str, tuple[float, Estimate]] = {}
        self._offers: list[Ask] = []
        self._waiting = 0
        self._capacity = machines * DEVICES
        self._busy_s = 0.0
        self.outcome = Outcome([], 0.0, Forecaster(), 0, 0, 0)

    def snapshot(self) -> Snapshot:
        rooms = tuple(
            Room(node=node, capacity={}, free={}, devices=tuple(left))
            for node, left in self._left.items()
        )
        held = tuple(one for parts in self._running.values() for one in parts)
        return Snapshot(pending=tuple(self._pending.values()), rooms=rooms, held=held)

    def run(self) -> Outcome:
        last = self._asks[-1].created_at
        for now, new in self._times():
            for ask in new:
                self._pending[ask.session] = ask
            self._end(now)
            if self._pending:
                self._pass(now, [ask.session for ask in new], last)
        self.outcome.utilisation = self._busy_s / (self._capacity * last)
        return self.outcome

    def _times(self) -> Iterator[tuple[float, list[Ask]]]:
        """When something happens, and what arrived until then."""
        at, now = 0, 0.0
        while at < len(self._asks) or self._ends:
            arrival = self._asks[at].created_at if at < len(self._asks) else float("inf")
            end = self._ends[0][0] if self._ends else float("inf")
            now = max(min(arrival, end), now + STEP_S)
            first = at
            while at < len(self._asks) and self._asks[at].created_at <= now:
                at += 1
            yield now, self._asks[first:at]

    def _end(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            _, session = heapq.heappop(self._ends)
            for one in self._running.pop(session):
                for number, milli in one.devices:
                    self._left[one.node][number] += milli

    def _pass(self, now: float, new: list[str], last: float) -> None:
        snapshot = self.snapshot()
        self._check_offers(snapshot, now)
        found = plan(snapshot, self._policy, now)
        self.outcome.passes += 1
        by_session: dict[str, list[Place]] = {}
        for place in found.places:
            by_session.setdefault(place.session, []).append(place)
        for session, places in by_session.items():
            self._start(self._pending.pop(session), places, now, last)
        self._overdue(now)
        for session in new:
            if session in self._pending:
                self._ask(self._pending[session], now)

    def _start(self, ask: Ask, places: list[Place], now: float, last: float) -> None:
        assert ask.limit_s is not None
        ends_at = now + ask.limit_s
        self._running[ask.session] = [
            Held(
                node=place.node, name=ask.name, session=ask.session, owner=ask.owner, slots={},
                devices=place.devices, started_at=now, ends_at=ends_at,
            )
            for place in places
        ]  # fmt: skip
        for place in places:
            for number, milli in place.devices:
                self._left[place.node][number] -= milli
                assert self._left[place.node][number] >= 0
        heapq.heappush(self._ends, (ends_at, ask.session))
        self.outcome.completions_h.append((ends_at - ask.created_at) / 3600)
        self._busy_s += ask.devices * ask.members * max(0.0, min(ends_at, last) - now)
        if (told := self._told.pop(ask.session, None)) is not None:
            self.outcome.forecaster.learn(told[1], now - told[0])

    def _overdue(self, now: float) -> None:
        """Whoever waits longer than p90 said is a miss now, not when it starts at last."""
        late = [s for s, (at, e) in self._told.items() if now - at > max(0.0, e.p90_s)]
        for session in late:
            at, estimate = self._told.pop(session)
            self.outcome.forecaster.learn(estimate, now - at)

    def _ask(self, ask: Ask, now: float) -> None:
        self._waiting += 1
        if self._waiting % ASKED == 0:
            base = work_before(self.snapshot(), ask, self._policy, now, RunTimes())
            self._told[ask.session] = now, self.outcome.forecaster.estimate(ask, base)
        if self._waiting % OFFERED == 0:
            found = options(self.snapshot(), self._policy, ask.session, now)
            self._offers = [one.ask for one in found if not one.after]

    def _check_offers(self, snapshot: Snapshot, now: float) -> None:
        """Each, taken up at the next pass, when others have come and gone."""
        for offer in self._offers:
            others = tuple(one for one in snapshot.pending if one.session != offer.session)
            changed = replace(snapshot, pending=(*others, replace(offer, created_at=now)))
            found = plan(changed, self._policy, now)
            self.outcome.offered += 1
            self.outcome.held_true += any(p.session == offer.session for p in found.places)
        self._offers = []


def replay(jobs: list[Job], policy: Policy, machines: int = MACHINES) -> Outcome:
    return World(jobs, policy, machines).run()


def mean_and_median(outcome: Outcome) -> tuple[float, float]:
    return statistics.mean(outcome.completions_h), statistics.median(outcome.completions_h)
