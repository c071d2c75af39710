"""All SQL of the cells slice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa

from madang.kit.codec import to_json
from madang.manager.cells.rules.narration import Outcome
from madang.manager.cells.tables import cells, interpreters
from madang.manager.cells.types import CellRow, InterpreterRow
from madang.manager.db import Reader, Transaction
from madang.manager.http import Caller
from madang.manager.identity.store import viewer, visible
from madang.manager.session.tables import sessions
from madang.wire.session import SessionStatus

_B = sa.bindparam
_FLAGS: Final = ("silent", "store", "stdin", "stop_on_error")
_LIVE: Final = interpreters.c.ended_at.is_(None)
_IN_SESSION: Final = interpreters.c.session_id == _B("b_session")
_OF: Final = cells.c.interpreter_id == _B("b_id")

_ADD: Final = sa.insert(interpreters)
_BY_ID: Final = sa.select(interpreters).where(interpreters.c.id == _B("b_id"))
_OF_SESSION: Final = sa.select(interpreters).where(_IN_SESSION).order_by(interpreters.c.id)
_SEEN: Final = (
    sa.select(interpreters)
    .join_from(interpreters, sessions, interpreters.c.session_id == sessions.c.id)
    .where(_LIVE, visible(sessions.c.owner_id, sessions.c.project_id))
    .order_by(interpreters.c.id)
    .limit(1000)
)
_STATUS_OF: Final = sa.select(interpreters, sessions.c.status).join_from(
    interpreters, sessions, interpreters.c.session_id == sessions.c.id
)
_UNENDED: Final = _STATUS_OF.where(_LIVE).order_by(interpreters.c.id)
_CHANGE: Final = (
    sa.update(interpreters).where(interpreters.c.id == _B("b_id")).returning(*interpreters.c)
)
_REMOVE: Final = sa.delete(interpreters).where(interpreters.c.id == _B("b_id"))
_ADD_CELL: Final = sa.insert(cells)
_CELL: Final = sa.select(cells).where(_OF, cells.c.id == _B("b_cell"))
_CELLS: Final = sa.select(cells).where(_OF, cells.c.seq > _B("b_after")).order_by(cells.c.seq)
_HISTORY: Final = (
    sa.select(cells)
    .where(
        _OF,
        cells.c.store == 1,
        cells.c.silent == 0,
        cells.c.seq < sa.bindparam("b_before", type_=sa.BigInteger),
    )
    .order_by(cells.c.seq.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_END_CELL: Final = sa.update(cells).where(_OF, cells.c.id == _B("b_cell"))
_RANKED: Final = (
    sa.select(
        cells.c.id,
        sa.func.row_number().over(order_by=cells.c.seq.desc()).label("rank"),
        sa.func.sum(sa.func.length(cells.c.code)).over(order_by=cells.c.seq.desc()).label("size"),
    )
    .where(_OF)
    .subquery()
)
_PRUNE: Final = sa.delete(cells).where(
    _OF,
    cells.c.status != "waiting",
    cells.c.id.in_(
        sa.select(_RANKED.c.id).where(
            sa.or_(
                _RANKED.c.rank > sa.bindparam("b_count", type_=sa.Integer),
                _RANKED.c.size > sa.bindparam("b_size", type_=sa.BigInteger),
            )
        )
    ),
)


def columns_of(row: InterpreterRow) -> dict[str, Any]:
    """For ``change``."""
    return {name: getattr(row, name) for name in InterpreterRow.__slots__}


async def add(tx: Transaction, row: InterpreterRow) -> None:
    await tx.execute(_ADD, **columns_of(row))


async def find(tx: Reader, interpreter_id: str) -> InterpreterRow | None:
    row = await tx.one(_BY_ID, b_id=interpreter_id)
    return None if row is None else _interpreter(row)


async def list_of(tx: Reader, session_id: str) -> list[InterpreterRow]:
    """Also those that have ended; oldest first."""
    return [_interpreter(row) for row in await tx.all(_OF_SESSION, b_session=session_id)]


async def list_seen(tx: Reader, caller: Caller) -> list[InterpreterRow]:
    """All live ones of sessions that *caller* sees."""
    return [_interpreter(row) for row in await tx.all(_SEEN, **viewer(caller))]


async def list_unended(tx: Reader) -> list[tuple[InterpreterRow, SessionStatus]]:
    """With the status of their sessions."""
    return [(_interpreter(row), SessionStatus(row.status)) for row in await tx.all(_UNENDED)]


async def change(tx: Transaction, interpreter_id: str, **columns: Any) -> InterpreterRow | None:
    """None if it is gone with its session."""
    row = await tx.one(_CHANGE, b_id=interpreter_id, **columns)
    return None if row is None else _interpreter(row)


async def remove(tx: Transaction, interpreter_id: str) -> None:
    await tx.execute(_REMOVE, b_id=interpreter_id)


async def add_cell(tx: Transaction, row: CellRow) -> None:
    columns = {name: getattr(row, name) for name in CellRow.__slots__}
    await tx.execute(_ADD_CELL, **columns | {flag: int(columns[flag]) for flag in _FLAGS})


async def find_cell(tx: Reader, interpreter_id: str, cell: str) -> CellRow | None:
    row = await tx.one(_CELL, b_id=interpreter_id, b_cell=cell)
    return None if row is None else _cell(row)


async def list_cells(tx: Reader, interpreter_id: str, after: int) -> list[CellRow]:
    """Accepted after event *after*, oldest first."""
    return [_cell(row) for row in await tx.all(_CELLS, b_id=interpreter_id, b_after=after)]


async def list_history(
    tx: Reader, interpreter_id: str, *, before: int, limit: int
) -> list[CellRow]:
    """Newest first."""
    found = await tx.all(_HISTORY, b_id=interpreter_id, b_before=before, b_limit=limit)
    return [_cell(row) for row in found]


async def end_cells(tx: Transaction, interpreter_id: str, outcomes: Iterable[Outcome]) -> None:
    for outcome in outcomes:
        error = "" if outcome.error is None else to_json(replace(outcome.error, traceback=()))
        await tx.execute(
            _END_CELL,
            b_id=interpreter_id,
            b_cell=outcome.cell,
            status=str(outcome.status),
            number=outcome.number,
            took_us=outcome.took_us,
            cpu_us=outcome.cpu_us,
            mem_bytes=outcome.mem_bytes,
            error=error.decode() if isinstance(error, bytes) else error,
        )


async def prune(tx: Transaction, interpreter_id: str, *, count: int, size: int) -> int:
    """Forget the oldest cells, so that at most *count* with *size* characters of code remain."""
    return await tx.execute(_PRUNE, b_id=interpreter_id, b_count=count, b_size=size)


def _interpreter(row: Any) -> InterpreterRow:
    return InterpreterRow(**{name: getattr(row, name) for name in InterpreterRow.__slots__})


def _cell(row: Any) -> CellRow:
    fields = {name: getattr(row, name) for name in CellRow.__slots__}
    return CellRow(**fields | {flag: bool(fields[flag]) for flag in _FLAGS})
