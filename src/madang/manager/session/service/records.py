"""What the audit log gets of sessions: what people did, not what followed from it (history)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

from madang.manager.audit.service import AuditLog, actor_of
from madang.manager.db import Database, Transaction, seconds
from madang.manager.http import Caller
from madang.manager.session.types import SessionRow
from madang.wire.session import SessionSpec

KIND: Final = "session"
_PROGRAM: Final = re.compile(r"[A-Za-z0-9._+-]{1,64}")


class Records:
    """Arguments and variables are never written down: people put secrets there."""

    def __init__(self, database: Database, audit: AuditLog) -> None:
        self._database: Final = database
        self._audit: Final = audit

    async def write(
        self,
        tx: Transaction,
        caller: Caller,
        row: SessionRow,
        action: str,
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
    ) -> None:
        """In the transaction of the change."""
        await self._audit.record(
            tx,
            actor=actor_of(caller),
            action=f"{KIND}.{action}",
            kind=KIND,
            id=row.id,
            name=row.name,
            before=before,
            after=after,
        )

    async def created(
        self, tx: Transaction, caller: Caller, row: SessionRow, spec: SessionSpec
    ) -> None:
        after = {
            "kind": row.kind,
            "project": row.project_id,
            "group": row.group_name,
            "image": row.image,
            "program": program(spec.argv),
            "cpu_milli": row.cpu_milli,
            "mem_bytes": row.mem_bytes,
            "disk_bytes": row.disk_bytes,
            "pids": row.pids,
        }
        if row.time_us is not None:
            after["time_s"] = seconds(row.time_us)
        if spec.policy:
            after["policy_digest"] = hashlib.sha256(spec.policy.encode()).hexdigest()
        await self.write(tx, caller, row, "created", after=after)

    async def note(self, caller: Caller, row: SessionRow, action: str, **after: Any) -> None:
        """Before something that the database does not see: input, one more program, files."""
        async with self._database.begin() as tx:
            await self.write(tx, caller, row, action, after=after)

    async def note_reading(self, caller: Caller, row: SessionRow, **after: Any) -> None:
        """Somebody reads output or files; written down where they are not their own."""
        if caller.user_id != row.owner_id:
            await self.note(caller, row, "read", owner=row.owner, **after)


def program(argv: tuple[str, ...]) -> str:
    """Name of the program alone; empty where that is no plain name."""
    name = argv[0].rpartition("/")[2] if argv else ""
    return name if _PROGRAM.fullmatch(name) else ""
