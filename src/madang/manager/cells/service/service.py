"""What users do with interpreters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from madang.manager.http import Caller
from madang.wire.cells import (
    Cell,
    CellEvent,
    CellRequest,
    Completions,
    Inspection,
    Interpreter,
    InterpreterRequest,
)


class CellService:
    """Interpreters of the sessions that a caller sees; who may use a session may use them.

    *ref* names the session, *name* the interpreter (its name or id). With an empty *ref*, *name*
    is an id. Raises NotFound for both.
    """

    async def start(self, caller: Caller, ref: str, request: InterpreterRequest) -> Interpreter:
        """Start it; cells may be given at once. Raises SessionNotRunning, Conflict, …"""
        raise NotImplementedError

    async def list(self, caller: Caller, ref: str = "") -> list[Interpreter]:
        """Of one session, with those that have ended; without *ref* all live ones that are seen."""
        raise NotImplementedError

    async def get(self, caller: Caller, ref: str, name: str) -> Interpreter:
        raise NotImplementedError

    async def stop(self, caller: Caller, ref: str, name: str) -> Interpreter:
        """End it. Idempotent."""
        raise NotImplementedError

    async def restart(self, caller: Caller, ref: str, name: str) -> Interpreter:
        """End its program and start another of the same id; waiting cells are aborted."""
        raise NotImplementedError

    async def interrupt(self, caller: Caller, ref: str, name: str) -> None:
        """SIGINT; if the cell goes on, a STATUS event says so in words."""
        raise NotImplementedError

    async def execute(self, caller: Caller, ref: str, name: str, request: CellRequest) -> Cell:
        """Accept a cell (ACCEPTED is told before this returns); ``follow`` tells what comes."""
        raise NotImplementedError

    async def wait(self, caller: Caller, ref: str, name: str, cell: str, timeout_s: float) -> Cell:
        """A cell with its events, once it has ended or after *timeout_s*."""
        raise NotImplementedError

    async def input(self, caller: Caller, ref: str, name: str, text: str) -> None:
        """Answer the cell that asks. Raises Conflict if none does."""
        raise NotImplementedError

    async def complete(
        self, caller: Caller, ref: str, name: str, code: str, cursor: int | None
    ) -> Completions:
        """Raises InterpreterBusy if a cell runs for too long."""
        raise NotImplementedError

    async def inspect(
        self, caller: Caller, ref: str, name: str, code: str, cursor: int | None
    ) -> Inspection:
        raise NotImplementedError

    async def history(
        self, caller: Caller, ref: str, name: str, *, limit: int = 100, before: int | None = None
    ) -> list[Cell]:
        """The newest cells that were to be kept, oldest of them first, without events."""
        raise NotImplementedError

    def follow(
        self, caller: Caller, ref: str, name: str, after: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[CellEvent]]:
        """All events after number *after* (0: all that are kept; None: from now on).

        Ends after the STATUS event of the interpreter's end; a restart does not end it. Counts as
        a client while it is open.
        """
        raise NotImplementedError
