"""When waiting sessions will probably start."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from madang.kit.codec import from_json
from madang.manager.db import seconds
from madang.manager.scheduling.planner.forecast import works_before
from madang.manager.scheduling.service import Memory
from madang.manager.scheduling.types import Policy, Told, Wait
from madang.manager.session.service.snapshots import View
from madang.wire.session import Pending

_DEFAULT: Final = Policy()


def estimates(view: View, waits: Iterable[Wait], memory: Memory, now: float) -> dict[str, Told]:
    """For those who wait for room or for a time; nobody knows when what else is lacking comes."""
    asks = {ask.session: ask for ask in view.snapshot.pending}
    bases: dict[str, dict[str, float]] = {}
    found: dict[str, Told] = {}
    for wait in waits:
        if not wait.code.startswith(("capacity.", "time.")):
            continue
        ask = asks[wait.session]
        if ask.group not in bases:
            policy = view.policies.get(ask.group, _DEFAULT)
            run_times = memory.run_times(ask.group)
            bases[ask.group] = works_before(view.snapshot, ask.group, policy, now, run_times)
        estimate = memory.forecaster(ask.group).estimate(ask, bases[ask.group][ask.session])
        least = max(0.0, ask.not_before - now)
        found[wait.session] = Told(
            at=now,
            p50_s=max(least, estimate.p50_s),
            p90_s=max(least, estimate.p90_s),
            base_s=estimate.base_s,
            kind=estimate.kind,
        )
    return found


@lru_cache(maxsize=8192)
def reason_in(text: str) -> Pending:
    """Of a row; each pass looks at those of all that wait."""
    return from_json(Pending, text)


def pending_of(row: Any, wait: Wait, told: Told | None, at: int) -> Pending:
    """*row*: of ``store.list_pending``, with what was said before."""
    since = seconds(at)
    if row.pending is None:
        since = seconds(row.created_at)
    elif (old := reason_in(row.pending)).code == wait.code:
        since = old.since
    return Pending(
        code=wait.code,
        text=wait.text,
        since=since,
        start_p50=None if told is None else told.at + told.p50_s,
        start_p90=None if told is None else told.at + told.p90_s,
    )
