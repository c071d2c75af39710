"""What the platform knows today (machines, slots, priorities), put to the planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from madang.manager.scheduling import planner
from madang.manager.scheduling.planner.reasons import lacking, show, slot_name
from madang.manager.scheduling.types import Amounts, Ask, Held, Plan, Policy, Room, Snapshot

__all__ = ["RESERVE_AFTER_S", "lacking", "plan", "show", "slot_name"]

RESERVE_AFTER_S: Final = 120.0


def plan(
    pending: Sequence[Ask],
    rooms: Sequence[Room],
    now: float,
    *,
    held: Sequence[Held] = (),
    reserve_after_s: float = RESERVE_AFTER_S,
    limits: Mapping[str, Amounts] | None = None,
    names: Mapping[str, str] | None = None,
) -> Plan:
    """Place what fits, by priority and time of creation; say why the rest waits.

    *limits*: account → slots at once; *names*: account → what people call it.
    """
    policy = Policy(reserve_after_s=reserve_after_s, limits=limits or {}, names=names or {})
    snapshot = Snapshot(pending=tuple(pending), rooms=tuple(rooms), held=tuple(held))
    return planner.plan(snapshot, policy, now)
