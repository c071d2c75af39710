"""What changed about people, told to everybody whom it concerns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from madang.kit.clock import Clock
from madang.manager.db import Transaction, micros
from madang.manager.db.events import EventFeed, add_event

KIND: Final = "identity.changed"


class Journal:
    def __init__(self, feed: EventFeed, clock: Clock) -> None:
        self._feed: Final = feed
        self._clock: Final = clock

    async def note(
        self,
        tx: Transaction,
        actor: Any,
        action: str,
        kind: str,
        subject: str,
        name: str,
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
    ) -> None:
        """In the transaction of the change itself; *subject* is an id."""
        await add_event(
            tx,
            at=micros(self._clock.now()),
            kind=KIND,
            subject=subject,
            owner_id="",
            payload={"what": action, "kind": kind, "name": name, "actor": actor.user},
        )

    def tell(self) -> None:
        """The transaction is committed."""
        self._feed.wake()
