"""Attempts to log in: each is counted before it is judged, in the database.

So many at once are not cheaper than one by one, and a restart forgets none.
"""

from __future__ import annotations

import math
from typing import Final

from madang.kit.clock import Clock
from madang.manager.audit.service import AuditLog, stranger
from madang.manager.db import Database, Transaction, micros, seconds
from madang.manager.identity.rules import names, throttle
from madang.manager.identity.store import logins as store
from madang.wire.errors import LoginFailed, PlatformError, RateLimited

Counters = tuple[throttle.Counter, ...]


class Gate:
    def __init__(self, database: Database, clock: Clock, audit: AuditLog) -> None:
        self._database: Final = database
        self._clock: Final = clock
        self._audit: Final = audit

    async def count(self, counters: Counters) -> None:
        """This attempt counts as failed until it has succeeded. Raises RateLimited."""
        now = micros(self._clock.now())
        async with self._database.begin() as tx:
            failures = {}
            for counter in counters:
                row = await store.find_attempts(tx, counter.subject)
                since_s = 0.0 if row is None else seconds(now - row.last_at)
                known = 0 if row is None or since_s > throttle.FORGET_S else int(row.failures)
                left = throttle.left_s(counter, known, since_s)
                if left > 0:
                    text = f"too many attempts: wait {math.ceil(left)} s."
                    raise RateLimited(text, retry_after_s=left)
                failures[counter.subject] = known + 1
            for subject, count in failures.items():
                await store.count_attempt(tx, subject, count, now)

    async def forgive(self, tx: Transaction, counters: Counters) -> None:
        """It succeeded: the pair starts anew, the others forget this one attempt."""
        for counter in counters:
            row = await store.find_attempts(tx, counter.subject)
            if row is None:
                continue
            if counter.subject.startswith("pair:") or row.failures <= 1:
                await store.forgive(tx, counter.subject)
            else:
                await store.count_attempt(tx, counter.subject, row.failures - 1, row.last_at)

    async def note_failure(self, name: str, error: PlatformError) -> None:
        shown = name if names.valid(name) else "(no name of a user)"
        async with self._database.begin() as tx:
            await self._audit.record(
                tx,
                actor=stranger(shown),
                action="login.failed" if isinstance(error, LoginFailed) else "login.otp_asked",
                kind="user",
                id="",
                name=shown,
                after={"name": error.code},
            )
