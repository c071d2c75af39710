"""Background duty of the audit log."""

from __future__ import annotations

import logging
from typing import Final

from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.manager.audit.service import AuditLog
from madang.manager.audit.types import AuditSettings

log = logging.getLogger(__name__)


class AuditKeeper(Loop):
    """Removes what is too old; tells the head to the server's log, which lies elsewhere."""

    period_s = 600.0

    def __init__(self, audit: AuditLog, clock: Clock, settings: AuditSettings) -> None:
        super().__init__(clock)
        self._audit: Final = audit
        self._settings: Final = settings
        self._told = ""

    async def tick(self, now: float) -> None:
        if self._settings.retention_s is not None:
            removed = await self._audit.cut(self._settings.retention_s)
            if removed:
                log.info("audit records removed", extra={"records": removed})
        head = str(await self._audit.newest())
        if head != self._told:
            self._told = head
            log.info("audit head", extra={"head": head})
