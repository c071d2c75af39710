"""Cells: code that is run piece by piece in an interpreter that keeps its state.

An *interpreter* is one more program in a session. Everything that happens in it is a numbered
event; each client that follows it sees them all, and goes on at a number after a break.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class InterpreterStatus(StrEnum):
    STARTING = "STARTING"
    IDLE = "IDLE"
    BUSY = "BUSY"
    ENDED = "ENDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpreterRequest:
    """Start an interpreter in a session."""

    language: str = "python"
    driver: str = ""
    """Empty: our own; ``ipykernel``: that, where the image has it."""
    name: str = ""
    """Several may run in one session; empty: the language's name, with a number if taken."""
    cwd: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """An interpreter, as the API returns it."""

    id: str
    session: str
    """Name of its session."""
    session_id: str
    name: str
    language: str
    driver: str = ""
    version: str = ""
    """Of the language, as the interpreter says."""
    status: InterpreterStatus = InterpreterStatus.STARTING
    started_at: float = 0.0
    restarts: int = 0
    executed: int = 0
    """Cells so far, since the last restart."""
    clients: int = 0
    events: int = 0
    """Number of the newest event."""
    ended: str = ""
    """Why, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRequest:
    """Run a piece of code."""

    code: str
    id: str = ""
    """The caller's own; the same again runs nothing again. Empty: made up."""
    silent: bool = False
    """No number, no history, no result shown."""
    store: bool = True
    """Whether it goes into the history."""
    stdin: bool = True
    """Whether it may ask for input; a request fails at once otherwise."""
    stop_on_error: bool = True
    """Whether an error of it drops the cells that wait behind it."""


class CellStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    OK = "ok"
    ERROR = "error"
    ABORTED = "aborted"
    """Not run: one before it failed, or the interpreter was restarted or ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellError:
    name: str
    text: str
    traceback: tuple[str, ...] = ()
    line: int | None = None
    """Of the cell, counted from 1."""


class EventKind(StrEnum):
    ACCEPTED = "accepted"
    """A cell waits: *code*."""
    RUNNING = "running"
    """A cell has begun: *count* is its number, *code* its code."""
    STREAM = "stream"
    """*name* is ``stdout`` or ``stderr``, *text* what came."""
    DISPLAY = "display"
    """*data*: MIME type → text, or base64 of what is no text; *metadata*; *display* its id."""
    UPDATE = "update"
    """Like DISPLAY, in place of what *display* names."""
    CLEAR = "clear"
    """Output so far goes; *wait*: once the next comes."""
    RESULT = "result"
    """Like DISPLAY: the value of the last expression."""
    ERROR = "error"
    """*error*"""
    INPUT = "input"
    """The cell asks: *text* is the prompt, *secret* whether the answer is hidden."""
    ANSWERED = "answered"
    """Somebody has answered."""
    DONE = "done"
    """A cell has ended: *status*, *took_s*, *cpu_s*, *mem_bytes*."""
    STATUS = "status"
    """Of the interpreter: *name* is an ``InterpreterStatus``; *text* why it ended."""
    GAP = "gap"
    """Events up to here are no longer kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellEvent:
    """One thing that happened; fields that its kind has no use for are empty."""

    seq: int
    at: float
    kind: EventKind
    cell: str = ""
    count: int | None = None
    name: str = ""
    text: str = ""
    code: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    display: str = ""
    wait: bool = False
    secret: bool = False
    silent: bool = False
    error: CellError | None = None
    status: CellStatus | None = None
    took_s: float | None = None
    cpu_s: float | None = None
    mem_bytes: int | None = None
    """Of the interpreter at the cell's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell with everything that came of it."""

    id: str
    interpreter: str
    code: str
    status: CellStatus
    count: int | None = None
    events: tuple[CellEvent, ...] = ()
    error: CellError | None = None
    accepted_at: float = 0.0
    took_s: float | None = None
    cpu_s: float | None = None
    mem_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    matches: tuple[str, ...]
    start: int
    """First character that a match takes the place of; counted in code points."""
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    found: bool
    data: dict[str, str] = field(default_factory=dict)


class CellOp(StrEnum):
    """What a client of the channel says."""

    EXECUTE = "execute"
    INPUT = "input"
    COMPLETE = "complete"
    INSPECT = "inspect"
    INTERRUPT = "interrupt"
    RESTART = "restart"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellMessage:
    """Client → server on the channel."""

    op: CellOp
    reply: str = ""
    """Comes back with the answer."""
    cell: CellRequest | None = None
    """For ``execute``."""
    text: str = ""
    """For ``input``: the answer. For ``complete`` and ``inspect``: the code."""
    cursor: int | None = None
    """In code points; None: at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellAnswer:
    """Server → client on the channel: an event, or the answer to a message."""

    event: CellEvent | None = None
    reply: str = ""
    cell: str = ""
    """Id of the cell that ``execute`` made."""
    completions: Completions | None = None
    inspection: Inspection | None = None
    error: dict[str, Any] | None = None
    """A problem, as the API's errors are told."""
