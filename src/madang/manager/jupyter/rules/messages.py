"""From the events of an interpreter to Jupyter's messages, in the order that ipykernel has.

::

    execute_request ─▶ status busy · execute_input · stream, display_data, … · execute_reply ·
                       status idle

Each names the request that it belongs to as its parent: frontends find the cell by it.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from madang.kit.codec import from_json
from madang.manager.jupyter.rules.frames import Message
from madang.wire.cells import CellError, CellEvent, CellStatus, EventKind, InterpreterStatus
from madang.wire.errors import InvalidRequest

K = EventKind

VERSION: Final = "5.4"
"""Of Jupyter's messaging protocol."""
MAX_PARENTS: Final = 400
_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_JSON: Final = re.compile(r"application/(?:[\w.+-]+\+)?json")
_STATES: Final = {
    InterpreterStatus.STARTING: "starting",
    InterpreterStatus.IDLE: "idle",
    InterpreterStatus.BUSY: "busy",
    InterpreterStatus.ENDED: "dead",
}

_Write = Callable[[CellEvent, "Parent"], Iterator[Message]]


def state_of(status: InterpreterStatus) -> str:
    """An ``execution_state``."""
    return _STATES[status]


def cell_id(msg_id: str) -> str:
    """The id of the cell that an execute_request makes; the same request, the same cell."""
    if _PLAIN_ID.fullmatch(msg_id):
        return msg_id
    return "j" + hashlib.sha256(msg_id.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def utc(at: float) -> str:
    """``2026-01-31T12:00:00.000000Z``: always with a fraction, as clients parse it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True, slots=True)
class Parent:
    """A request that something answers."""

    header: dict[str, Any]
    owner: str
    """Session id of the client that asked, as clients make them up; empty: nobody knows."""


@dataclass(slots=True)
class Parents:
    """Requests by the cell that they made, as far as this server has seen them."""

    known: OrderedDict[str, Parent] = field(default_factory=OrderedDict)

    def add(self, cell: str, parent: Parent) -> None:
        self.known[cell] = parent
        while len(self.known) > MAX_PARENTS:
            self.known.popitem(last=False)

    def of(self, cell: str) -> Parent:
        """For a cell that somebody else made: a request as it would have been."""
        if (found := self.known.get(cell)) is not None:
            return found
        header = {"msg_id": cell, "msg_type": "execute_request", "session": "", "username": ""}
        return Parent({**header, "date": utc(0), "version": VERSION} if cell else {}, "")


class Writer:
    """Makes the messages of one kernel for one connection; their session id is the kernel's."""

    def __init__(self, session: str, connection: str) -> None:
        """*connection*: makes ids unique of what is no event."""
        self._session: Final = session
        self._connection: Final = connection
        self._count = 0

    def make(
        self,
        channel: str,
        kind: str,
        parent: Mapping[str, Any],
        content: dict[str, Any],
        *,
        at: float,
        key: str = "",
    ) -> Message:
        """*key* makes the message's id; the same for the same event."""
        self._count += 1
        header = {
            "msg_id": f"{self._session}_{key or f'{self._connection}{self._count}'}_{kind}",
            "msg_type": kind,
            "username": "madang",
            "session": self._session,
            "date": utc(at),
            "version": VERSION,
        }
        return Message(channel=channel, header=header, parent=dict(parent), content=content)

    def status(self, state: str, parent: Mapping[str, Any], *, at: float, key: str = "") -> Message:
        content = {"execution_state": state}
        key = f"{key}{state}" if key else ""
        return self.make("iopub", "status", parent, content, at=at, key=key)


class Translator:
    """One client's view of an interpreter: which messages each event makes for it."""

    def __init__(self, writer: Writer, parents: Parents, client: str) -> None:
        self._writer: Final = writer
        self._parents: Final = parents
        self._client: Final = client
        self._counts: Final[dict[str, int | None]] = {}
        self._errors: Final[dict[str, CellError]] = {}
        self.running = ""
        """The cell that runs."""

    def messages(self, event: CellEvent) -> list[Message]:
        """In the order in which they go out; none for what Jupyter has no words for."""
        write = _WRITERS.get(event.kind)
        return [] if write is None else list(write(self, event, self._parents.of(event.cell)))

    def _iopub(
        self, kind: str, event: CellEvent, parent: Parent, content: dict[str, Any]
    ) -> Message:
        key = str(event.seq)
        return self._writer.make("iopub", kind, parent.header, content, at=event.at, key=key)

    def _status(self, state: str, event: CellEvent, parent: Parent) -> Message:
        return self._writer.status(state, parent.header, at=event.at, key=str(event.seq))

    def _running(self, event: CellEvent, parent: Parent) -> Iterator[Message]:
        self.running = event.cell
        self._counts[event.cell] = event.count
        yield self._status("busy", event, parent)
        if not event.silent:
            content = {"code": event.code, "execution_count": event.count or 0}
            yield self._iopub("execute_input", event, parent, content)

    def _stream(self, event: CellEvent, parent: Parent) -> Iterator[Message]:
        yield self._iopub("stream", event, parent, {"name": event.name, "text": event.text})

    def _display(self, event: CellEvent, parent: Parent) -> Iterator[Message]:
        kind = "update_display_data" if event.kind is K.UPDATE else "display_data"
        yield self._iopub(kind, event, parent, _bundle(event))

    def _result(self, event: CellEvent, parent: Parent) -> Iterator[Message]:
        count = event.count or self._counts.get(event.cell) or 0
        content = _bundle(event) | {"execution_count": count}
        yield self._iopub("execute_result", event, parent, content)

    def _clear(self, event: CellEvent, parent: Parent) -> Iterator[Message]:
        yield self._iopub("clear_output", event, parent, {"wait": event.wait})

    def _error(self, event: CellEvent, parent: Parent) -> Iterator[Message]:
        if event.error is not None:
            self._errors[event.cell] = event.error
            yield self._iopub("error", event, parent, _error(event.error))

    def _input(self, event: CellEvent, parent: Parent) -> Iterator[Message]:
        """Only whoever asked for the cell is asked; everybody where nobody knows who that was."""
        if parent.owner in {"", self._client}:
            content = {"prompt": event.text, "password": event.secret}
            key = str(event.seq)
            yield self._writer.make(
                "stdin", "input_request", parent.header, content, at=event.at, key=key
            )

    def _done(self, event: CellEvent, parent: Parent) -> Iterator[Message]:
        began = event.cell in self._counts
        count = self._counts.pop(event.cell, None)
        error = event.error or self._errors.pop(event.cell, None)
        if event.cell == self.running:
            self.running = ""
        if not began and event.status is CellStatus.ABORTED:
            yield self._status("busy", event, parent)
        if parent.owner in {"", self._client}:
            content = _reply(event.status, event.count or count or 0, error)
            key = str(event.seq)
            yield self._writer.make(
                "shell", "execute_reply", parent.header, content, at=event.at, key=key
            )
        yield self._status("idle", event, parent)

    def _state(self, event: CellEvent, _parent: Parent) -> Iterator[Message]:
        """Busy and idle are told by the cells; what is left is told of no cell."""
        if event.name in {InterpreterStatus.STARTING, InterpreterStatus.ENDED}:
            self.running = ""
            state = state_of(InterpreterStatus(event.name))
            yield self._status(state, event, Parent({}, ""))


_WRITERS: Final[dict[EventKind, Callable[[Translator, CellEvent, Parent], Iterator[Message]]]] = {
    K.RUNNING: Translator._running,
    K.STREAM: Translator._stream,
    K.DISPLAY: Translator._display,
    K.UPDATE: Translator._display,
    K.CLEAR: Translator._clear,
    K.RESULT: Translator._result,
    K.ERROR: Translator._error,
    K.INPUT: Translator._input,
    K.DONE: Translator._done,
    K.STATUS: Translator._state,
}


def _bundle(event: CellEvent) -> dict[str, Any]:
    data = {mime: _value(mime, value) for mime, value in event.data.items()}
    transient = {"display_id": event.display} if event.display else {}
    return {"data": data, "metadata": event.metadata, "transient": transient}


def _value(mime: str, value: Any) -> Any:
    """JSON types stand as values in Jupyter's bundles, everything else as text."""
    if isinstance(value, str) and _JSON.fullmatch(mime):
        try:
            return from_json(object, value)
        except InvalidRequest:
            return value
    return value


def _error(error: CellError) -> dict[str, Any]:
    traceback = list(error.traceback) or [f"{error.name}: {error.text}"]
    return {"ename": error.name, "evalue": error.text, "traceback": traceback}


def _reply(status: CellStatus | None, count: int, error: CellError | None) -> dict[str, Any]:
    if status is CellStatus.OK:
        found = {"status": "ok", "payload": [], "user_expressions": {}}
    elif status is CellStatus.ABORTED:
        found = {"status": "aborted"}
    else:
        unknown = CellError(name="Error", text="the cell ended with an error")
        found = {"status": "error", **_error(error or unknown)}
    return {**found, "execution_count": count}
