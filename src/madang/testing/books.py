"""Whether the usage ledger agrees with the sessions, for tests of bad days."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import sqlalchemy as sa

from madang.client import Client
from madang.kit.codec import from_json
from madang.manager.db import Database, micros
from madang.manager.session.tables import sessions
from madang.manager.session.types import SessionRow
from madang.manager.usage.tables import usage
from madang.manager.usage.types import UsageRow
from madang.wire.audit import verify
from madang.wire.session import Ended, Session, SessionStatus
from madang.wire.usage import Interval

S = SessionStatus
CLOSE_S: Final = 2e-5
"""Times come as floating-point numbers."""
_ROWS = sa.select(usage).order_by(usage.c.session_id, usage.c.attempt, usage.c.recorded_at,
                                  usage.c.id)  # fmt: skip
_SESSIONS = sa.select(sessions)
_RUNS = {S.RUNNING, S.TERMINATING}


async def ledger_rows(database: Database) -> list[UsageRow]:
    async with database.read() as tx:
        return [UsageRow(*row) for row in await tx.all(_ROWS)]


async def _sessions(database: Database) -> dict[str, SessionRow]:
    async with database.read() as tx:
        return {row.id: SessionRow(*row) for row in await tx.all(_SESSIONS)}


async def check_ledger(database: Database) -> None:
    """Each run has one row in force, as long and as large as the session itself says."""
    known, rows = await _sessions(database), await ledger_rows(database)
    while (again := await _sessions(database)) != known:  # Somebody was at work between the two.
        known, rows = again, await ledger_rows(database)
    corrected = {row.corrects for row in rows}
    in_force = [row for row in rows if row.id not in corrected]
    runs = [(row.session_id, row.attempt) for row in in_force]
    assert len(runs) == len(set(runs)), f"a run counts twice: {runs}"
    of_session = {row.session_id: row for row in in_force}
    for session in known.values():
        _compare(session, of_session.get(session.id))


def _compare(session: SessionRow, row: UsageRow | None) -> None:
    name = f"{session.name} ({session.status})"
    if session.started_at is None:
        assert row is None, f"{name} never began and is in the ledger"
        return
    assert row is not None, f"{name} began and is not in the ledger"
    assert (row.attempt, row.nonce, row.node) == (session.attempt, session.nonce, session.node)
    for slot in ("cpu_milli", "mem_bytes", "disk_bytes", "pids"):
        assert getattr(row, slot) == getattr(session, slot), f"{name}: another {slot}"
    assert row.started_at == session.started_at
    if session.status in _RUNS:
        assert row.ended_at is None, f"{name} goes on, its row is closed"
        return
    assert session.status == S.TERMINATED
    assert session.ended is not None
    assert row.ended_at is not None, f"{name} has ended, its row is open"
    if row.closed_by != "admin" and row.corrects is None:
        ran = micros(from_json(Ended, session.ended).duration_s)
        assert row.ended_at - row.started_at == ran, f"{name} ran {ran} us, its row has another"


def check_books(client: Client, ended: Iterable[Session]) -> None:
    """After a bad day, from outside: each of these has its interval; the audit log is whole."""
    sessions = {each.id: each for each in ended}
    found: dict[str, list[Interval]] = {session: [] for session in sessions}
    cursor: str | None = None
    while True:
        page = client.list_intervals(limit=500, cursor=cursor)
        for each in page.items:
            if each.session_id in found:
                found[each.session_id].append(each)
        cursor = page.next
        if cursor is None:
            break
    for session in sessions.values():
        _check_interval(session, found[session.id])
    assert verify(iter(b"".join(client.export_audit()).splitlines(keepends=True))).problem == ""


def _check_interval(session: Session, found: list[Interval]) -> None:
    assert session.ended is not None
    if session.started_at is None:
        assert found == [], f"{session.name} never began and is in the ledger"
        return
    (each,) = found
    assert each.ended_at is not None, f"{session.name} has ended, its interval is open"
    assert (each.cpu, each.mem_bytes) == (session.size.cpu, session.size.mem_bytes)
    assert abs(each.started_at - session.started_at) < CLOSE_S
    assert abs(each.ended_at - each.started_at - session.ended.duration_s) < CLOSE_S
    if each.closed_by == "agent":
        assert (each.cpu_s is None) is (session.ended.cpu_s is None)
