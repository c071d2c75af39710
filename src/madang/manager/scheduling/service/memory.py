"""What ended sessions teach: who had how much, how long things run, how good forecasts were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from madang.kit.codec import from_json
from madang.manager.db import Reader, seconds
from madang.manager.fleet.tables import SLOTS
from madang.manager.scheduling import store
from madang.manager.scheduling.planner.forecast import Estimate, Forecaster, RunTimes, share, totals
from madang.manager.scheduling.planner.order import decayed
from madang.manager.scheduling.service.groups import Groups
from madang.manager.scheduling.types import GroupRules, Held, Room, Told, wishes_of

REMEMBERED: Final = 50_000
"""Ended sessions that are read after a start, the newest."""
PAGE: Final = 2000
_NO_RULES: Final = GroupRules()


@dataclass(slots=True)
class _Past:
    """Slot × seconds, half forgotten after each half-life."""

    half_life_s: float
    at: float
    amounts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SLOTS, 0.0))

    def pass_to(self, at: float) -> None:
        if at > self.at:
            left = decayed(1.0, at - self.at, self.half_life_s)
            self.amounts = {slot: amount * left for slot, amount in self.amounts.items()}
            self.at = at


class Memory:
    """Catches up with the table of runs; the table is the truth, this is derived from it."""

    def __init__(self) -> None:
        self._after = -1
        self._past: Final[dict[tuple[str, str], _Past]] = {}
        self._half_lives: dict[str, float] = {}
        self._run_times: Final[dict[str, RunTimes]] = {}
        self._forecasters: Final[dict[str, Forecaster]] = {}
        self._learned: Final[set[str]] = set()
        """Sessions whose start was seen, until their end is."""

    def run_times(self, group: str) -> RunTimes:
        return self._run_times.setdefault(group, RunTimes())

    def forecaster(self, group: str) -> Forecaster:
        return self._forecasters.setdefault(group, Forecaster())

    async def catch_up(self, tx: Reader, groups: Groups) -> None:
        """Idempotent; what a changed half-life makes of the past is computed anew."""
        half_lives = {name: rules.policy.half_life_s for name, rules in groups.rules.items()}
        if self._after < 0 or half_lives != self._half_lives:
            self._begin(half_lives, await store.newest_run(tx))
        while rows := await store.list_runs(tx, after=self._after, since=0, limit=PAGE):
            for row in rows:
                self._take(row, groups)
            self._after = rows[-1].id
            if len(rows) < PAGE:
                break

    def _begin(self, half_lives: dict[str, float], newest: int) -> None:
        self._half_lives = half_lives
        self._after = max(0, newest - REMEMBERED)
        for known in (self._past, self._run_times, self._forecasters, self._learned):
            known.clear()

    def _take(self, row: Any, groups: Groups) -> None:
        if row.scheduled_at is None:
            return
        rules = groups.rules.get(row.group_name, _NO_RULES)
        began, ended = seconds(row.scheduled_at), seconds(row.ended_at)
        owner = owner_of(rules, row.owner, groups.called(row.project_id))
        kind = wishes_of(row.wishes).kind
        self.run_times(row.group_name).learn(owner, max(0.0, ended - began), kind)
        key = (row.group_name, owner)
        past = self._past.get(key)
        if past is None:
            past = self._past[key] = _Past(rules.policy.half_life_s, ended)
        past.pass_to(ended)
        late = decayed(1.0, max(0.0, past.at - ended), past.half_life_s)
        for slot in SLOTS:
            past.amounts[slot] += late * getattr(row, slot) * max(0.0, ended - began)
        if row.session_id in self._learned:
            self._learned.discard(row.session_id)
        elif row.told:
            self._learn(row.group_name, from_json(Told, row.told), began)

    def started(self, session: str, group: str, told: Told, at: float) -> None:
        """It has a place now; what it was told is compared with that."""
        self._learned.add(session)
        self._learn(group, told, at)

    def _learn(self, group: str, told: Told, at: float) -> None:
        estimate = Estimate(told.p50_s, told.p90_s, told.base_s, told.kind)
        self.forecaster(group).learn(estimate, at - told.at)

    def used(
        self, rules: Mapping[str, GroupRules], rooms: tuple[Room, ...], held: tuple[Held, ...],
        now: float,
    ) -> dict[str, float]:  # fmt: skip
        """Owner → dominant share × seconds, where a group asks for it; running sessions included.

        An owner's use in several groups is added up.
        """
        wanted = {name for name, one in rules.items() if one.policy.order == "fair"}
        if not wanted:
            return {}
        total = {name: totals(rooms, name) for name in wanted}
        group_of = {room.node: room.group for room in rooms}
        found: dict[str, float] = {}
        for (group, owner), past in self._past.items():
            if group in wanted:
                past.pass_to(now)
                part = share({s: round(a) for s, a in past.amounts.items()}, total[group])
                found[owner] = found.get(owner, 0.0) + part
        for one in held:
            if (group := group_of.get(one.node, "")) in wanted:
                part = share(one.slots, total[group]) * max(0.0, now - one.started_at)
                found[one.owner] = found.get(one.owner, 0.0) + part
        return found


def owner_of(rules: GroupRules, user: str, project: str) -> str:
    """Who shares in a group: what weights and orders call the owner."""
    return f"project:{project}" if rules.share_by == "project" else f"user:{user}"
