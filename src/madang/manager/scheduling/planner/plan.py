"""All groups, and what is decided before a machine is looked at."""

from __future__ import annotations

from collections.abc import Mapping

from madang.manager.scheduling.planner.passes import Pass
from madang.manager.scheduling.types import Ask, Plan, Policy, Snapshot, Wait
from madang.wire.size import format_duration


def plan(snapshot: Snapshot, policy: Policy | Mapping[str, Policy], now: float) -> Plan:
    """*policy* of every group, or by group (the default where none is named).

    Raises plugins.UnknownPlugin.
    """
    waits: list[Wait] = []
    given_up: list[Wait] = []
    queues: dict[str, list[Ask]] = {}
    for ask in sorted(snapshot.pending, key=lambda a: (a.created_at, a.session)):
        if (wait := _never(ask, snapshot, now)) is not None:
            given_up.append(wait)
        elif (wait := _later(ask, snapshot, now)) is not None:
            waits.append(wait)
        else:
            queues.setdefault(ask.group, []).append(ask)
    found = Plan((), tuple(waits), (), tuple(given_up))
    for group, asks in sorted(queues.items()):
        mine = policy if isinstance(policy, Policy) else policy.get(group, Policy())
        one = Pass(snapshot, group, asks, mine, now).run()
        found = Plan(
            found.places + one.places,
            found.waits + one.waits,
            found.preempts + one.preempts,
            found.given_up,
        )
    return found


def _never(ask: Ask, snapshot: Snapshot, now: float) -> Wait | None:
    failed = next((one for one in ask.after if snapshot.ended.get(one) is False), None)
    if failed is not None:
        text = f"will not start: {failed}, which it comes after, did not end well."
        return Wait(ask.session, "dependency.failed", text)
    if ask.give_up_at is not None and now >= ask.give_up_at:
        waited = format_duration(now - ask.created_at)
        return Wait(ask.session, "pending.timeout", f"given up after waiting {waited}.")
    return None


def _later(ask: Ask, snapshot: Snapshot, now: float) -> Wait | None:
    if now < ask.not_before:
        left = format_duration(ask.not_before - now)
        return Wait(ask.session, "time.later", f"starts at the earliest in {left}, as asked.")
    missing = [one for one in ask.after if one not in snapshot.ended]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        text = f"waits for {missing[0]}{more} to end."
        return Wait(ask.session, "dependency.waits", text)
    return None
