"""What users do with interpreters."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.kit.ids import new_id
from madang.kit.tasks import TaskSet
from madang.manager.cells import store
from madang.manager.cells.rules.memory import size_of
from madang.manager.cells.rules.narration import new_row
from madang.manager.cells.service.following import Follower
from madang.manager.cells.service.hub import Around, Hub, view
from madang.manager.cells.service.programs import Programs
from madang.manager.cells.types import FINAL, CellRow, CellSettings, InterpreterRow, Languages
from madang.manager.db import Database, Transaction, micros
from madang.manager.http import Caller
from madang.manager.session import store as session_store
from madang.manager.session.service import SessionService
from madang.manager.session.service.kernels import KernelService, not_running
from madang.manager.session.types import SessionRow
from madang.wire.cells import (
    Cell,
    CellError,
    CellEvent,
    CellRequest,
    CellStatus,
    Completions,
    EventKind,
    Inspection,
    Interpreter,
    InterpreterRequest,
)
from madang.wire.errors import Conflict, InterpreterBusy, InvalidRequest, NotFound, PlatformError
from madang.wire.session import SessionStatus

S = SessionStatus
MAX_WAIT_S: Final = 60.0
MAX_ANSWER: Final = 12 << 20
"""Of a cell's events that are given together; what is more is left out."""
NOTED_S: Final = 3600.0
"""Who feeds an interpreter is written into the audit log once in so long."""
_PRUNE_EVERY: Final = 256
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_CELL_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


class CellService:
    """Interpreters of the sessions that a caller sees; who may use a session may use them.

    *ref* names the session, *name* the interpreter (its name or id). With an empty *ref*, *name*
    is an id. Raises NotFound for both.
    """

    def __init__(
        self,
        database: Database,
        sessions: SessionService,
        kernels: KernelService,
        languages: Languages,
        clock: Clock,
        settings: CellSettings,
    ) -> None:
        self._database: Final = database
        self._sessions: Final = sessions
        self._kernels: Final = kernels
        self._programs: Final = Programs(kernels, languages)
        self._clock: Final = clock
        self._settings: Final = settings
        self._tasks: Final = TaskSet()
        self.on_news: Callable[[], None] = lambda: None
        """Called when ``flush`` has something to do."""
        self._around: Final = Around(kernels, clock, self._tasks, settings, news=self._news)
        self._hubs: Final[dict[str, Hub]] = {}
        self._opening: Final = asyncio.Lock()

    def _news(self) -> None:
        self.on_news()

    # Interpreters

    async def start(self, caller: Caller, ref: str, request: InterpreterRequest) -> Interpreter:
        """Start it; cells may be given at once. Raises SessionNotRunning, Conflict, …"""
        session = await self._running(caller, ref)
        language = self._programs.language(request.language, request.driver)
        _check(request)
        async with self._database.read() as tx:
            known = await store.list_of(tx, session.id)
        self._check_room(session, known)
        name = _free_name(request, language.name, known)
        row = InterpreterRow(
            id=new_id(),
            session_id=session.id,
            attempt=session.attempt,
            name=name,
            language=language.name if not request.driver else request.language,
            driver=request.driver,
            cwd=request.cwd,
            env=to_json(request.env).decode(),
            nonce="",
            exec_id="",
            base=0,
            version="",
            restarts=0,
            started_at=micros(self._clock.now()),
            ended_at=None,
            ended="",
        )
        await self._sessions.records.note(
            caller, session, "exec_started", program=request.driver or language.name
        )
        exec_id, nonce = await self._programs.start(session, row)
        row = replace(row, exec_id=exec_id, nonce=nonce)
        async with self._database.begin() as tx:
            for old in _surplus(known, self._settings.interpreters):
                await store.remove(tx, old.id)
            await store.add(tx, row)
        hub = self._hubs[row.id] = Hub(self._around, session, row)
        hub.follow(fresh=True)
        return hub.view()

    def _check_room(self, session: SessionRow, known: list[InterpreterRow]) -> None:
        live = sum(row.ended_at is None for row in known)
        if live >= self._settings.interpreters:
            text = (
                f"session {session.name} has {live} interpreters, as many as it may have. "
                "Stop one, or start another session."
            )
            raise Conflict(text, session=session.id)

    async def list_interpreters(self, caller: Caller, ref: str = "") -> list[Interpreter]:
        """Of one session, with those that have ended; without *ref* all live ones that are seen."""
        if not ref:
            return await self._list_seen(caller)
        session = await self._sessions.get(caller, ref)
        async with self._database.read() as tx:
            rows = await store.list_of(tx, session.id)
        return [view(row, session.name, self._hubs.get(row.id)) for row in rows]

    async def _list_seen(self, caller: Caller) -> list[Interpreter]:
        async with self._database.read() as tx:
            rows = await store.list_seen(tx, caller)
            found = [(row, await session_store.find(tx, row.session_id)) for row in rows]
        return [
            view(row, session.name, self._hubs.get(row.id))
            for row, session in found
            if session is not None
        ]

    async def get(self, caller: Caller, ref: str, name: str) -> Interpreter:
        session, row = await self._find(caller, ref, name)
        return view(row, session.name, await self._hub(session, row))

    async def stop(self, caller: Caller, ref: str, name: str) -> Interpreter:
        """End it. Idempotent."""
        session, row = await self._find(caller, ref, name)
        hub = await self._hub(session, row)
        await self._note_feeding(caller, hub)
        async with hub.lock:
            if not hub.over:
                await hub.stop_program()
                hub.end(f"{caller.user} stopped it.")
                await self._keep(hub)
        return hub.view()

    async def restart(self, caller: Caller, ref: str, name: str) -> Interpreter:
        """End its program and start another of the same id; waiting cells are aborted."""
        session, row = await self._find(caller, ref, name)
        if session.status != S.RUNNING:
            raise not_running(session)
        hub = await self._hub(session, row)
        program = row.driver or row.language
        await self._sessions.records.note(caller, session, "exec_started", program=program)
        async with hub.lock:
            if not hub.over:
                await hub.stop_program()
            await self._keep(hub)
            try:
                exec_id, nonce = await self._programs.start(session, hub.row)
            except PlatformError as exc:
                hub.end(f"it could not be started again: {exc.text}")
                raise
            changed = replace(
                hub.row,
                exec_id=exec_id,
                nonce=nonce,
                base=hub.narrator.seq,
                restarts=hub.row.restarts + 1,
                ended_at=None,
                ended="",
            )
            async with self._database.begin() as tx:
                await store.change(tx, row.id, **store.columns_of(changed))
            hub.exchange(changed)
        return hub.view()

    async def interrupt(self, caller: Caller, ref: str, name: str) -> None:
        """SIGINT; if the cell goes on, a STATUS event says so in words."""
        hub = await self._open(caller, ref, name)
        await hub.interrupt()

    # Cells

    async def execute(self, caller: Caller, ref: str, name: str, request: CellRequest) -> Cell:
        """Accept a cell (ACCEPTED is told before this returns); ``follow`` tells what comes."""
        _check_cell(request, self._settings)
        hub = await self._open(caller, ref, name)
        if request.id and (known := await self._known(hub, request)) is not None:
            return _cell(known)
        async with hub.lock:
            hub.check_open()
            if request.id and (same := hub.knows(request.id)) is not None:
                return _cell(same)
            if hub.waiting >= self._settings.waiting:
                text = f"{hub.waiting} cells wait in interpreter {hub.row.name} already."
                raise InterpreterBusy(text, interpreter=hub.row.id)
            request = replace(request, id=request.id or new_id())
            row = hub.accept(new_row(hub.row.id, request, micros(self._clock.now())))
            try:
                async with self._database.begin() as tx:
                    await store.add_cell(tx, row)
                    await self._prune(tx, hub)
            except BaseException:
                hub.refuse(row.id)
                raise
            hub.admit(row.id)
        return _cell(row)

    async def _known(self, hub: Hub, request: CellRequest) -> CellRow | None:
        """The cell of that id, if it came before. Raises Conflict if it was another."""
        row = hub.knows(request.id)
        if row is None:
            await self._keep(hub)
            async with self._database.read() as tx:
                row = await store.find_cell(tx, hub.row.id, request.id)
        if row is not None and row.code != request.code:
            raise Conflict(f"cell {request.id!r} came before with other code.", cell=request.id)
        return row

    async def wait(self, caller: Caller, ref: str, name: str, cell: str, timeout_s: float) -> Cell:
        """A cell with its events, once it has ended or after *timeout_s*."""
        hub = await self._open(caller, ref, name, feeds=False)
        await self._keep(hub)
        async with self._database.read() as tx:
            row = await store.find_cell(tx, hub.row.id, cell)
        if row is None:
            raise NotFound(f"no cell {cell[:64]!r} in interpreter {hub.row.name}.", cell=cell[:64])
        events: list[CellEvent] = []
        if row.status in FINAL or timeout_s <= 0:
            await self._gather(hub, row, events, until=hub.recent.newest)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(timeout_s, MAX_WAIT_S)):
                    await self._gather(hub, row, events, until=None)
        return _with_events(row, hub.row.id, events)

    async def _gather(
        self, hub: Hub, row: CellRow, events: list[CellEvent], *, until: int | None
    ) -> None:
        """The cell's events, up to its end, or those that there are up to number *until*."""
        size = 0
        if until is not None and until < row.seq:
            return
        follower = Follower(hub, self._database, self._kernels)
        async for event in follower.events(row.seq - 1):
            if event.cell == row.id:
                size += size_of(event)
                if size <= MAX_ANSWER or event.kind is EventKind.DONE:
                    events.append(event)
                if event.kind is EventKind.DONE:
                    return
            if until is not None and event.seq >= until:
                return

    async def input(self, caller: Caller, ref: str, name: str, text: str) -> None:
        """Answer the cell that asks. Raises Conflict if none does."""
        hub = await self._open(caller, ref, name)
        if len(text) > self._settings.code_bytes:
            raise InvalidRequest("input: the answer is too long.")
        if not hub.answer(text):
            raise Conflict(f"no cell of interpreter {hub.row.name} asks for input at present.")

    async def complete(
        self, caller: Caller, ref: str, name: str, code: str, cursor: int | None
    ) -> Completions:
        """Raises InterpreterBusy if a cell runs for too long."""
        hub = await self._open(caller, ref, name)
        return await hub.ask("complete", *self._question(code, cursor), Completions)

    async def inspect(
        self, caller: Caller, ref: str, name: str, code: str, cursor: int | None
    ) -> Inspection:
        hub = await self._open(caller, ref, name)
        return await hub.ask("inspect", *self._question(code, cursor), Inspection)

    def _question(self, code: str, cursor: int | None) -> tuple[str, int]:
        if len(code) > self._settings.code_bytes:
            raise InvalidRequest("code: too long.", field="code")
        if cursor is not None and not 0 <= cursor <= len(code):
            raise InvalidRequest("cursor: it lies outside of the code.", field="cursor")
        return code, len(code) if cursor is None else cursor

    async def history(
        self, caller: Caller, ref: str, name: str, *, limit: int = 100, before: int | None = None
    ) -> list[Cell]:
        """The newest cells that were to be kept, oldest of them first, without events.

        *before*: of a cell's ``accepted`` event; those after it are left out.
        """
        session, row = await self._find(caller, ref, name)
        await self._sessions.records.note_reading(caller, session, output=True)
        if (hub := self._hubs.get(row.id)) is not None:
            await self._keep(hub)
        async with self._database.read() as tx:
            found = await store.list_history(
                tx, row.id, before=2**62 if before is None else before, limit=limit
            )
        return [_cell(each) for each in reversed(found)]

    @asynccontextmanager
    async def follow(
        self, caller: Caller, ref: str, name: str, after: int | None = None
    ) -> AsyncIterator[AsyncIterator[CellEvent]]:
        """All events after number *after* (0: all that are kept; None: from now on).

        Ends after the STATUS event of the interpreter's end; a restart does not end it. Counts as
        a client while it is open.
        """
        hub = await self._open(caller, ref, name, feeds=False)
        start = hub.narrator.seq if after is None else after
        hub.clients += 1
        hub.visit()
        try:
            yield Follower(hub, self._database, self._kernels).events(start)
        finally:
            hub.clients -= 1
            hub.visit()

    # Finding

    async def _running(self, caller: Caller, ref: str) -> SessionRow:
        session = await self._sessions.get(caller, ref)
        if session.status != S.RUNNING:
            raise not_running(session)
        return session

    async def _find(self, caller: Caller, ref: str, name: str) -> tuple[SessionRow, InterpreterRow]:
        if not ref:
            return await self._find_by_id(caller, name)
        session = await self._sessions.get(caller, ref)
        async with self._database.read() as tx:
            rows = await store.list_of(tx, session.id)
        found = [row for row in rows if name in {row.id, row.name}]
        if not found:
            text = f"session {session.name} has no interpreter {name[:40]!r}."
            raise NotFound(text, interpreter=name[:40])
        return session, max(found, key=lambda row: (row.ended_at is None, row.id))

    async def _find_by_id(
        self, caller: Caller, interpreter_id: str
    ) -> tuple[SessionRow, InterpreterRow]:
        absent = NotFound(f"no interpreter {interpreter_id[:40]!r}.")
        async with self._database.read() as tx:
            row = await store.find(tx, interpreter_id)
        if row is None:
            raise absent
        try:
            return await self._sessions.get(caller, row.session_id), row
        except NotFound as exc:
            raise absent from exc

    async def _open(self, caller: Caller, ref: str, name: str, *, feeds: bool = True) -> Hub:
        """The interpreter, with all output until now read; who *feeds* it is noted."""
        session, row = await self._find(caller, ref, name)
        hub = await self._hub(session, row)
        if feeds:
            hub.check_open()
            await self._note_feeding(caller, hub)
        else:
            await self._sessions.records.note_reading(caller, session, output=True)
        await hub.caught_up()
        return hub

    async def note_channel(self, caller: Caller, ref: str, name: str) -> None:
        """A client connects that may feed the interpreter."""
        session, row = await self._find(caller, ref, name)
        await self._note_feeding(caller, await self._hub(session, row))

    async def _note_feeding(self, caller: Caller, hub: Hub) -> None:
        now = self._clock.monotonic()
        if now - hub.fed.get(caller.token_id, -NOTED_S) < NOTED_S:
            return
        session = hub.session
        await self._sessions.records.note(caller, session, "attached", owner=session.owner)
        hub.fed[caller.token_id] = now

    async def _hub(self, session: SessionRow, row: InterpreterRow) -> Hub:
        """Made anew after a restart of this server."""
        if (hub := self._hubs.get(row.id)) is not None:
            return hub
        async with self._opening:
            if (hub := self._hubs.get(row.id)) is not None:
                return hub
            async with self._database.read() as tx:
                cells = await store.list_cells(tx, row.id, row.base)
            hub = self._hubs[row.id] = Hub(self._around, session, row, cells)
            hub.follow()
            return hub

    # Upkeep

    async def tend(self) -> None:
        """Take up interpreters that nobody follows, end those whose session has ended."""
        async with self._database.read() as tx:
            unended = await store.list_unended(tx)
        for row, status in unended:
            if status == S.TERMINATED:
                await self._end_with_session(row)
            elif row.id not in self._hubs and status == S.RUNNING:
                async with self._database.read() as tx:
                    session = await session_store.find(tx, row.session_id)
                if session is not None:
                    await self._hub(session, row)
        live = {row.id for row, _ in unended}
        for hub in list(self._hubs.values()):
            hub.look()
            if hub.over and not hub.clients and hub.ended is None and hub.row.id not in live:
                del self._hubs[hub.row.id]

    async def _end_with_session(self, row: InterpreterRow) -> None:
        text = "its session has ended."
        if (hub := self._hubs.get(row.id)) is not None:
            hub.end(text)
            return
        async with self._database.begin() as tx:
            at = micros(self._clock.now())
            await store.change(tx, row.id, ended_at=at, ended=text)

    async def flush(self) -> None:
        """Write down what has become of cells and interpreters."""
        for hub in list(self._hubs.values()):
            await self._keep(hub)

    async def _keep(self, hub: Hub) -> None:
        version = hub.narrator.version
        if not hub.outcomes and hub.ended is None and version == hub.row.version:
            return
        outcomes, hub.outcomes = hub.outcomes, []
        ended = hub.ended
        fields: dict[str, object] = {"version": version}
        if ended is not None:
            fields |= {"ended_at": ended[0], "ended": ended[1]}
        try:
            async with self._database.begin() as tx:
                await store.end_cells(tx, hub.row.id, outcomes)
                row = await store.change(tx, hub.row.id, **fields)
        except BaseException:
            hub.outcomes = outcomes + hub.outcomes
            raise
        if hub.ended is ended:
            hub.ended = None
        if row is not None:
            hub.row = replace(hub.row, version=row.version, ended_at=row.ended_at, ended=row.ended)

    async def _prune(self, tx: Transaction, hub: Hub) -> None:
        hub.accepted += 1
        if hub.accepted % _PRUNE_EVERY == 0:
            kept = self._settings
            await store.prune(tx, hub.row.id, count=kept.history, size=kept.history_bytes)

    def release(self) -> None:
        """Tell all followers that the server stops."""
        for hub in self._hubs.values():
            hub.close()

    async def close(self) -> None:
        """Interpreters go on."""
        self.release()
        await self._tasks.close()
        await self.flush()


def _check(request: InterpreterRequest) -> None:
    if request.name and _NAME.fullmatch(request.name) is None:
        text = "name: 1 to 40 letters, digits, dots, dashes; the first a letter or digit."
        raise InvalidRequest(text, field="name")
    for name, value in request.env.items():
        if _VARIABLE.fullmatch(name) is None or "\0" in value:
            raise InvalidRequest(f"env: {name[:40]!r} is no variable.", field="env")
    if "\0" in request.cwd or len(request.cwd) > 4096:
        raise InvalidRequest("cwd: no path.", field="cwd")


def _check_cell(request: CellRequest, settings: CellSettings) -> None:
    if len(request.code.encode()) > settings.code_bytes:
        text = f"code: more than {settings.code_bytes} bytes. Put it into a file of the session."
        raise InvalidRequest(text, field="code")
    if "\0" in request.code:
        raise InvalidRequest("code: it holds a NUL character.", field="code")
    if request.id and _CELL_ID.fullmatch(request.id) is None:
        text = "id: 1 to 64 letters, digits, and of _.:-"
        raise InvalidRequest(text, field="id")


def _free_name(request: InterpreterRequest, language: str, known: list[InterpreterRow]) -> str:
    taken = {row.name for row in known if row.ended_at is None}
    if request.name:
        if request.name in taken:
            text = f"the session has an interpreter {request.name!r}; choose another name."
            raise Conflict(text, name=request.name)
        return request.name
    base = request.driver or language
    numbered = (f"{base}-{number}" for number in range(2, len(taken) + 3))
    return next(name for name in (base, *numbered) if name not in taken)


def _surplus(known: list[InterpreterRow], keep: int) -> list[InterpreterRow]:
    """Of those that have ended, all but the newest."""
    ended = [row for row in known if row.ended_at is not None]
    return ended[: max(0, len(ended) - keep)]


def _cell(row: CellRow) -> Cell:
    return Cell(
        id=row.id,
        interpreter=row.interpreter_id,
        code=row.code,
        status=CellStatus(row.status),
        count=row.number,
        error=from_json(CellError, row.error) if row.error else None,
        accepted_at=row.at / 1e6,
        took_s=None if row.took_us is None else row.took_us / 1e6,
        cpu_s=None if row.cpu_us is None else row.cpu_us / 1e6,
        mem_bytes=row.mem_bytes,
    )


def _with_events(row: CellRow, interpreter_id: str, events: list[CellEvent]) -> Cell:
    """As its events tell it, which may know more than the row."""
    cell = replace(_cell(row), events=tuple(events))
    for event in events:
        if event.kind is EventKind.RUNNING and cell.status is CellStatus.WAITING:
            cell = replace(cell, status=CellStatus.RUNNING, count=event.count)
        elif event.kind is EventKind.ERROR:
            cell = replace(cell, error=event.error)
        elif event.kind is EventKind.DONE and event.status is not None:
            cell = replace(
                cell,
                status=event.status,
                took_s=event.took_s,
                cpu_s=event.cpu_s,
                mem_bytes=event.mem_bytes,
            )
    return cell
