"""What a client of an interpreter's channel has heard and asked, and how to take it up again.

No I/O: both clients feed it what they receive. After a break the next connection goes on after the
last event; cells that were not confirmed are sent again under their ids, which run once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from madang.client import cellcalls
from madang.kit.codec import from_json, to_json
from madang.kit.ids import new_id
from madang.wire.cells import (
    CellAnswer,
    CellEvent,
    CellMessage,
    CellOp,
    CellRequest,
    EventKind,
    InterpreterStatus,
)
from madang.wire.errors import PlatformError, from_problem


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to what was asked."""

    reply: str
    answer: CellAnswer
    error: PlatformError | None = None


class CellFollowing:
    def __init__(self, ref: str, name: str, after: int) -> None:
        self._ref = ref
        self._name = name
        self.after = after
        """Number of the last event that was taken."""
        self.ended = ""
        """Why the interpreter has ended."""
        self.finished = False
        self._unconfirmed: dict[str, CellMessage] = {}

    def opening(self) -> tuple[str, list[bytes]]:
        """Path of the next connection, and the messages that it begins with."""
        path = cellcalls.channel_path(self._ref, self._name, self.after)
        return path, [to_json(message) for message in self._unconfirmed.values()]

    def execute(self, request: CellRequest) -> tuple[str, bytes]:
        """The cell's id, and what to send."""
        if not request.id:
            request = replace(request, id=new_id())
        message = CellMessage(op=CellOp.EXECUTE, reply=request.id, cell=request)
        self._unconfirmed[request.id] = message
        return request.id, to_json(message)

    def survives(self, reply: str) -> bool:
        """Whether the message is sent again after a break."""
        return reply in self._unconfirmed

    @staticmethod
    def ask(op: CellOp, text: str = "", cursor: int | None = None) -> tuple[str, bytes]:
        """What its answer will be marked with, and what to send."""
        reply = new_id()
        return reply, to_json(CellMessage(op=op, reply=reply, text=text, cursor=cursor))

    def take(self, data: bytes | str) -> list[CellEvent | Answered]:
        """What one message from the server means. Raises the error that ends the channel."""
        answer = from_json(CellAnswer, data)
        if answer.event is not None:
            return self._event(answer.event)
        error = _error(answer.error)
        if not answer.reply:
            raise error or PlatformError("the server said nothing that is known here.")
        self._unconfirmed.pop(answer.reply, None)
        return [Answered(answer.reply, answer, error)]

    def _event(self, event: CellEvent) -> list[CellEvent | Answered]:
        if event.seq <= self.after:
            return []
        self.after = event.seq
        self._unconfirmed.pop(event.cell, None)
        if event.kind is EventKind.STATUS and event.name == InterpreterStatus.ENDED:
            self.finished, self.ended = True, event.text
        return [event]


def _error(problem: dict[str, Any] | None) -> PlatformError | None:
    if problem is None:
        return None
    text = problem.get("detail") or problem.get("title") or "the server told no reason."
    return from_problem(str(problem.get("code")), str(text), problem.get("details") or {})
