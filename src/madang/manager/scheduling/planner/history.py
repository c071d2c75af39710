"""The past once more, under other rules or on other machines: simulated with the planner itself.

Who asked for what, when, and how long it ran is taken as it was; who starts when and where is
planned anew. A model: starts take no time, programs run as long as they did, people ask at the same
times whatever they had to wait.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from madang.manager.scheduling.planner.forecast import share, totals
from madang.manager.scheduling.planner.order import decayed
from madang.manager.scheduling.planner.plan import plan
from madang.manager.scheduling.types import Amounts, Ask, Held, Plan, Policy, Room, Snapshot

STEP_S: Final = 30.0
"""While somebody waits, passes are at most so far apart, or this part of the whole time:"""
STEPS: Final = 5000


@dataclass(frozen=True, slots=True)
class Job:
    ask: Ask
    run_s: float
    ended_well: bool = True
    preemptible: bool = False


@dataclass(slots=True)
class Span:
    """What became of a job."""

    session: str
    owner: str
    slots: Amounts
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    preempted: bool = False
    given_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    jobs: int
    started: int
    mean_wait_s: float
    p50_wait_s: float
    p90_wait_s: float
    utilisation: float
    """Dominant share of the group that was in use, over the whole time."""
    fairness: float
    """Jain's index of what owners had, by weight: 1 if all had the same."""
    preemptions: int
    given_up: int


class Rerun:
    """One group."""

    def __init__(
        self, jobs: Sequence[Job], rooms: Sequence[Room], policy: Policy, until: float
    ) -> None:
        """*rooms* are empty."""
        self._jobs: Final = {job.ask.session: job for job in jobs}
        self._rooms: Final = {room.node: room for room in rooms}
        self._policy: Final = policy
        self._until: Final = until
        self._group: Final = rooms[0].group if rooms else ""
        self._total: Final = totals(rooms, self._group)
        self._free: Final = {room.node: dict(room.free) for room in rooms}
        self._pending: Final[dict[str, Ask]] = {}
        self._held: Final[dict[str, Held]] = {}
        self._ends: Final[list[tuple[float, str]]] = []
        self._ended: Final[dict[str, bool]] = {}
        self._used: dict[str, float] = {}
        self._at = min((job.ask.created_at for job in jobs), default=until)
        self._step: Final = max(STEP_S, (until - self._at) / STEPS)
        self.spans: Final = {
            job.ask.session: Span(job.ask.session, job.ask.owner, job.ask.slots, job.ask.created_at)
            for job in jobs
        }

    def run(self) -> list[Span]:
        arrivals = sorted(
            (job.ask for job in self._jobs.values()), key=lambda a: (a.created_at, a.session)
        )
        coming = 0
        while self._at < self._until:
            while coming < len(arrivals) and arrivals[coming].created_at <= self._at:
                self._pending[arrivals[coming].session] = arrivals[coming]
                coming += 1
            self._finish()
            if self._pending:
                self._apply(plan(self._snapshot(), self._policy, self._at))
            following = arrivals[coming].created_at if coming < len(arrivals) else math.inf
            self._pass_to(self._next(following))
        return list(self.spans.values())

    def _next(self, arrival: float) -> float:
        end = self._ends[0][0] if self._ends else math.inf
        tick = self._at + self._step if self._pending else math.inf
        return min(arrival, max(end, self._at), tick, self._until)

    def _pass_to(self, at: float) -> None:
        """Shares of the past are kept where the order looks at them."""
        if self._policy.order == "fair":
            spent = at - self._at
            left = decayed(1.0, spent, self._policy.half_life_s)
            self._used = {owner: used * left for owner, used in self._used.items()}
            for one in self._held.values():
                gained = share(one.slots, self._total) * spent
                self._used[one.owner] = self._used.get(one.owner, 0.0) + gained
        self._at = at

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            pending=tuple(self._pending.values()),
            rooms=tuple(replace(room, free=self._free[node]) for node, room in self._rooms.items()),
            held=tuple(self._held.values()),
            used=self._used,
            ended=self._ended,
        )

    def _apply(self, found: Plan) -> None:
        for place in found.places:
            ask = self._pending.pop(place.session)
            job = self._jobs[place.session]
            self._add(place.node, ask.slots, -1)
            self._held[ask.session] = Held(
                node=place.node,
                name=ask.name,
                slots=ask.slots,
                session=ask.session,
                owner=ask.owner,
                priority=ask.priority,
                started_at=self._at,
                ends_at=None if ask.limit_s is None else self._at + ask.limit_s,
                apart=ask.apart,
                preemptible=job.preemptible,
                accounts=ask.accounts,
                kind=ask.kind,
            )
            self.spans[ask.session].started_at = self._at
            heapq.heappush(self._ends, (self._at + job.run_s, ask.session))
        for one in found.preempts:
            held = self._held[one.session]
            self._held[one.session] = replace(held, leaving=True)
            self.spans[one.session].preempted = True
            heapq.heappush(self._ends, (self._at + one.grace_s, one.session))
        for wait in found.given_up:
            del self._pending[wait.session]
            self.spans[wait.session].given_up = True
            self._ended[wait.session] = False

    def _finish(self) -> None:
        while self._ends and self._ends[0][0] <= self._at:
            at, session = heapq.heappop(self._ends)
            held = self._held.pop(session, None)
            if held is not None:  # a preempted one may have ended before its grace did
                self._add(held.node, held.slots, 1)
                span = self.spans[session]
                span.ended_at = at
                self._ended[session] = self._jobs[session].ended_well and not span.preempted

    def _add(self, node: str, slots: Amounts, sign: int) -> None:
        free = self._free[node]
        for slot, amount in slots.items():
            free[slot] = free.get(slot, 0) + sign * amount


def figures(
    spans: Iterable[Span],
    total: Amounts,
    weights: Mapping[str, float],
    since: float,
    until: float,
) -> Figures:
    """Waits of who asked in that time (so far, if it did not start), use of all within it."""
    spans = list(spans)
    mine = [span for span in spans if since <= span.created_at < until]
    waits = sorted(
        max(0.0, (until if span.started_at is None else span.started_at) - span.created_at)
        for span in mine
        if not span.given_up
    )
    had: dict[str, float] = {span.owner: 0.0 for span in mine}
    used: dict[str, float] = {}
    for span in spans:
        if span.started_at is None:
            continue
        ended = until if span.ended_at is None else min(until, span.ended_at)
        seconds = max(0.0, ended - max(since, span.started_at))
        had[span.owner] = had.get(span.owner, 0.0) + share(span.slots, total) * seconds
        for slot, amount in span.slots.items():
            used[slot] = used.get(slot, 0.0) + amount * seconds
    length = max(until - since, 1e-9)
    fair = [amount / weights.get(owner, 1.0) for owner, amount in had.items()]
    squares = sum(one * one for one in fair)
    return Figures(
        jobs=len(mine),
        started=sum(span.started_at is not None for span in mine),
        mean_wait_s=sum(waits) / len(waits) if waits else 0.0,
        p50_wait_s=_part(waits, 0.5),
        p90_wait_s=_part(waits, 0.9),
        utilisation=max(
            (used.get(s, 0.0) / (c * length) for s, c in total.items() if c), default=0.0
        ),
        fairness=sum(fair) ** 2 / (len(fair) * squares) if squares else 1.0,
        preemptions=sum(span.preempted for span in spans),
        given_up=sum(span.given_up for span in mine),
    )


def _part(ordered: Sequence[float], part: float) -> float:
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]
