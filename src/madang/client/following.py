"""What a followed program or log has told so far, and how to take it up again.

No I/O: both clients feed it what they receive. The first connection of a run creates the session;
each further one attaches to it at the first offset not seen yet, so that nothing is lost and
nothing comes twice. An exec has no such second road: its stream ends with its connection.
"""

from __future__ import annotations

from madang.client import calls
from madang.client.calls import Call
from madang.client.events import (
    ExecOpened,
    Frames,
    Output,
    StreamEvent,
    parse_message,
    parse_record,
)
from madang.kit.codec import to_json
from madang.wire.api import ClientMessage, ClientOp, ServerMessage, ServerOp
from madang.wire.errors import PlatformError, from_problem
from madang.wire.log import LogGap, LogRecord
from madang.wire.policy import Refusal
from madang.wire.session import Ended, Session, SessionStatus


class Following:
    def __init__(self, path: str, first: ClientMessage) -> None:
        self._path = path
        self._first = first
        self._stdin_ended = False
        self._window: tuple[int, int] | None = None
        self.offset = first.offset
        """Where the stream continues; None until known."""
        self.session: Session | None = None
        self.ended: Ended | None = None
        self.finished = False
        self.exec_id: str | None = None
        self._refusals: set[tuple[str, int, str, str]] = set()

    @property
    def can_resume(self) -> bool:
        return self._first.op is not ClientOp.EXEC

    def opening(self) -> tuple[str, list[bytes]]:
        """Path of the next connection, and the messages that it begins with."""
        if not self.can_resume or self.session is None:
            return self._path, [to_json(self._first)]
        path = calls.session_path(self.session.id, "/attach")
        messages = [ClientMessage(op=ClientOp.ATTACH, offset=self.offset or 0)]
        if self._window is not None:
            rows, cols = self._window
            messages.append(ClientMessage(op=ClientOp.RESIZE, rows=rows, cols=cols))
        if self._stdin_ended:
            messages.append(ClientMessage(op=ClientOp.STDIN_END))
        return path, [to_json(message) for message in messages]

    def resize(self, rows: int, cols: int) -> bytes:
        self._window = rows, cols
        return to_json(ClientMessage(op=ClientOp.RESIZE, rows=rows, cols=cols))

    def end_stdin(self) -> bytes:
        self._stdin_ended = True
        return to_json(ClientMessage(op=ClientOp.STDIN_END))

    @staticmethod
    def signal(number: int) -> bytes:
        return to_json(ClientMessage(op=ClientOp.SIGNAL, signal=number))

    @staticmethod
    def detach() -> bytes:
        return to_json(ClientMessage(op=ClientOp.DETACH))

    def take(self, message: bytes | str) -> list[StreamEvent]:
        """What one message from the server means. Raises the error that it tells."""
        if isinstance(message, bytes):
            return self._output(parse_record(message))
        return self._told(parse_message(message))

    def _output(self, record: LogRecord) -> list[StreamEvent]:
        expected = self.offset
        if expected is not None and record.offset < expected:
            return []
        self.offset = record.end
        if expected is not None and record.offset > expected:
            return [LogGap(expected, record.offset), record]
        return [record]

    def _told(self, message: ServerMessage) -> list[StreamEvent]:
        if message.op is ServerOp.ERROR:
            problem = message.error
            if problem is None:
                raise PlatformError("the server ended the stream with an error it did not name.")
            raise from_problem(problem.code, problem.detail or problem.title, problem.details)
        if message.refusal is not None:
            return self._refused(message.refusal)
        if message.op is ServerOp.GAP and message.end is not None:
            return self._gap(message.start or 0, message.end)
        if message.op is ServerOp.EXEC and message.exec_id is not None:
            self.exec_id = message.exec_id
            return [ExecOpened(message.exec_id)]
        if message.op is ServerOp.END:
            self.finished = True
            self.ended = message.ended or (message.session.ended if message.session else None)
        if message.session is not None:
            return self._session(message.session)
        return []

    def _refused(self, refusal: Refusal) -> list[StreamEvent]:
        """Each once, also where a new connection tells all of them again."""
        key = (refusal.layer, refusal.line, refusal.what, refusal.object)
        if key in self._refusals:
            return []
        self._refusals.add(key)
        return [refusal]

    def _gap(self, start: int, end: int) -> list[StreamEvent]:
        if self.offset is not None and end <= self.offset:
            return []
        self.offset = end
        return [LogGap(start, end)]

    def _session(self, session: Session) -> list[StreamEvent]:
        known = self.session
        if known is not None and session.version < known.version:
            return []
        self.session = session
        if self._first.op is ClientOp.RUN and self.offset is None:
            self.offset = 0
        return [session]


class LogReading:
    """A log read over HTTP: where the next request continues, and whether there is one.

    A followed log whose answer ends may have ended with the server; so the session is asked, and
    once it is over what remains is read without following.
    """

    def __init__(
        self, ref: str, offset: int | None, tail: int | None, since: float | None, *, follow: bool
    ) -> None:
        self.ref = ref
        self.follow = follow
        self._tail, self._since = tail, since
        begin = 0 if tail is None and since is None else None
        self._frames = Frames(begin if offset is None else offset)

    def call(self) -> Call[bytes]:
        """The next request."""
        offset = self._frames.next_offset
        begun = offset is not None
        return calls.logs(
            self.ref,
            offset=offset,
            tail=None if begun else self._tail,
            since=None if begun else self._since,
            follow=self.follow,
        )

    def feed(self, data: bytes) -> list[Output]:
        return self._frames.feed(data)

    def restart(self) -> None:
        """The connection was lost: a frame cut in its middle comes again."""
        self._frames = Frames(self._frames.next_offset)

    def goes_on(self, session: Session) -> bool:
        """After an answer's end in a followed log: whether one more request is due."""
        if not self.follow:
            return False
        self.follow = session.status is not SessionStatus.TERMINATED
        return self.follow or session.log_end is None or self._behind(session.log_end)

    def _behind(self, end: int) -> bool:
        return (self._frames.next_offset or 0) < end
