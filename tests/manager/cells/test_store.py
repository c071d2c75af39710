"""Rows of interpreters and cells, on each kind of database."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Final

import sqlalchemy as sa

from madang.manager.cells import store
from madang.manager.cells.rules.narration import Outcome
from madang.manager.cells.types import CellRow, InterpreterRow
from madang.manager.db import Database
from madang.manager.session.tables import sessions
from madang.testing.manager import ManagerBox
from madang.wire.cells import CellError, CellStatus

INTERPRETER: Final = InterpreterRow(
    id="i1",
    session_id="",
    attempt=1,
    name="python",
    language="python",
    driver="",
    cwd="",
    env="{}",
    nonce="n",
    exec_id="x",
    base=2**50,
    version="",
    restarts=0,
    started_at=5,
    ended_at=None,
    ended="",
)


def cell(id_: str, seq: int, **more: object) -> CellRow:
    row = CellRow(
        interpreter_id="i1",
        id=id_,
        seq=seq,
        at=seq,
        code="1 + 1",
        silent=False,
        store=True,
        stdin=True,
        stop_on_error=True,
        status="waiting",
        number=None,
        took_us=None,
        cpu_us=None,
        mem_bytes=None,
        error="",
    )
    return replace(row, **more)  # type: ignore[arg-type]


async def with_interpreter(box: ManagerBox) -> Database:
    made = await box.call("POST", "/v1/sessions", {"argv": ["true"]})
    async with box.manager.database.begin() as tx:
        await store.add(tx, replace(INTERPRETER, session_id=made["id"]))
    return box.manager.database


async def test_cells_are_kept_in_order_with_how_they_ended(either_box: ManagerBox) -> None:
    database = await with_interpreter(either_box)
    async with database.begin() as tx:
        for row in (cell("b", 7), cell("a", 3), cell("c", 9, silent=True, store=False)):
            await store.add_cell(tx, row)
        error = CellError(name="E", text="nul \0 it", traceback=("long",), line=2)
        outcome = Outcome("a", CellStatus.ERROR, 1, 10, 20, 2**40, error)
        await store.end_cells(tx, "i1", [outcome, Outcome("nobody", CellStatus.OK)])
        assert [row.id for row in await store.list_cells(tx, "i1", 3)] == ["b", "c"]
        newest = await store.list_history(tx, "i1", before=2**62, limit=9)
        assert [row.id for row in newest] == ["b", "a"]
        assert [row.id for row in await store.list_history(tx, "i1", before=7, limit=9)] == ["a"]
        ended = await store.find_cell(tx, "i1", "a")
    assert ended is not None
    assert (ended.status, ended.number, ended.mem_bytes) == ("error", 1, 2**40)
    assert json.loads(ended.error)["text"] == "nul \0 it"
    assert json.loads(ended.error)["traceback"] == []


async def test_the_oldest_cells_go_first_and_none_that_waits(either_box: ManagerBox) -> None:
    database = await with_interpreter(either_box)
    async with database.begin() as tx:
        for number in range(6):
            await store.add_cell(tx, cell(f"c{number}", number, code="x" * 10))
        done = [Outcome(f"c{number}", CellStatus.OK) for number in (0, 2, 3, 4, 5)]
        await store.end_cells(tx, "i1", done)
        await store.prune(tx, "i1", count=3, size=1000)
        assert [c.id for c in await store.list_cells(tx, "i1", -1)] == ["c1", "c3", "c4", "c5"]
        await store.prune(tx, "i1", count=3, size=25)
        assert [c.id for c in await store.list_cells(tx, "i1", -1)] == ["c1", "c4", "c5"]


async def test_all_of_it_goes_with_the_session(either_box: ManagerBox) -> None:
    database = await with_interpreter(either_box)
    async with database.begin() as tx:
        await store.add_cell(tx, cell("a", 1))
        changed = await store.change(tx, "i1", ended="gone", ended_at=3)
        assert changed is not None
        assert (changed.ended, changed.base) == ("gone", 2**50)
        await tx.execute(sa.delete(sessions))
        assert await store.find(tx, "i1") is None
        assert await store.find_cell(tx, "i1", "a") is None
        assert await store.change(tx, "i1", ended="again") is None
