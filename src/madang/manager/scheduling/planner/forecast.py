"""When a session will probably start, and how wrong that was in the past.

The base is the work that comes before it over what the group can do: simple, and wrong in ways that
repeat (backfill lets small ones start earlier, later arrivals of higher order delay). So the ratio
of what came to what was said is kept by kind of ask, and its quantiles stretch the base. The level
of the upper quantile follows its own hits and misses, so that in the long run the stated part of
all starts lies below it, whatever the load does.

Source of the last step: Gibbs and Candès, Adaptive Conformal Inference Under Distribution Shift,
NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from madang.manager.scheduling.types import Ask, Policy, Room, Snapshot

AIM: Final = 0.9
PACE: Final = 0.02
"""How fast the level follows a hit or a miss."""
KEPT: Final = 300
"""Ratios of each kind, the newest."""
LEAST_S: Final = 60.0
"""Added to both sides of a ratio: below a minute nobody minds."""
ENOUGH: Final = 3
"""Run times from which a quantile is taken."""
FIRST: Final = (1.0, 4.0)
"""Ratios that are taken for p50 and p90 until there are some."""


class RunTimes:
    """How long sessions ran, where no time limit says it: by owner and kind, by owner, by all."""

    def __init__(self) -> None:
        self._seen: Final[dict[tuple[str, ...], deque[float]]] = {}
        self._known: Final[dict[tuple[float, tuple[str, ...]], float]] = {}

    def learn(self, owner: str, seconds: float, kind: str = "") -> None:
        for key in ((owner, kind), (owner,), ()):
            self._seen.setdefault(key, deque(maxlen=KEPT)).append(seconds)
        self._known.clear()

    def quantile(self, owner: str, part: float, otherwise: float, kind: str = "") -> float:
        """Of the nearest of these that has seen enough; *otherwise* if there is none."""
        for key in ((owner, kind), (owner,), ()):
            seen = self._seen.get(key, ())
            if len(seen) >= ENOUGH:
                if (part, key) not in self._known:
                    self._known[part, key] = _quantile(seen, part, otherwise)
                return self._known[part, key]
        return otherwise


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds from now."""

    p50_s: float
    p90_s: float
    base_s: float
    kind: str


def work_before(
    snapshot: Snapshot, ask: Ask, policy: Policy, now: float, run_times: RunTimes
) -> float:
    """Seconds that the whole group would need for what runs and what comes before *ask*.

    What comes before: higher priority, or the same and an earlier creation; under the order
    ``short`` an earlier due time.
    """
    alone = replace(snapshot, pending=(*snapshot.pending, ask))
    return works_before(alone, ask.group, policy, now, run_times)[ask.session]


def works_before(
    snapshot: Snapshot, group: str, policy: Policy, now: float, run_times: RunTimes
) -> dict[str, float]:
    """The same for all that wait for one group, by session."""
    total = totals(snapshot.rooms, group)
    nodes = {room.node for room in snapshot.rooms if room.group == group}
    seconds = 0.0
    for one in snapshot.held:
        if one.node in nodes:
            usual = run_times.quantile(one.owner, 0.5, policy.usual_run_s, one.kind)
            ends_at = one.started_at + usual if one.ends_at is None else one.ends_at
            milli = sum(milli for _, milli in one.devices)
            seconds += max(0.0, ends_at - now) * share({**one.slots, "device_milli": milli}, total)
    found: dict[str, float] = {}
    mine = {ask.session: ask for ask in snapshot.pending if ask.group == group}
    for ask in sorted(mine.values(), key=lambda ask: _turn(ask, policy, run_times)):
        found[ask.session] = seconds
        milli = ask.devices * ask.device_milli
        part = share({**ask.slots, "device_milli": milli}, total)
        seconds += _run_s(ask, policy, run_times) * part * ask.members
    return found


def totals(rooms: Iterable[Room], group: str) -> dict[str, int]:
    """All that the machines of a group have, devices in thousandths."""
    found: dict[str, int] = {}
    for room in rooms:
        if room.group == group:
            for slot, amount in room.capacity.items():
                found[slot] = found.get(slot, 0) + amount
            found["device_milli"] = found.get("device_milli", 0) + 1000 * len(room.devices)
    return found


def _run_s(ask: Ask, policy: Policy, run_times: RunTimes) -> float:
    if ask.limit_s is not None:
        return ask.limit_s
    return run_times.quantile(ask.owner, 0.5, policy.usual_run_s, ask.kind)


def _turn(ask: Ask, policy: Policy, run_times: RunTimes) -> tuple[int, float, str]:
    due = ask.created_at
    if policy.order == "short":
        due += policy.stretch * _run_s(ask, policy, run_times)
    return -ask.priority, due, ask.session


def share(amounts: Mapping[str, int], total: Mapping[str, int]) -> float:
    """Largest part that *amounts* are of anything."""
    return max((a / total[s] for s, a in amounts.items() if total.get(s)), default=0.0)


class Forecaster:
    """Of one group. Estimates that were given out come back as ``learn``."""

    def __init__(self) -> None:
        self._ratios: Final[dict[str, deque[float]]] = {}
        self._level: Final[dict[str, float]] = {}
        self._hits = 0
        self._told = 0
        self._errors: Final[deque[float]] = deque(maxlen=KEPT)

    def estimate(self, ask: Ask, base_s: float) -> Estimate:
        kind = kind_of(ask, base_s)
        ratios = self._ratios.get(kind, ())
        level = self._level.get(kind, AIM)
        top = _quantile(ratios, min(level, 1.0), FIRST[1])
        if level > 1.0:  # more than was ever seen
            top *= 1.0 + 10.0 * (level - 1.0)
        middle = min(_quantile(ratios, 0.5, FIRST[0]), top)
        base = base_s + LEAST_S
        return Estimate(base * middle - LEAST_S, base * top - LEAST_S, base_s, kind)

    def learn(self, told: Estimate, waited_s: float) -> None:
        """It started, or waits already longer than p90 said; once for each estimate."""
        hit = waited_s <= max(0.0, told.p90_s)
        ratio = (waited_s + LEAST_S) / (told.base_s + LEAST_S)
        self._ratios.setdefault(told.kind, deque(maxlen=KEPT)).append(ratio)
        level = self._level.get(told.kind, AIM) + PACE * (AIM - hit)
        self._level[told.kind] = min(max(level, 0.5), 1.5)
        self._told += 1
        self._hits += hit
        self._errors.append(abs(waited_s - max(0.0, told.p50_s)))

    @property
    def told(self) -> int:
        """How many estimates have come true or not."""
        return self._told

    @property
    def coverage(self) -> float:
        """Part of all starts that came before p90; NaN before the first."""
        return self._hits / self._told if self._told else math.nan

    @property
    def median_error_s(self) -> float:
        """Between p50 and what came; of the newest."""
        return _quantile(self._errors, 0.5, math.nan)


def kind_of(ask: Ask, base_s: float) -> str:
    """Asks whose estimates err alike: by devices, run time and load, each on a coarse scale."""
    devices = int(math.log2(max(1, ask.devices * ask.members)))
    run = -1 if ask.limit_s is None else int(math.log10(max(1.0, ask.limit_s)))
    return f"{devices}/{run}/{int(math.log10(base_s + LEAST_S))}"


def _quantile(values: deque[float] | tuple[()], part: float, otherwise: float) -> float:
    """The smallest that at least *part* of them do not exceed."""
    if not values:
        return otherwise
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1))]
