"""An interpreter of a session as an ordinary program follows and feeds it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Self

from madang.client.cellfollowing import Answered, CellFollowing
from madang.client.cellstory import Story
from madang.client.channel import Channel
from madang.client.resuming import Resumed
from madang.client.transport import Transport
from madang.wire.cells import (
    Cell,
    CellAnswer,
    CellEvent,
    CellOp,
    CellRequest,
    Completions,
    Inspection,
    Interpreter,
)
from madang.wire.errors import Conflict, InterpreterEnded, PlatformError, ServerUnreachable


class Cells(Resumed):
    """The channel of an interpreter. Iterate it for events, or ``run`` code.

    Nothing is read ahead: bytes move while you iterate, ask or ``pump``. If the connection breaks,
    it is taken up again where it stopped, for as long as the client's ``patience_s``. Closing it,
    or leaving its ``with`` block, leaves the interpreter as it is.
    """

    def __init__(self, transport: Transport, interpreter: Interpreter, after: int) -> None:
        self.interpreter: Final = interpreter
        self._following = CellFollowing(interpreter.session_id, interpreter.id, after)
        super().__init__(transport, self._following)
        self._events: deque[CellEvent] = deque()
        self._answers: dict[str, Answered] = {}
        self._asked: set[str] = set()
        self._closed = False
        self._channel = transport.repeat(self._connect)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[CellEvent]:
        """What happens, until the interpreter has ended."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self.finished:
                return
            self.pump()

    @property
    def finished(self) -> bool:
        """Whether the interpreter has ended."""
        return self._following.finished

    @property
    def ended(self) -> str:
        """Why, in words."""
        return self._following.ended

    def run(
        self,
        code: str,
        *,
        show: Callable[[CellEvent], None] | None = None,
        answer: Callable[[str, bool], str] | None = None,
    ) -> Cell:
        """Run a cell to its end. *show* is told its events, *answer* (prompt, hidden) its input.

        Events of other cells that come meanwhile are dropped.
        """
        story = Story(self.interpreter.id, code)
        story.id = self.execute(code, stdin=answer is not None)
        while True:
            for event in self.take():
                if story.add(event):
                    if show is not None:
                        show(event)
                    if story.asks and answer is not None:
                        story.asks = False
                        self.input(answer(event.text, event.secret))
            if story.ended:
                break
            if self.finished:
                raise InterpreterEnded(f"the interpreter has ended: {self.ended}")
            if not self._events:
                self.pump()
        return story.cell()

    def execute(
        self,
        code: str,
        *,
        cell: str = "",
        silent: bool = False,
        store: bool = True,
        stdin: bool = True,
        stop_on_error: bool = True,
    ) -> str:
        """Give it a cell; returns the cell's id. What comes of it: iterate."""
        request = CellRequest(
            code=code,
            id=cell,
            silent=silent,
            store=store,
            stdin=stdin,
            stop_on_error=stop_on_error,
        )
        made, message = self._following.execute(request)
        self._asked.add(made)
        self._send(message)
        self._answer(made, resent=True)
        return made

    def input(self, text: str) -> None:
        """Answer the cell that asks. Raises Conflict if none does."""
        self._ask(CellOp.INPUT, text)

    def complete(self, code: str, cursor: int | None = None) -> Completions:
        found = self._ask(CellOp.COMPLETE, code, cursor).completions
        return found or Completions(matches=(), start=0, end=0)

    def inspect(self, code: str, cursor: int | None = None) -> Inspection:
        return self._ask(CellOp.INSPECT, code, cursor).inspection or Inspection(found=False)

    def interrupt(self) -> None:
        self._ask(CellOp.INTERRUPT)

    def restart(self) -> None:
        """All state is gone; the session goes on."""
        self._ask(CellOp.RESTART)

    def take(self) -> list[CellEvent]:
        """What has come since the last call; does not wait."""
        taken = list(self._events)
        self._events.clear()
        return taken

    def pump(self, watch: Iterable[int] = (), timeout_s: float | None = None) -> set[int]:
        """Move bytes; wait until something came, one of *watch* (file descriptors) can be read,
        or *timeout_s* is over. Returns the readable ones of *watch*.
        """
        if self._closed:
            raise Conflict("the channel was closed; open another.")
        if self.finished:
            return set()
        try:
            if self._channel is None:
                self._channel = self._connect()
            ready = self._channel.pump(watch, timeout_s)
            self._drain(self._channel)
            if self._channel.closed and not self.finished:
                raise ServerUnreachable("the server closed the channel.")
        except PlatformError as exc:
            self._broken(exc)
            return set()
        return ready

    def close(self) -> None:
        """Let go of the interpreter; it goes on."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()

    def _ask(self, op: CellOp, text: str = "", cursor: int | None = None) -> CellAnswer:
        reply, message = self._following.ask(op, text, cursor)
        self._asked.add(reply)
        self._send(message)
        return self._answer(reply, resent=False).answer

    def _answer(self, reply: str, *, resent: bool) -> Answered:
        """*resent*: whether the question survives a break of the connection."""
        channel = self._channel
        try:
            while reply not in self._answers:
                if self.finished:
                    raise InterpreterEnded(f"the interpreter has ended: {self.ended}")
                self.pump()
                if not resent and self._channel is not channel:
                    raise ServerUnreachable("the connection was lost before the answer came.")
            answered = self._answers.pop(reply)
        finally:
            self._asked.discard(reply)
        if answered.error is not None:
            raise answered.error
        return answered

    def _send(self, message: bytes) -> None:
        while self._channel is None:
            self.pump(timeout_s=0)
        self._channel.send(message, text=True)

    def _drain(self, channel: Channel) -> None:
        while channel.messages:
            for item in self._following.take(channel.messages.popleft()):
                if isinstance(item, CellEvent):
                    self._events.append(item)
                elif item.reply in self._asked:
                    self._answers[item.reply] = item
        if self.finished:
            channel.close()

    def _broken(self, error: PlatformError) -> None:
        """Pause before the next try, or raise *error*."""
        time.sleep(self._let_go(error, repeatable=True))
