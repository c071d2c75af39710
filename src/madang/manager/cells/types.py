"""Values of the cells slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from madang.wire.cells import CellStatus
from madang.wire.languages import Language

FINAL: Final = frozenset({CellStatus.OK, CellStatus.ERROR, CellStatus.ABORTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpreterRow:
    """One interpreter; restarts give it another program under the same id."""

    id: str
    session_id: str
    attempt: int
    """Of its session: a kernel of another attempt knows nothing of it."""
    name: str
    language: str
    driver: str
    cwd: str
    env: str
    """JSON"""
    nonce: str
    """What the frames of its present program begin with."""
    exec_id: str
    """Its present program."""
    base: int
    """Numbers of the present program's events are larger."""
    version: str
    restarts: int
    started_at: int
    ended_at: int | None
    ended: str
    """Why, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRow:
    """One cell; what came of it stands in its program's output, and is not stored again."""

    interpreter_id: str
    id: str
    seq: int
    """Of its ACCEPTED event."""
    at: int
    code: str
    silent: bool
    store: bool
    stdin: bool
    stop_on_error: bool
    status: str
    """``waiting`` until it has ended: whether it runs stands in the output."""
    number: int | None
    """Of the cells that count; None: it has not begun, or is silent."""
    took_us: int | None
    cpu_us: int | None
    mem_bytes: int | None
    error: str
    """``CellError`` as JSON, without its traceback; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSettings:
    """Bounds of interpreters and their cells."""

    interpreters: int = 16
    """That live in one session at a time."""
    waiting: int = 200
    """Cells that wait in one interpreter."""
    code_bytes: int = 1 << 20
    """Of one cell."""
    history: int = 5000
    """Cells kept of one interpreter; the oldest go first."""
    history_bytes: int = 16 << 20
    """Of their code."""
    kept_events: int = 4000
    """Newest events of an interpreter that are held in memory; older ones are read from its
    output."""
    kept_bytes: int = 4 << 20
    busy_s: float = 10.0
    """How long a completion waits for a running cell."""
    obey_s: float = 3.0
    """After an interrupt that changed nothing for so long, a restart is offered."""
    stop_s: float = 2.0
    """Between asking a program to end and ending it."""


class Languages(Protocol):
    """What is known of languages (``kit.languages``)."""

    def get(self, word: str) -> Language:
        """By name or alias. Raises LanguageUnknown."""
        ...

    def driver(self, language: Language) -> str:
        """The driver's text."""
        ...
