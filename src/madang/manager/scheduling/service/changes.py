"""What groups and reservations have in common when they change: a record, and a word to all."""

from __future__ import annotations

from collections.abc import Mapping

from madang.manager.audit.service import AuditLog, actor_of
from madang.manager.db import Transaction
from madang.manager.db.events import add_event
from madang.manager.http import Caller


async def note(
    audit: AuditLog,
    tx: Transaction,
    caller: Caller,
    action: str,
    name: str,
    before: Mapping[str, object] | None,
    after: Mapping[str, object] | None,
) -> None:
    """To the audit log; the first part of *action* is the kind of what is called *name*."""
    await audit.record(
        tx,
        actor=actor_of(caller),
        action=action,
        kind=action.partition(".")[0],
        id=name,
        name=name,
        before=before,
        after=after,
    )


async def announce(tx: Transaction, name: str, at: int) -> None:
    """Schedulers, in other servers too, are to look at their groups again."""
    payload = {"name": name}
    await add_event(tx, at=at, kind="group.changed", subject=name, owner_id="", payload=payload)
