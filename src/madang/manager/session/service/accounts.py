"""What accounts hold (``limits.types.Ledger``)."""

from __future__ import annotations

from collections import Counter
from typing import Final

from madang.manager.db import Reader
from madang.manager.fleet.tables import SLOTS
from madang.manager.limits.types import Held
from madang.manager.session import store
from madang.manager.session.types import PLACED
from madang.manager.usage.service import UsageService
from madang.wire.session import SessionStatus

S = SessionStatus


class SessionLedger:
    """Sums over sessions' rows, and over the usage ledger: no figure is kept a second time."""

    def __init__(self, usage: UsageService) -> None:
        self._usage: Final = usage

    async def held(self, tx: Reader, account: str) -> Held:
        sessions = pending = 0
        slots: Counter[str] = Counter()
        for row in await store.list_held_by(tx, account):
            sessions += row.count
            if row.status == S.PENDING:
                pending += row.count
            if row.status in PLACED:
                slots.update({slot: int(getattr(row, slot)) for slot in SLOTS})
        return Held(sessions=sessions, pending=pending, slots=slots)

    async def cpu_seconds(self, tx: Reader, account: str, since: int, now: int) -> float:
        return await self._usage.cpu_seconds(tx, account, since, now)
