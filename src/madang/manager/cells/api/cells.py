"""Interpreters and cells over plain HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from madang.manager.cells.service import CellService
from madang.manager.cells.service.service import MAX_WAIT_S
from madang.manager.http import Call, Reply, endpoint
from madang.wire.cells import (
    Cell,
    CellQuestion,
    CellRequest,
    Completions,
    InputAnswer,
    Inspection,
    Interpreter,
    InterpreterRequest,
)

CODE_LIMIT: Final = 8 << 20
"""Bytes of a request: a MiB of code takes up to six as JSON escapes."""
OF_SESSION: Final = "/v1/sessions/{ref}/interpreters"
ONE: Final = OF_SESSION + "/{interpreter}"

Seconds = Annotated[float, Meta(ge=0, le=MAX_WAIT_S)]


class WaitQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    wait: Seconds = 0.0
    """For the cell's end."""


class HistoryQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    before: Annotated[int, Meta(ge=0)] | None = None
    """Number of an ``accepted`` event."""


class CellApi:
    def __init__(self, cells: CellService) -> None:
        self._cells: Final = cells

    @endpoint("GET", "/v1/interpreters", returns=list[Interpreter])
    async def list_all_interpreters(self, call: Call[None, None]) -> list[Interpreter]:
        """List the live interpreters of all sessions that you see."""
        return await self._cells.list_interpreters(call.caller)

    @endpoint(
        "POST",
        OF_SESSION,
        scope="sessions",
        body=InterpreterRequest,
        returns=Interpreter,
        status=201,
    )
    async def start_interpreter(self, call: Call[None, InterpreterRequest]) -> Reply:
        """Start an interpreter in a running session; cells can be given to it at once."""
        ref = call.path("ref")
        made = await self._cells.start(call.caller, ref, call.body)
        where = f"/v1/sessions/{made.session_id}/interpreters/{made.id}"
        return Reply(made, {"Location": where}, 201)

    @endpoint("GET", OF_SESSION, returns=list[Interpreter])
    async def list_interpreters(self, call: Call[None, None]) -> list[Interpreter]:
        """List a session's interpreters, also those that have ended."""
        return await self._cells.list_interpreters(call.caller, call.path("ref"))

    @endpoint("GET", ONE, returns=Interpreter)
    async def get_interpreter(self, call: Call[None, None]) -> Interpreter:
        """Read an interpreter, by name or id."""
        return await self._cells.get(call.caller, *_names(call))

    @endpoint("DELETE", ONE, scope="sessions", returns=Interpreter)
    async def stop_interpreter(self, call: Call[None, None]) -> Interpreter:
        """End an interpreter; the session goes on. Idempotent."""
        return await self._cells.stop(call.caller, *_names(call))

    @endpoint("POST", ONE + "/restart", scope="sessions", returns=Interpreter)
    async def restart_interpreter(self, call: Call[None, None]) -> Interpreter:
        """End its program and start another: all state is gone, the session goes on."""
        return await self._cells.restart(call.caller, *_names(call))

    @endpoint("POST", ONE + "/interrupt", scope="sessions", status=204)
    async def interrupt_interpreter(self, call: Call[None, None]) -> None:
        """Interrupt the running cell (SIGINT)."""
        await self._cells.interrupt(call.caller, *_names(call))

    @endpoint(
        "POST",
        ONE + "/cells",
        scope="sessions",
        query=WaitQuery,
        body=CellRequest,
        returns=Cell,
        body_limit=CODE_LIMIT,
    )
    async def execute_cell(self, call: Call[WaitQuery, CellRequest]) -> Cell:
        """Run a piece of code; with wait, answer once it has ended. The same id runs once."""
        cell = await self._cells.execute(call.caller, *_names(call), call.body)
        if not call.query.wait:
            return cell
        return await self._cells.wait(call.caller, *_names(call), cell.id, call.query.wait)

    @endpoint("GET", ONE + "/cells", query=HistoryQuery, returns=list[Cell])
    async def list_cells(self, call: Call[HistoryQuery, None]) -> list[Cell]:
        """The newest cells without what came of them, oldest first: the history."""
        query = call.query
        return await self._cells.history(
            call.caller, *_names(call), limit=query.limit, before=query.before
        )

    @endpoint("GET", ONE + "/cells/{cell}", query=WaitQuery, returns=Cell)
    async def get_cell(self, call: Call[WaitQuery, None]) -> Cell:
        """A cell with all that came of it so far; with wait, once it has ended."""
        names = _names(call)
        return await self._cells.wait(call.caller, *names, call.path("cell"), call.query.wait)

    @endpoint("POST", ONE + "/input", scope="sessions", body=InputAnswer, status=204)
    async def answer_input(self, call: Call[None, InputAnswer]) -> None:
        """Answer the cell that asks for input."""
        await self._cells.input(call.caller, *_names(call), call.body.text)

    @endpoint(
        "POST",
        ONE + "/complete",
        scope="sessions",
        body=CellQuestion,
        returns=Completions,
        body_limit=CODE_LIMIT,
    )
    async def complete_code(self, call: Call[None, CellQuestion]) -> Completions:
        """What may stand at the cursor."""
        body = call.body
        return await self._cells.complete(call.caller, *_names(call), body.code, body.cursor)

    @endpoint(
        "POST",
        ONE + "/inspect",
        scope="sessions",
        body=CellQuestion,
        returns=Inspection,
        body_limit=CODE_LIMIT,
    )
    async def inspect_code(self, call: Call[None, CellQuestion]) -> Inspection:
        """What is known of the name at the cursor."""
        body = call.body
        return await self._cells.inspect(call.caller, *_names(call), body.code, body.cursor)


def _names(call: Call[Any, Any]) -> tuple[str, str]:
    return call.path("ref"), call.path("interpreter")
