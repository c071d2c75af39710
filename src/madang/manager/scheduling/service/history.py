"""Replays: what was decided, checked; and what other rules would have made of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from madang.manager.db import Database, micros, seconds
from madang.manager.fleet import store as fleet
from madang.manager.fleet.tables import SLOTS
from madang.manager.fleet.types import Slots
from madang.manager.http import Caller
from madang.manager.scheduling import store
from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.planner.forecast import totals
from madang.manager.scheduling.planner.history import Figures, Job, Rerun, Span, figures
from madang.manager.scheduling.rules import offers, with_changes
from madang.manager.scheduling.service.groups import Groups, GroupService
from madang.manager.scheduling.service.journal import digest_of, read
from madang.manager.scheduling.service.memory import owner_of
from madang.manager.scheduling.types import Ask, GroupRules, Policy, Room, wishes_of
from madang.wire.errors import Forbidden, InvalidRequest, NotFound
from madang.wire.kernel import Capacity
from madang.wire.queue import NewNodes, ReplayFigures, ReplayReport, ReplayRequest

MAX_JOBS: Final = 20_000
MAX_DECISIONS: Final = 5000
MAX_NODES: Final = 1000


class HistoryService:
    """Reads what the scheduler wrote down; changes nothing."""

    def __init__(self, database: Database, groups: GroupService, reserve_after_s: float) -> None:
        self._database: Final = database
        self._groups: Final = groups
        self._reserve_after_s: Final = reserve_after_s
        self._turn: Final = asyncio.Semaphore(1)

    async def replay(self, caller: Caller, request: ReplayRequest) -> ReplayReport:
        """Raises Forbidden, NotFound, InvalidRequest, GroupInvalid."""
        if not caller.sees_all:
            raise Forbidden("only administrators and monitors replay what all have done.")
        _check(request)
        async with self._database.read() as tx:
            groups = await self._groups.current(tx)
            rows = await fleet.list_groups(tx)
            text = next((row.text for row in rows if row.name == request.group), None)
            if text is None:
                raise NotFound(f"no group {request.group[:60]!r}.", group=request.group[:60])
            changed = with_changes(text, request.set, self._reserve_after_s)
            runs = await store.list_runs_between(
                tx,
                group=request.group,
                since=micros(request.since),
                until=micros(request.until),
                limit=MAX_JOBS + 1,
            )
            nodes = [node for node in await fleet.list_nodes(tx) if node.group == request.group]
            start = await store.whole_before(tx, micros(request.since))
            decisions = await store.list_decisions(
                tx, start=start or 0, until=micros(request.until), limit=MAX_DECISIONS
            )
        if len(runs) > MAX_JOBS:
            text = f"more than {MAX_JOBS} sessions in that time; take a shorter one."
            raise InvalidRequest(text, field="since")
        now = groups.rules[request.group]
        rooms = [
            _room(node.name, request.group, node.capacity, *offers(node.facts, now.labels))
            for node in nodes
        ]
        async with self._turn:
            return await asyncio.to_thread(
                _report, request, groups, (now, changed), runs, rooms, decisions
            )


def _check(request: ReplayRequest) -> None:
    if not (
        math.isfinite(request.since)
        and math.isfinite(request.until)
        and 0 < request.since < request.until < 1e11
    ):
        raise InvalidRequest("since must come before until.", field="since")
    if sum(one.count for one in request.add_nodes) > MAX_NODES or not all(
        one.count > 0 and 0 < one.cpu < 1e6 and 0 < one.mem_bytes < 1 << 60
        for one in request.add_nodes
    ):
        text = f"at most {MAX_NODES} machines, each with cpu and mem above 0."
        raise InvalidRequest(text, field="add_nodes")


def _report(
    request: ReplayRequest,
    groups: Groups,
    rules: tuple[GroupRules, GroupRules],
    runs: Sequence[Any],
    rooms: Sequence[Room],
    decisions: Sequence[Any],
) -> ReplayReport:
    """Takes time; for a thread of its own."""
    now, changed = rules
    more = [*rooms, *_added(request.add_nodes, request.group)]
    fitting = [run for run in runs if any(_fits(run, room) for room in rooms)]
    checked = [
        (digest_of(plan(snapshot, policies, at)), digest)
        for snapshot, policies, at, digest in read(decisions)
        if at >= request.since
    ]
    happened = [_span(run, owner_of(now, run.owner, groups.called(run.project_id))) for run in runs]

    def simulated(rules: GroupRules, rooms: Sequence[Room]) -> ReplayFigures:
        jobs = [_job(run, rules, groups) for run in fitting]
        spans = Rerun(jobs, rooms, rules.policy, request.until).run()
        return _shown(_figures(spans, rooms, rules.policy, request))

    return ReplayReport(
        happened=_shown(_figures(happened, rooms, now.policy, request)),
        unchanged=simulated(now, rooms),
        changed=simulated(changed, more),
        left_out=len(runs) - len(fitting),
        decisions=len(checked),
        different=sum(again != digest for again, digest in checked),
    )


def _figures(
    spans: Sequence[Span], rooms: Sequence[Room], policy: Policy, request: ReplayRequest
) -> Figures:
    total = totals(rooms, request.group)
    return figures(spans, total, policy.weights, request.since, request.until)


def _shown(found: Figures) -> ReplayFigures:
    return ReplayFigures(**asdict(found))


def _fits(run: Any, room: Room) -> bool:
    return all(getattr(run, slot) <= room.capacity[slot] for slot in SLOTS)


def _job(run: Any, rules: GroupRules, groups: Groups) -> Job:
    wishes = wishes_of(run.wishes)
    began = run.ended_at if run.scheduled_at is None else run.scheduled_at
    least = rules.preempts_from
    ask = Ask(
        session=run.session_id,
        name=run.name,
        priority=run.priority,
        created_at=seconds(run.created_at),
        slots={slot: getattr(run, slot) for slot in SLOTS},
        owner=owner_of(rules, run.owner, groups.called(run.project_id)),
        group=run.group_name,
        labels=frozenset(wishes.needs),
        arch=wishes.arch,
        apart=wishes.apart,
        after=wishes.after,
        after_any=wishes.after_any,
        not_before=wishes.not_before or 0.0,
        give_up_at=_gave_up(run, wishes.give_up_at),
        limit_s=None if run.time_us is None else seconds(run.time_us),
        preempts=least is not None and run.priority >= least,
        kind=wishes.kind,
    )
    return Job(ask, seconds(run.ended_at - began), run.result == "success", wishes.preemptible)


def _gave_up(run: Any, give_up_at: float | None) -> float | None:
    """Who never had a place left the queue when it did then."""
    if run.scheduled_at is not None:
        return give_up_at
    left = seconds(run.ended_at)
    return left if give_up_at is None else min(left, give_up_at)


def _span(run: Any, owner: str) -> Span:
    started = None if run.scheduled_at is None else seconds(run.scheduled_at)
    return Span(
        run.session_id,
        owner,
        {slot: getattr(run, slot) for slot in SLOTS},
        seconds(run.created_at),
        started,
        None if started is None else seconds(run.ended_at),
        run.reason == "preempted",
        started is None,
    )


def _added(new: Sequence[NewNodes], group: str) -> list[Room]:
    found: list[Room] = []
    for one in new:
        capacity = Capacity(
            cpu=one.cpu, mem_bytes=one.mem_bytes, disk_bytes=one.disk_bytes, pids=one.pids
        )
        for _ in range(one.count):
            name = f"added-{len(found) + 1}"
            offered = frozenset({"runtime:native", "network:allow", "network:full", *one.labels})
            found.append(_room(name, group, Slots.of(capacity), offered, ""))
    return found


def _room(name: str, group: str, capacity: Slots, labels: frozenset[str], arch: str) -> Room:
    amounts = asdict(capacity)
    return Room(
        node=name, capacity=amounts, free=dict(amounts), group=group, labels=labels, arch=arch
    )
