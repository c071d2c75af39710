"""What changed about people: in the audit log, and told to everybody whom it concerns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from madang.kit.clock import Clock
from madang.manager.audit.service import Actor, AuditLog
from madang.manager.db import Transaction, micros
from madang.manager.db.events import EventFeed, add_event

KIND: Final = "identity.changed"


class Journal:
    def __init__(self, audit: AuditLog, feed: EventFeed, clock: Clock) -> None:
        self.audit: Final = audit
        self._feed: Final = feed
        self._clock: Final = clock

    async def note(
        self,
        tx: Transaction,
        actor: Actor,
        action: str,
        kind: str,
        subject: str,
        name: str,
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        domain: str | None = None,
    ) -> None:
        """In the transaction of the change itself; *subject* is an id."""
        await self.audit.record(
            tx,
            actor=actor,
            action=action,
            kind=kind,
            id=subject,
            name=name,
            before=before,
            after=after,
            domain=domain,
        )
        await add_event(
            tx,
            at=micros(self._clock.now()),
            kind=KIND,
            subject=subject,
            owner_id="",
            payload={"what": action, "kind": kind, "name": name, "actor": actor.name},
        )

    def tell(self) -> None:
        """The transaction is committed."""
        self._feed.wake()
