"""One client's channels WebSocket: its requests go to the interpreter, events come back.

Three kinds of work go on at once: *events* translates what happens in the interpreter, *cells*
passes on what is to be run in the order in which it came, and each other request is answered by a
task of its own, so that an interrupt overtakes a completion that waits for the running cell.

A client that comes back with its old session id goes on where it left. One that this server does
not know begins with what happens from now on; in a server's first minutes it may have been a client
of the one before, see ``rules.catching_up``. The same event makes messages of the same ids, so that
whoever wants to can tell what came twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import madang
from madang.kit.ids import new_nonce
from madang.manager.db import seconds
from madang.manager.http import Caller
from madang.manager.jupyter.rules import specs
from madang.manager.jupyter.rules.catching_up import CatchingUp
from madang.manager.jupyter.rules.frames import Message
from madang.manager.jupyter.rules.ids import kernel_id
from madang.manager.jupyter.rules.messages import (
    VERSION,
    Parent,
    Translator,
    Writer,
    cell_id,
    state_of,
)
from madang.manager.jupyter.service.kernels import Kernels, Memory
from madang.manager.jupyter.types import INTERPRETER
from madang.manager.session.types import SessionRow
from madang.wire.cells import CellEvent, CellRequest, EventKind, Interpreter, InterpreterStatus
from madang.wire.errors import InvalidRequest, PlatformError, Shutdown

Send = Callable[[Message], Awaitable[None]]
Answer = Callable[["Connection", Message], Awaitable[dict[str, Any]]]

MAX_WAITING: Final = 200
"""Requests of a client that are not answered yet; one more is refused."""
MAX_HELD: Final = 16 << 20
"""Bytes of them; a single larger one is taken."""
MAX_CLIENTS: Final = 200
"""Session ids of clients that are remembered for each kernel."""
MAX_REVIVALS: Final = 5
"""Ends of the interpreter by itself in a row, without an event between, until it counts as dead."""
YOUNG_S: Final = 300.0
OVERLAP_S: Final = 60.0
"""Before a server's beginning the one before it may have told nothing."""
HISTORY: Final = 1000
READY_S: Final = 30.0
"""How long an answer waits for an interpreter that starts."""


class Connection:
    """Made for an accepted WebSocket; ``run`` until the client goes."""

    def __init__(
        self, kernels: Kernels, caller: Caller, row: SessionRow, client: str, send: Send
    ) -> None:
        self._kernels: Final = kernels
        self._cells: Final = kernels.cells
        self._caller: Final = caller
        self._row: Final = row
        self._client: Final = client
        self._send_now: Final = send
        self._memory: Final[Memory] = kernels.memory(row.id)
        self._writer: Final = Writer(row.id, new_nonce())
        self._translator: Final = Translator(self._writer, self._memory.parents, client)
        self._waiting: Final[asyncio.Queue[Message]] = asyncio.Queue(MAX_WAITING)
        self._answering: Final[set[asyncio.Task[None]]] = set()
        self._held = 0
        """Bytes of requests that are not answered yet."""
        self._sending: Final = asyncio.Lock()
        self._up: Final = asyncio.Event()
        """The interpreter has said that it is ready, or has ended."""
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, receive: Callable[[], Awaitable[Message | None]]) -> None:
        """*receive* gives None at the end of the client."""
        self._memory.clients += 1
        self._memory.left_at = None
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                background = [
                    tasks.create_task(self._events()),
                    tasks.create_task(self._run_cells()),
                ]
                while (message := await receive()) is not None:
                    await self._take(message)
                for task in (*background, *self._answering):
                    task.cancel()
        finally:
            self._memory.clients -= 1
            self._memory.left_at = self._kernels.clock.monotonic()

    async def send(self, *messages: Message) -> None:
        """All of them in a row: what belongs together stays together."""
        async with self._sending:
            for message in messages:
                await self._send_now(message)

    # What comes from the interpreter

    async def _events(self) -> None:
        await self._tell("starting")
        revivals = 0
        try:
            await self._kernels.interpreter(self._caller, self._row.id)
            while revivals <= MAX_REVIVALS:
                revivals = 0 if await self._follow() else revivals + 1
                await self._tell("restarting")
                await self._kernels.revive(self._caller, self._row.id)
        except Shutdown:
            self._up.set()
            return  # the kernel goes on; the client comes back
        except PlatformError:
            self._up.set()  # each request that waits for it is told why
        await self._tell("dead")

    async def _follow(self) -> bool:
        """Until the interpreter ends; whether a cell ended well in between."""
        after, catching_up = self._where()
        useful = False
        following = self._cells.follow(self._caller, self._row.id, INTERPRETER, after)
        async with following as events:
            found = await self._cells.get(self._caller, self._row.id, INTERPRETER)
            if found.status is not InterpreterStatus.STARTING:
                self._up.set()
            await self._tell(state_of(found.status))
            async for event in events:
                if event.name in {InterpreterStatus.IDLE, InterpreterStatus.ENDED}:
                    self._up.set()
                useful = useful or event.kind is EventKind.DONE
                for each in catching_up.take(event):
                    if each.name != InterpreterStatus.ENDED:
                        await self.send(*self._translator.messages(each))
                self._note(event, told=not catching_up.holds)
        return useful

    def _where(self) -> tuple[int | None, CatchingUp]:
        """After which event this client is told, and what of it."""
        seen = self._memory.seen.get(self._client)
        if self._client and seen is not None:
            return seen, CatchingUp(0.0, 0.0)
        older = seconds(self._row.created_at) < self._kernels.began_at
        young = older and self._kernels.age_s() < YOUNG_S
        if young:
            return 0, CatchingUp(self._kernels.began_at, OVERLAP_S)
        return None, CatchingUp(0.0, 0.0)

    def _note(self, event: CellEvent, *, told: bool) -> None:
        self._memory.active_at = event.at
        if self._client and told:
            self._memory.seen[self._client] = event.seq
            self._memory.seen.move_to_end(self._client)
            while len(self._memory.seen) > MAX_CLIENTS:
                self._memory.seen.popitem(last=False)

    async def _tell(self, state: str) -> None:
        await self.send(self._writer.status(state, {}, at=self._now()))

    def _now(self) -> float:
        return self._kernels.clock.now()

    # What comes from the client

    async def _take(self, message: Message) -> None:
        assert self._tasks is not None
        runs = message.kind == "execute_request" and message.channel == "shell"
        waiting = self._waiting.qsize() if runs else len(self._answering)
        if waiting >= MAX_WAITING or (self._held and self._held + message.size > MAX_HELD):
            await self._fail(message, InvalidRequest("too many requests of yours wait already."))
            return
        self._held += message.size
        if runs:
            self._waiting.put_nowait(message)
        else:
            task = self._tasks.create_task(self._serve(message))
            self._answering.add(task)
            task.add_done_callback(lambda done: self._answered(done, message))

    def _answered(self, task: asyncio.Task[None], message: Message) -> None:
        self._answering.discard(task)
        self._held -= message.size

    async def _run_cells(self) -> None:
        """Hand over cells, one after the other; the interpreter has a queue of its own."""
        while True:
            message = await self._waiting.get()
            try:
                await self._execute(message)
            except PlatformError as exc:
                await self._fail(message, exc)
            finally:
                self._held -= message.size

    async def _execute(self, message: Message) -> None:
        content = message.content
        code = content.get("code")
        if not isinstance(code, str):
            raise InvalidRequest("execute_request: code is no text.")
        cell = cell_id(message.id)
        self._memory.parents.add(cell, Parent(message.header, self._client))
        await self._kernels.interpreter(self._caller, self._row.id)
        request = CellRequest(
            code=code,
            id=cell,
            silent=bool(content.get("silent", False)),
            store=bool(content.get("store_history", True)),
            stdin=bool(content.get("allow_stdin", True)),
            stop_on_error=bool(content.get("stop_on_error", True)),
        )
        await self._cells.execute(self._caller, self._row.id, INTERPRETER, request)

    async def _serve(self, message: Message) -> None:
        """Answer one request, between busy and idle."""
        answer = _ANSWERS.get(message.kind)
        if message.channel == "stdin":
            await self._answer_input(message)
        elif answer is None:
            await self._no_answer(message)
        else:
            await self._reply(message, answer)

    async def _reply(self, message: Message, answer: Answer) -> None:
        parent = message.header
        await self.send(self._writer.status("busy", parent, at=self._now()))
        try:
            content = {"status": "ok", **await answer(self, message)}
        except PlatformError as exc:
            content = _problem(exc)
        kind = message.kind.replace("_request", "_reply")
        reply = self._writer.make(message.channel, kind, parent, content, at=self._now())
        await self.send(reply, *self._idle(parent))

    def _idle(self, parent: Mapping[str, Any]) -> list[Message]:
        """The request is done; the kernel itself may still be busy with a cell."""
        told = [self._writer.status("idle", parent, at=self._now())]
        if cell := self._translator.running:
            header = self._memory.parents.of(cell).header
            told.append(self._writer.status("busy", header, at=self._now()))
        return told

    async def _no_answer(self, message: Message) -> None:
        """Kernels without widgets close what is opened, and ignore what they don't know."""
        if message.kind == "comm_open":
            content = {"comm_id": message.content.get("comm_id", ""), "data": {}}
            make = self._writer.make
            await self.send(
                make("iopub", "comm_close", message.header, content, at=self._now()),
                *self._idle(message.header),
            )
        elif message.kind.endswith("_request"):
            await self._fail(message, InvalidRequest(f"{message.kind[:60]} is not known here."))

    async def _fail(self, message: Message, error: PlatformError) -> None:
        """A cell shows it as its error; another request gets it as its answer."""
        parent, content = message.header, _problem(error)
        make, at = self._writer.make, self._now()
        told = [self._writer.status("busy", parent, at=at)]
        if message.kind == "execute_request":
            shown = {key: content[key] for key in ("ename", "evalue", "traceback")}
            told.append(make("iopub", "error", parent, shown, at=at))
            content |= {"execution_count": 0}
        kind = message.kind.replace("_request", "_reply")
        told.append(make(message.channel, kind, parent, content, at=at))
        await self.send(*told, *self._idle(parent))

    async def _answer_input(self, message: Message) -> None:
        value = message.content.get("value")
        if message.kind != "input_reply" or not isinstance(value, str):
            return
        try:
            await self._cells.input(self._caller, self._row.id, INTERPRETER, value)
        except PlatformError:
            return  # answered by somebody else, or the cell has ended

    # Answers

    async def _ready(self) -> Interpreter:
        await self._kernels.interpreter(self._caller, self._row.id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_S):
                await self._up.wait()
        return await self._cells.get(self._caller, self._row.id, INTERPRETER)

    async def kernel_info(self, _message: Message) -> dict[str, Any]:
        interpreter = await self._ready()
        language = self._kernels.language(self._row)
        version = interpreter.version or "0"
        return {
            "protocol_version": VERSION,
            "implementation": "madang",
            "implementation_version": madang.__version__,
            "language_info": specs.language_info(language, version),
            "banner": f"{language.title} {interpreter.version} in session {self._row.name}",
            "debugger": False,
            "help_links": [],
            "supported_features": [],
        }

    async def complete(self, message: Message) -> dict[str, Any]:
        code, cursor = _code(message)
        await self._ready()
        found = await self._cells.complete(self._caller, self._row.id, INTERPRETER, code, cursor)
        return {
            "matches": list(found.matches),
            "cursor_start": found.start,
            "cursor_end": found.end,
            "metadata": {},
        }

    async def inspect(self, message: Message) -> dict[str, Any]:
        code, cursor = _code(message)
        await self._ready()
        found = await self._cells.inspect(self._caller, self._row.id, INTERPRETER, code, cursor)
        return {"found": found.found, "data": found.data, "metadata": {}}

    async def history(self, message: Message) -> dict[str, Any]:
        """The newest, whatever part of it was asked for; outputs are not kept with it."""
        asked = message.content.get("n")
        limit = asked if isinstance(asked, int) and 0 < asked <= HISTORY else HISTORY
        await self._ready()
        cells = await self._cells.history(self._caller, self._row.id, INTERPRETER, limit=limit)
        with_output = bool(message.content.get("output"))
        return {
            "history": [
                [0, cell.count or 0, [cell.code, None] if with_output else cell.code]
                for cell in cells
            ]
        }

    async def is_complete(self, _message: Message) -> dict[str, Any]:
        return {"status": "unknown"}

    async def comm_info(self, _message: Message) -> dict[str, Any]:
        return {"comms": {}}

    async def interrupt(self, _message: Message) -> dict[str, Any]:
        await self._cells.interrupt(self._caller, self._row.id, INTERPRETER)
        return {}

    async def shutdown(self, message: Message) -> dict[str, Any]:
        """The session ends; for a restart only the interpreter does."""
        restart = bool(message.content.get("restart", False))
        kernel = kernel_id(self._row.id)
        if restart:
            await self._kernels.restart(self._caller, kernel)
        else:
            await self._kernels.stop(self._caller, kernel)
        return {"restart": restart}


_ANSWERS: Final[Mapping[str, Answer]] = {
    "kernel_info_request": Connection.kernel_info,
    "complete_request": Connection.complete,
    "inspect_request": Connection.inspect,
    "history_request": Connection.history,
    "is_complete_request": Connection.is_complete,
    "comm_info_request": Connection.comm_info,
    "interrupt_request": Connection.interrupt,
    "shutdown_request": Connection.shutdown,
}


def _code(message: Message) -> tuple[str, int | None]:
    """Code and cursor of a request. Raises InvalidRequest."""
    code, cursor = message.content.get("code"), message.content.get("cursor_pos")
    if not isinstance(code, str) or not (cursor is None or isinstance(cursor, int)):
        raise InvalidRequest(f"{message.kind}: code must be text, cursor_pos a number.")
    return code, cursor if cursor is not None and 0 <= cursor <= len(code) else None


def _problem(error: PlatformError) -> dict[str, Any]:
    text = f"{error.text} ({error.code})"
    name = type(error).__name__
    return {"status": "error", "ename": name, "evalue": text, "traceback": [f"{name}: {text}"]}
