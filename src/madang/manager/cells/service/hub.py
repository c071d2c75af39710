"""One interpreter, while the server lives: its program's output and input, and what waits.

Output is read from the program's log by offset, so a break of the link or of this server loses
nothing. Input goes through one task, in order; cells one at a time, the next once one has ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from madang.kit.clock import Clock
from madang.kit.ids import new_id
from madang.kit.tasks import TaskSet
from madang.manager.cells.rules.memory import Recent
from madang.manager.cells.rules.narration import Narrator, Outcome
from madang.manager.cells.types import CellRow, CellSettings, InterpreterRow
from madang.manager.db import micros
from madang.manager.session.service.kernels import KernelService
from madang.manager.session.types import SessionRow
from madang.wire.cells import (
    CellEvent,
    Completions,
    EventKind,
    Inspection,
    Interpreter,
    InterpreterStatus,
)
from madang.wire.errors import (
    InterpreterBusy,
    InterpreterEnded,
    LogGone,
    NodeUnavailable,
    NotFound,
    PlatformError,
    SessionNotRunning,
    Shutdown,
)
from madang.wire.link import Attach, BulkStream, ReadLog, SendSignal
from madang.wire.log import LogGap, LogRecord
from madang.wire.session import Ended

S = InterpreterStatus
A = TypeVar("A", Completions, Inspection)

REOPEN_S: Final = 0.5
FENCE_S: Final = 1.0
"""A cell that says it is done is taken at its word after so long without its last stderr."""
QUIET_S: Final = 30.0
"""Without clients, input is let go of so long after the last of it: nobody visits the session."""
_CHUNK: Final = 64 * 1024
_MAX_ASKED: Final = 50


@dataclass(frozen=True, slots=True)
class Around:
    """What all interpreters share."""

    kernels: KernelService
    clock: Clock
    tasks: TaskSet
    settings: CellSettings
    news: Callable[[], None]
    """To be called when there is something to write down."""


class Hub:
    """*rows*: cells of the present program that were accepted before this server's start."""

    def __init__(
        self, around: Around, session: SessionRow, row: InterpreterRow, rows: Iterable[CellRow] = ()
    ) -> None:
        self.session: Final = session
        self.row = row
        self.recent: Final = Recent(around.settings)
        self.narrator = Narrator(row.nonce, row.base, rows)
        self.clients = 0
        self.outcomes: list[Outcome] = []
        """Of cells, not written down yet."""
        self.ended: tuple[int, str] | None = None
        """When and why, not written down yet."""
        self.lock: Final = asyncio.Lock()
        """Held while its program is exchanged."""
        self.bell = asyncio.Event()
        """Set, and replaced, whenever there are new events."""
        self.closing = False
        self.fed: dict[str, float] = {}
        """Token → when it was noted that it feeds the interpreter."""
        self.accepted = 0
        self._around: Final = around
        self._offset = 0
        self._caught_up = asyncio.Event()
        self._program_over = asyncio.Event()
        self._exchanging = False
        self._ready: set[str] = {each.id for each in self.narrator.known()}
        """Cells that are written down: they may run."""
        self._sent = ""
        """The cell given to the driver, until it begins."""
        self._outbox: deque[bytes] = deque()
        self._to_send = asyncio.Event()
        self._asked: dict[str, asyncio.Future[Completions | Inspection]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._done_since: float | None = None
        self.recent.gone = row.base

    # Its life

    def follow(self, *, fresh: bool = False) -> None:
        """Read and write in the background. *fresh*: the program has just been started."""
        spawn = self._around.tasks.spawn
        if fresh:
            self._caught_up.set()
            self._tell(self.narrator.remark("", self._now()))
        self._reader = spawn(self._read(), f"cells:{self.row.id}:output")
        self._writer = spawn(self._write(), f"cells:{self.row.id}:input")

    async def caught_up(self) -> None:
        """Returns once all output until now was read. Raises NodeUnavailable."""
        if not await self._around.clock.wait(self._caught_up, self._around.settings.busy_s):
            text = f"the machine of interpreter {self.row.name} does not answer at present."
            raise NodeUnavailable(text)

    @property
    def over(self) -> bool:
        return self.narrator.status is S.ENDED

    def check_open(self) -> None:
        """Raises InterpreterEnded."""
        if self.over:
            why = self.row.ended or (self.ended or (0, ""))[1]
            text = f"interpreter {self.row.name} has ended: {why}"
            raise InterpreterEnded(text, interpreter=self.row.id)

    def end(self, text: str) -> None:
        """Its program is over and none follows. Idempotent."""
        if self.over:
            return
        at = self._now()
        self.ended = (micros(at), text)
        self._tell(self.narrator.end(at, text))
        self._let_go(InterpreterEnded(f"interpreter {self.row.name} has ended: {text}"))

    def close(self) -> None:
        """The server stops; the interpreter goes on."""
        self.closing = True
        self._ring()

    def exchange(self, row: InterpreterRow) -> None:
        """Another program has been started in place of the one that ended."""
        for task in (self._reader, self._writer):
            if task is not None:
                task.cancel()
        self.row, self.ended = row, None
        self.narrator = Narrator(row.nonce, row.base)
        self._offset, self._sent, self._exchanging = 0, "", False
        self._ready.clear()
        self._program_over = asyncio.Event()
        self.follow(fresh=True)

    async def stop_program(self) -> None:
        """Ask its program to end, then end it; returns once it has ended, or soon after."""
        self._exchanging = True
        clock, patience = self._around.clock, self._around.settings.stop_s
        if self.narrator.status is S.IDLE and not self._sent:
            self._push(b"quit - 0\n")
            await clock.wait(self._program_over, patience / 2)
        for number, wait_s in ((15, patience), (9, 2 * patience)):
            if not self._program_over.is_set():
                await self.signal(number)
                await clock.wait(self._program_over, wait_s)
        self._tell(self.narrator.end(self._now(), None))
        self._let_go(InterpreterBusy(f"interpreter {self.row.name} was restarted."))

    async def signal(self, number: int) -> None:
        """To its program's process group; nothing if it has ended."""
        request = SendSignal(kernel=self.session.kernel, exec_id=self.row.exec_id, signal=number)
        try:
            async with self._around.kernels.open(self.session, request) as stream:
                async for _ in stream:
                    pass
        except (SessionNotRunning, LogGone, NotFound):
            pass

    # Cells

    @property
    def waiting(self) -> int:
        return len(self.narrator.waiting)

    def knows(self, cell: str) -> CellRow | None:
        """A cell that waits or runs."""
        return next((row for row in self.narrator.known() if row.id == cell), None)

    def accept(self, row: CellRow) -> CellRow:
        """Tell of a new cell; it runs after ``admit``."""
        row, events = self.narrator.accept(row)
        self._tell(events)
        return row

    def admit(self, cell: str) -> None:
        """The cell is written down."""
        self._ready.add(cell)
        self._next()

    def refuse(self, cell: str) -> None:
        """The cell could not be written down."""
        self._tell(self.narrator.refuse(cell, self._now()))

    def answer(self, text: str) -> bool:
        """Whether a cell asks."""
        running = self.narrator.running
        if not self.narrator.asking or running is None:
            return False
        self._push(_op("input", running.row.id, text.encode()))
        self._tell(self.narrator.answered(self._now()))
        return True

    async def ask(self, op: str, code: str, cursor: int, kind: type[A]) -> A:
        """Completions or an inspection, once no cell runs. Raises InterpreterBusy."""
        if len(self._asked) >= _MAX_ASKED:
            raise InterpreterBusy(f"interpreter {self.row.name} has too many questions to answer.")
        question = new_id()
        answer = asyncio.get_running_loop().create_future()
        self._asked[question] = answer
        try:
            async with asyncio.timeout(self._around.settings.busy_s):
                while self.narrator.status is not S.IDLE or self._sent:
                    self.check_open()
                    await self.bell.wait()
                self._push(_op(op, question, f"{cursor}\n{code}".encode()))
                value = await answer
        except TimeoutError as exc:
            text = f"interpreter {self.row.name} runs a cell; ask again once it has ended."
            raise InterpreterBusy(text, interpreter=self.row.id) from exc
        finally:
            self._asked.pop(question, None)
        if not isinstance(value, kind):
            raise InterpreterBusy(f"interpreter {self.row.name} gave an answer of another kind.")
        return value

    async def interrupt(self) -> None:
        """SIGINT to what runs; nothing if nothing does."""
        running = self.narrator.running
        if running is None and not self._sent:
            return
        cell = running.row.id if running is not None else self._sent
        await self.signal(2)
        name = f"cells:{self.row.id}:interrupt"
        self._around.tasks.spawn(self._see_obeyed(cell), name)

    async def _see_obeyed(self, cell: str) -> None:
        await self._around.clock.sleep(self._around.settings.obey_s)
        running = self.narrator.running
        if running is not None and running.row.id == cell:
            text = "the cell goes on in spite of the interrupt; a restart would end it."
            self._tell(self.narrator.remark(text, self._now()))

    def _next(self) -> None:
        """Give the driver the next cell, if it has none."""
        narrator = self.narrator
        if narrator.status is not S.IDLE or self._sent or not narrator.waiting:
            return
        if (row := narrator.waiting[0]).id in self._ready:
            self._sent = row.id
            self._push(_op("run", row.id, row.code.encode()))

    # Output

    async def _read(self) -> None:
        follow = self._caught_up.is_set()
        while not self.over:
            try:
                ended = await self._read_once(follow=follow)
            except (NodeUnavailable, ConnectionError):
                await self._around.clock.sleep(REOPEN_S)
                follow = False
                continue
            except (LogGone, NotFound, SessionNotRunning) as exc:
                self._over(f"its output is gone: {exc.text}")
                return
            if ended is not None:
                self._over(_why(ended, self.narrator.last_words))
                return
            if not follow:
                self._come_back()
            follow = True

    async def _read_once(self, *, follow: bool) -> Ended | None:
        request = ReadLog(
            kernel=self.session.kernel,
            exec_id=self.row.exec_id,
            offset=self._offset,
            follow=follow,
            visit=False,
        )
        async with self._around.kernels.open(self.session, request) as stream:
            async for item in stream:
                if isinstance(item, LogRecord):
                    self._offset = item.end
                    self._tell(self.narrator.record(item))
                elif isinstance(item, LogGap):
                    self._offset = item.end
                    self._tell(self.narrator.gap(item))
                elif isinstance(item, Ended):
                    return item
        return None

    def _come_back(self) -> None:
        """All output until now was read: what the driver has not begun, it did not get."""
        self._tell(self.narrator.caught_up())
        self._caught_up.set()
        if self._sent:
            kept = [each for each in self._outbox if not each.startswith(b"run ")]
            self._outbox = deque(kept)
            self._sent = ""
        if self.row.ended_at is not None:
            self._tell(self.narrator.end(self.row.ended_at / 1e6, self.row.ended))
        self._next()

    def _over(self, text: str) -> None:
        self._caught_up.set()
        self._program_over.set()
        if self.row.ended_at is not None:
            self._tell(self.narrator.end(self.row.ended_at / 1e6, self.row.ended))
        elif not self._exchanging:
            self.end(text)

    def _tell(self, events: list[CellEvent]) -> None:
        self.recent.add(events)
        narrator = self.narrator
        if narrator.replies:
            for reply in narrator.replies:
                answer = self._asked.get(reply.id)
                if answer is not None and not answer.done():
                    answer.set_result(reply.value)
            narrator.replies.clear()
        if narrator.outcomes:
            self.outcomes += narrator.outcomes
            self._ready.difference_update(each.cell for each in narrator.outcomes)
            narrator.outcomes.clear()
            self._around.news()
        for event in events:
            if event.kind is EventKind.RUNNING and event.cell == self._sent:
                self._sent = ""
            elif event.kind is EventKind.INPUT:
                self._check_stdin()
        if events:
            if self._caught_up.is_set():
                self._next()
            self._ring()

    def _check_stdin(self) -> None:
        running = self.narrator.running
        if running is not None and not running.row.stdin and self._caught_up.is_set():
            self._push(_op("eof", running.row.id, b""))
            self.narrator.asking = False

    def look(self) -> None:
        """Now and then: a cell that said it is done is taken at its word in the end."""
        running = self.narrator.running
        if running is None or running.done is None:
            self._done_since = None
        elif self._done_since is None:
            self._done_since = self._around.clock.monotonic()
        elif self._around.clock.monotonic() - self._done_since > FENCE_S:
            self._tell(self.narrator.finish_running(self._now()))

    def _ring(self) -> None:
        bell, self.bell = self.bell, asyncio.Event()
        bell.set()

    # Input

    def _push(self, data: bytes) -> None:
        self._outbox.append(data)
        self._to_send.set()

    def visit(self) -> None:
        """A client has come or gone."""
        self._to_send.set()

    async def _write(self) -> None:
        while not self.over:
            while not self._outbox and not self.clients:
                self._to_send.clear()
                await self._to_send.wait()
            request = Attach(kernel=self.session.kernel, exec_id=self.row.exec_id)
            try:
                async with self._around.kernels.open(self.session, request) as stream:
                    await self._write_to(stream)
            except (ConnectionError, PlatformError):  # if its program has ended, its output tells
                await self._around.clock.sleep(REOPEN_S)

    async def _write_to(self, stream: BulkStream) -> None:
        """Until nobody has been there for a while."""
        while True:
            while self._outbox:
                data = self._outbox[0]
                for start in range(0, len(data), _CHUNK):
                    await stream.send(data[start : start + _CHUNK])
                if self._outbox and self._outbox[0] is data:
                    self._outbox.popleft()
            self._to_send.clear()
            if self.clients:
                await self._to_send.wait()
            elif not await self._around.clock.wait(self._to_send, QUIET_S):
                return

    def _let_go(self, error: PlatformError) -> None:
        self._outbox.clear()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(error)
        if self.over:
            self._around.news()
            for task in (self._reader, self._writer):
                if task is not None and task is not asyncio.current_task():
                    task.cancel()

    # As the API shows it

    def view(self) -> Interpreter:
        return view(self.row, self.session.name, self)

    def check_closing(self) -> None:
        """Raises Shutdown."""
        if self.closing:
            raise Shutdown("the server is stopping; the interpreter goes on.")

    def _now(self) -> float:
        return self._around.clock.now()


def view(row: InterpreterRow, session: str, hub: Hub | None) -> Interpreter:
    """*session*: its name."""
    if hub is None:
        status = S.STARTING if row.ended_at is None else S.ENDED
    else:
        status = hub.narrator.status
    return Interpreter(
        id=row.id,
        session=session,
        session_id=row.session_id,
        name=row.name,
        language=row.language,
        driver=row.driver,
        version=hub.narrator.version or row.version if hub is not None else row.version,
        status=status,
        started_at=row.started_at / 1e6,
        restarts=row.restarts,
        executed=0 if hub is None else hub.narrator.executed,
        clients=0 if hub is None else hub.clients,
        events=row.base if hub is None else hub.narrator.seq,
        ended=row.ended or (hub.ended[1] if hub is not None and hub.ended is not None else ""),
    )


def _op(name: str, id_: str, payload: bytes) -> bytes:
    return f"{name} {id_} {len(payload)}\n".encode() + payload


def _why(ended: Ended, last_words: str) -> str:
    """Why a program is over, in words."""
    if ended.exit_code == 0:
        return "its program ended by itself."
    text = ended.text or f"its program ended with code {ended.exit_code}."
    words = last_words.strip().splitlines()
    return f"{text} It said: {words[-1][:300]}" if words else text
