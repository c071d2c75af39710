"""All groups, and what is decided before a machine is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from operator import attrgetter
from typing import Final

from madang.manager.scheduling.planner.holdings import Holdings
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
    names = _Names(snapshot)
    for ask in sorted(snapshot.pending, key=attrgetter("created_at", "session")):
        if (wait := _never(ask, snapshot, names, now)) is not None:
            given_up.append(wait)
        elif (wait := _later(ask, snapshot, names, now)) is not None:
            waits.append(wait)
        else:
            queues.setdefault(ask.group, []).append(ask)
    found = Plan((), tuple(waits), (), tuple(given_up))
    default = Policy()
    policies = {
        group: policy if isinstance(policy, Policy) else policy.get(group, default)
        for group in queues
    }
    holdings = Holdings(snapshot.held, policies.values())
    for group, asks in sorted(queues.items()):
        one = Pass(snapshot, group, asks, policies[group], now, holdings).run()
        found = Plan(
            found.places + one.places,
            found.waits + one.waits,
            found.preempts + one.preempts,
            found.given_up,
        )
    return found


class _Names:
    """What people call sessions of a snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot: Final = snapshot

    @cached_property
    def _known(self) -> dict[str, str]:
        everybody: Iterable[tuple[str, str]] = (
            *((one.session, one.name) for one in self._snapshot.held),
            *((ask.session, ask.name) for ask in self._snapshot.pending),
        )
        return dict(everybody)

    def of(self, session: str) -> str:
        return self._known.get(session, session)


def _never(ask: Ask, snapshot: Snapshot, names: _Names, now: float) -> Wait | None:
    if ask.after and not ask.after_any:
        failed = next((one for one in ask.after if snapshot.ended.get(one) is False), None)
        if failed is not None:
            text = f"will not start: {names.of(failed)}, which it comes after, did not end well."
            return Wait(ask.session, "dependency.failed", text)
    if ask.give_up_at is not None and now >= ask.give_up_at:
        waited = format_duration(now - ask.created_at)
        return Wait(ask.session, "pending.timeout", f"given up after waiting {waited}.")
    return None


def _later(ask: Ask, snapshot: Snapshot, names: _Names, now: float) -> Wait | None:
    if now < ask.not_before:
        left = format_duration(ask.not_before - now)
        return Wait(ask.session, "time.later", f"starts at the earliest in {left}, as asked.")
    if not ask.after:
        return None
    if missing := [one for one in ask.after if one not in snapshot.ended]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        text = f"waits for {names.of(missing[0])}{more} to end."
        return Wait(ask.session, "dependency.waits", text)
    return None
