"""What accounts hold (``limits.types.Ledger``)."""

from __future__ import annotations

from typing import Final

from madang.manager.db import Reader
from madang.manager.limits.types import Amounts, Counts
from madang.manager.session import store
from madang.manager.usage.service import UsageService
from madang.wire.session import SessionStatus

S = SessionStatus


class SessionLedger:
    """Sums over sessions' rows, and over the usage ledger: no figure is kept a second time."""

    def __init__(self, usage: UsageService) -> None:
        self._usage: Final = usage

    async def count(self, tx: Reader, account: str) -> Counts:
        found = await store.count_of(tx, account)
        return Counts(sessions=sum(found.values()), pending=found.get(S.PENDING, 0))

    async def slots(self, tx: Reader, account: str) -> Amounts:
        return await store.sum_of(tx, account)

    async def cpu_seconds(self, tx: Reader, account: str, since: int, now: int) -> float:
        return await self._usage.cpu_seconds(tx, account, since, now)
