"""What a driver's output tells, as numbered events.

The number of an event comes from the place in the output at which it became known. So whoever reads
the same output with the same cells tells the same story with the same numbers: a server after its
restart, and a reader who is so far behind that memory holds no more what they lack. What is not in
the output (a cell was accepted, its answer given) takes the next free number.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from madang.manager.cells.rules.bundles import Bundle
from madang.manager.cells.rules.frames import MAX_PAYLOAD, Frame, Frames
from madang.manager.cells.types import CellRow
from madang.wire.cells import (
    CellError,
    CellEvent,
    CellRequest,
    CellStatus,
    Completions,
    EventKind,
    Inspection,
    InterpreterStatus,
)
from madang.wire.log import HEADER, LogGap, LogRecord, Stream

K = EventKind
S = InterpreterStatus
ROOM: Final = 1 << 10
"""Numbers between one byte of output and the next."""
_MAX_TEXT: Final = 20_000
_MAX_LINES: Final = 200
_MAX_MATCHES: Final = 1000


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a question about code."""

    id: str
    value: Completions | Inspection


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is kept of a cell that has ended."""

    cell: str
    status: CellStatus
    number: int | None = None
    took_us: int | None = None
    cpu_us: int | None = None
    mem_bytes: int | None = None
    error: CellError | None = None


@dataclass(slots=True)
class _Running:
    row: CellRow
    number: int | None
    error: CellError | None = None
    done: Frame | None = None


class Narrator:
    """Reads the output of one program of an interpreter.

    *rows*: cells accepted before, oldest first; each is told where its number says.
    """

    def __init__(self, nonce: str, base: int, rows: Iterable[CellRow] = ()) -> None:
        self._base: Final = base
        self.seq = base
        """Number of the newest event."""
        self.status = S.STARTING
        self.version = ""
        self.executed = 0
        self.running: _Running | None = None
        self.asking = False
        self.waiting: deque[CellRow] = deque()
        """Accepted, not begun; oldest first."""
        self.replies: list[Reply] = []
        """For whoever takes them away."""
        self.outcomes: list[Outcome] = []
        self.last_words = ""
        """End of what came on stderr outside of cells."""
        self._rows: Final = deque(rows)
        self._frames: Final = {stream: Frames(nonce) for stream in (Stream.STDOUT, Stream.STDERR)}
        self._decoders: Final = {
            stream: codecs.getincrementaldecoder("utf-8")("replace")
            for stream in (Stream.STDOUT, Stream.STDERR)
        }
        self._fenced = ""
        """The newest cell whose stderr is complete."""
        self._bundle = Bundle()
        self._begun = bytearray()
        """Payload of ``more`` frames, which belongs to the next."""
        self._lost = 0
        self._told: list[CellEvent] = []
        self._at = 0.0

    def known(self) -> list[CellRow]:
        """Cells that have not ended, also those that are not told of yet."""
        running = [] if self.running is None else [self.running.row]
        return [*running, *self.waiting, *self._rows]

    # What is read

    def record(self, record: LogRecord) -> list[CellEvent]:
        """What *record* tells; records come in order."""
        self._at = record.at_us / 1e6
        stream = Stream.STDERR if record.stream is Stream.STDERR else Stream.STDOUT
        place = record.offset + HEADER.size
        for index, item in self._frames[stream].feed(record.data):
            self._reach(place + index)
            if not isinstance(item, Frame):
                self._text(stream, item)
            elif stream is Stream.STDERR:
                self._fence(item)
            else:
                self._frame(item)
        return self._take()

    def gap(self, gap: LogGap) -> list[CellEvent]:
        """Output is no longer kept: whatever was in the middle has an end that nobody knows."""
        for stream in self._frames:
            self._frames[stream].forget()
            self._decoders[stream].reset()
        self._bundle = Bundle()
        self._begun.clear()
        self._lost = 0
        self._reach(gap.end)
        self._tell(K.GAP)
        if self.status is S.STARTING:
            self._become(S.IDLE)
        return self._take()

    def caught_up(self) -> list[CellEvent]:
        """All output until now was read: tell the cells that were accepted after it."""
        while self._rows:
            self._accept(self._rows.popleft())
        return self._take()

    # What is done

    def accept(self, row: CellRow) -> tuple[CellRow, list[CellEvent]]:
        """Tell of a new cell; returns it with its number."""
        row = replace(row, seq=self.seq + 1)
        self._accept(row)
        return row, self._take()

    def answered(self, at: float) -> list[CellEvent]:
        self._at, self.asking = at, False
        self._tell(K.ANSWERED, cell=self._cell)
        return self._take()

    def refuse(self, cell: str, at: float) -> list[CellEvent]:
        """A cell that waits can't be run after all."""
        self._at = at
        self._abort(lambda row: row.id == cell)
        return self._take()

    def remark(self, text: str, at: float) -> list[CellEvent]:
        """Something to know about the status as it is."""
        self._at = at
        self._tell(K.STATUS, name=str(self.status), text=text)
        return self._take()

    def finish_running(self, at: float) -> list[CellEvent]:
        """The running cell has said that it is done; what it wrote to stderr is not awaited."""
        self._at = at
        if self.running is not None and self.running.done is not None:
            self._done(self.running)
        return self._take()

    def end(self, at: float, text: str | None) -> list[CellEvent]:
        """The program has ended; *text* None: another follows."""
        self._at = at
        self._accept_rest()
        if (running := self.running) is not None:
            self.running = None
            error = running.error
            self._tell(
                K.DONE,
                cell=running.row.id,
                count=running.number,
                status=CellStatus.ABORTED,
                silent=running.row.silent,
            )
            self.outcomes.append(
                Outcome(running.row.id, CellStatus.ABORTED, running.number, error=error)
            )
        self._abort(lambda _: True)
        if text is not None:
            self.status = S.ENDED
            self._tell(K.STATUS, name=str(S.ENDED), text=text)
        return self._take()

    def _accept_rest(self) -> None:
        while self._rows:
            self._accept(self._rows.popleft())

    # Frames

    def _frame(self, frame: Frame) -> None:
        if frame.kind == "more":
            self._keep_beginning(frame)
            return
        if self._begun:
            frame = self._whole(frame)
        match frame.kind:
            case "ready":
                self.version = frame.payload[:200].decode("utf-8", "replace").strip()
                if self.status is S.STARTING:
                    self._become(S.IDLE)
            case "begin":
                self._begin(frame.id)
            case "part" | "display" | "result" | "update":
                self._show(frame)
            case "clear":
                self._tell(K.CLEAR, cell=self._cell, wait=frame.arg == "wait")
            case "error":
                self._error(frame)
            case "input":
                self._ask(frame)
            case "done":
                self._end_of(frame.id).done = frame
                self._look()
            case "completions" | "inspection":
                answer = _completions(frame) if frame.kind == "completions" else _inspection(frame)
                self.replies.append(Reply(frame.id, answer))

    def _keep_beginning(self, frame: Frame) -> None:
        if len(self._begun) + len(frame.payload) <= MAX_PAYLOAD:
            self._begun += frame.payload
        else:
            self._lost += len(frame.payload)

    def _whole(self, frame: Frame) -> Frame:
        """With what its ``more`` frames began."""
        size = len(self._begun) + len(frame.payload) + self._lost
        lost = size if size > MAX_PAYLOAD else 0
        payload = b"" if lost else bytes(self._begun) + frame.payload
        self._begun.clear()
        self._lost = 0
        return replace(frame, payload=payload, lost_bytes=lost)

    def _fence(self, frame: Frame) -> None:
        """All that a cell wrote to stderr has come, perhaps before the cell is known to run."""
        if frame.kind == "fence":
            self._fenced = frame.id
            self._look()

    def _begin(self, cell: str) -> None:
        if (old := self.running) is not None:
            if old.row.id == cell:
                return
            self._done(old)
        if all(row.id != cell for row in self.waiting):
            row = new_row("", CellRequest(id=cell, code="", store=False), 0)  # no longer kept
        else:
            while (row := self.waiting.popleft()).id != cell:
                self._aborted(row)
        if not row.silent:
            self.executed += 1
        number = None if row.silent else self.executed
        self.running = _Running(row, number)
        self._tell(K.RUNNING, cell=cell, count=number, code=row.code, silent=row.silent)
        self._become(S.BUSY)

    def _end_of(self, cell: str) -> _Running:
        """The cell that a frame speaks of; begun by it if the driver has not said so before."""
        if self.running is None or self.running.row.id != cell:
            self._begin(cell)
        assert self.running is not None
        return self.running

    def _show(self, frame: Frame) -> None:
        display = self._bundle.add(frame)
        if frame.kind == "part":
            return
        bundle, self._bundle = self._bundle, Bundle()
        kind = EventKind(frame.kind)
        if kind is K.RESULT and self.running is not None and self.running.row.silent:
            return
        self._tell(
            kind,
            cell=self._cell,
            count=self.running.number if kind is K.RESULT and self.running else None,
            data=bundle.data,
            metadata=bundle.metadata,
            display=display,
        )

    def _error(self, frame: Frame) -> None:
        text = frame.payload.decode("utf-8", "replace")
        name, _, rest = text.partition("\n")
        message, _, trace = rest.partition("\n")
        line = int(frame.arg) if frame.arg.isdecimal() and len(frame.arg) < 9 else None
        lines = trace[: 10 * _MAX_TEXT].splitlines()[:_MAX_LINES]
        error = CellError(
            name=name[:200], text=message[:_MAX_TEXT], traceback=tuple(lines), line=line
        )
        if self.running is not None:
            self.running.error = error
        self._tell(K.ERROR, cell=self._cell, error=error)

    def _ask(self, frame: Frame) -> None:
        prompt = frame.payload[:_MAX_TEXT].decode("utf-8", "replace")
        self.asking = True
        self._tell(K.INPUT, cell=self._cell, text=prompt, secret=frame.arg == "password")

    def _look(self) -> None:
        """Both streams are complete: then the cell has ended."""
        running = self.running
        if running is not None and running.done is not None and self._fenced == running.row.id:
            self._done(running)

    def _done(self, running: _Running) -> None:
        """Without a *done* frame, its end was in output that is no longer kept."""
        self.running, self.asking = None, False
        ok = running.done is not None and running.done.arg == "ok"
        status = CellStatus.OK if ok else CellStatus.ERROR
        figures = _figures(running.done.payload) if running.done is not None else {}
        outcome = Outcome(
            running.row.id,
            status,
            running.number,
            took_us=figures.get("wall_us"),
            cpu_us=figures.get("cpu_us"),
            mem_bytes=figures.get("mem_bytes"),
            error=running.error,
        )
        self.outcomes.append(outcome)
        self._tell(
            K.DONE,
            cell=running.row.id,
            count=running.number,
            silent=running.row.silent,
            status=status,
            took_s=_seconds(outcome.took_us),
            cpu_s=_seconds(outcome.cpu_us),
            mem_bytes=outcome.mem_bytes,
        )
        if running.done is not None and not ok and running.row.stop_on_error:
            self._abort(lambda _: True)
        self._become(S.IDLE)

    # Telling

    @property
    def _cell(self) -> str:
        return "" if self.running is None else self.running.row.id

    def _text(self, stream: Stream, data: bytes) -> None:
        text = self._decoders[stream].decode(data)
        if not text:
            return
        if stream is Stream.STDERR and self.running is None:
            self.last_words = (self.last_words + text)[-1000:]
        self._tell(K.STREAM, cell=self._cell, name=stream.name.lower(), text=text)

    def _accept(self, row: CellRow) -> None:
        self._at = row.at / 1e6
        self.seq = max(self.seq, row.seq - 1)
        self.waiting.append(row)
        self._tell(K.ACCEPTED, cell=row.id, code=row.code, silent=row.silent)

    def _abort(self, which: Any) -> None:
        for row in [row for row in self.waiting if which(row)]:
            self.waiting.remove(row)
            self._aborted(row)

    def _aborted(self, row: CellRow) -> None:
        self.outcomes.append(Outcome(row.id, CellStatus.ABORTED))
        self._tell(K.DONE, cell=row.id, silent=row.silent, status=CellStatus.ABORTED)

    def _become(self, status: InterpreterStatus) -> None:
        self.status = status
        self._tell(K.STATUS, name=str(status), cell=self._cell)

    def _reach(self, place: int) -> None:
        """What comes next was known at *place* of the output."""
        number = self._base + place * ROOM
        while self._rows and self._rows[0].seq < number:
            at = self._at
            self._accept(self._rows.popleft())
            self._at = at
        self.seq = max(self.seq, number - 1)

    def _tell(self, kind: EventKind, **fields: Any) -> None:
        self.seq += 1
        self._told.append(CellEvent(seq=self.seq, at=self._at, kind=kind, **fields))

    def _take(self) -> list[CellEvent]:
        told, self._told = self._told, []
        return told


def new_row(interpreter_id: str, request: CellRequest, at: int) -> CellRow:
    """A cell that waits; *request* has its id."""
    return CellRow(
        interpreter_id=interpreter_id,
        id=request.id,
        seq=0,
        at=at,
        code=request.code,
        silent=request.silent,
        store=request.store and not request.silent,
        stdin=request.stdin,
        stop_on_error=request.stop_on_error,
        status=str(CellStatus.WAITING),
        number=None,
        took_us=None,
        cpu_us=None,
        mem_bytes=None,
        error="",
    )


def _figures(payload: bytes) -> dict[str, int]:
    found = {}
    for line in payload[:1000].decode("ascii", "replace").splitlines():
        name, _, value = line.partition("=")
        if value.isdecimal() and len(value) < 16:
            found[name] = int(value)
    return found


def _seconds(us: int | None) -> float | None:
    return None if us is None else us / 1e6


def _completions(frame: Frame) -> Completions:
    start, _, end = frame.arg.partition(",")
    whole = start.isdecimal() and end.isdecimal() and len(frame.arg) < 40
    lines = frame.payload.decode("utf-8", "replace").split("\n")
    matches = tuple(line[:500] for line in lines[:_MAX_MATCHES] if line)
    if not whole:
        return Completions(matches=(), start=0, end=0)
    return Completions(matches=matches, start=int(start), end=int(end))


def _inspection(frame: Frame) -> Inspection:
    if frame.arg != "found":
        return Inspection(found=False)
    text = frame.payload[: 4 * _MAX_TEXT].decode("utf-8", "replace")
    return Inspection(found=True, data={"text/plain": text})
