"""Background duties of the identity slice."""

from __future__ import annotations

from typing import Final

from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.manager.db import Database, micros
from madang.manager.http import OpenCalls
from madang.manager.identity.rules.throttle import FORGET_S
from madang.manager.identity.service import IdentityService
from madang.manager.identity.service.journal import KIND
from madang.manager.identity.store import logins, tokens
from madang.wire.api import Event

KEEP_S: Final = 30 * 86400.0
"""How long logins and invitations that are over stay in the database."""
PRUNE_EVERY_S: Final = 60.0


class Doorkeeper(Loop):
    """Cuts streams whose caller may no longer be here, and forgets what is over.

    Woken by each change of people; looks by itself for tokens that expire under an open stream.
    """

    period_s = 10.0

    def __init__(
        self, database: Database, identity: IdentityService, calls: OpenCalls, clock: Clock
    ) -> None:
        super().__init__(clock)
        self._database: Final = database
        self._identity: Final = identity
        self._calls: Final = calls
        self._pruned = 0.0

    def heard(self, event: Event) -> None:
        if event.kind == KIND:
            self.wake()

    async def tick(self, now: float) -> None:
        await self._calls.cut(self._identity.may_stay)
        if abs(now - self._pruned) >= PRUNE_EVERY_S:
            self._pruned = now
            await self._prune(now)

    async def _prune(self, now: float) -> None:
        async with self._database.begin() as tx:
            await tokens.forget_nonces(tx, micros(now))
            await tokens.prune_logins(tx, micros(now - KEEP_S))
            await logins.prune_invitations(tx, micros(now - KEEP_S))
            await logins.prune_attempts(tx, micros(now - FORGET_S))
