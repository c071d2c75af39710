"""Running programs as the sync client follows them: output, stdin, window, signals."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Self

from madang.client import calls
from madang.client.channel import Channel
from madang.client.events import StreamEvent
from madang.client.following import Following
from madang.client.resuming import Resumed
from madang.client.transport import Transport
from madang.wire.errors import Conflict, PlatformError, ServerUnreachable
from madang.wire.log import LogRecord
from madang.wire.session import Ended, Session, SessionStatus

HIGH_WATER: Final = 256 * 1024
"""stdin that may wait to be sent."""
_CHUNK: Final = 64 * 1024


class Stream(Resumed):
    """A program's stream. Iterate it for its output (``LogRecord``), or ``events`` for all.

    Nothing is read or sent ahead: bytes move while you iterate, ``wait``, ``write`` or ``pump``.
    If the connection breaks it is taken up again where it stopped, for as long as the client's
    ``patience_s``; only an exec's can't be. Closing it, or leaving its ``with`` block, leaves the
    program running; one that was never used is not started.
    """

    def __init__(self, transport: Transport, following: Following) -> None:
        super().__init__(transport, following)
        self._following = following
        self._events: deque[StreamEvent] = deque()
        self._next_try = 0.0
        self._told = False
        self._closed = False
        self._begun = False
        """Whether anything was asked of it: until then nothing is sent."""
        self.on_break: Callable[[str], None] | None = None
        """Told in words when the connection breaks."""
        self._channel = transport.repeat(self._connect)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[LogRecord]:
        return (event for event in self.events() if isinstance(event, LogRecord))

    @property
    def finished(self) -> bool:
        """Whether the program has ended and all its output came."""
        return self._following.finished

    @property
    def backlog(self) -> int:
        """Bytes of stdin not sent yet; ``write`` waits while it is above ``HIGH_WATER``."""
        return HIGH_WATER + 1 if self._channel is None else self._channel.backlog

    def events(self) -> Iterator[StreamEvent]:
        """Output, gaps in it, and the session at each change, until the program has ended."""
        while True:
            while self._events:  # one by one: what is not asked for now stays for later
                yield self._events.popleft()
            if self.finished:
                return
            self.pump()

    def take(self) -> list[StreamEvent]:
        """What has come since the last call; does not wait."""
        taken = list(self._events)
        self._events.clear()
        return taken

    def pump(self, watch: Iterable[int] = (), timeout_s: float | None = None) -> set[int]:
        """Move bytes; wait until something came, or one of *watch* (file descriptors) can be
        read, or *timeout_s* is over. Returns the readable ones of *watch*.
        """
        if self.finished:
            return set()
        if self._closed:
            raise Conflict("the stream was closed; `attach` opens another.")
        if self._channel is None:
            return self._rest(watch, timeout_s)
        self._begun = True
        try:
            ready = self._channel.pump(watch, timeout_s)
            self._drain(self._channel)
            if self._channel.closed and not self.finished:
                raise ServerUnreachable("the server closed the stream before the program's end.")
        except PlatformError as exc:
            self._broken(exc)
            return set()
        return ready

    def write(self, data: bytes) -> None:
        """Send to the program's stdin; waits if much is on its way already."""
        self._begun = True
        for start in range(0, len(data), _CHUNK):
            while self.backlog > HIGH_WATER and not self.finished:
                self.pump()
            if self._channel is not None:
                self._channel.send(data[start : start + _CHUNK], text=False)

    def close_stdin(self) -> None:
        self._send(self._following.end_stdin())

    def resize(self, rows: int, cols: int) -> None:
        """Tell the size of the terminal."""
        self._send(self._following.resize(rows, cols))

    def signal(self, number: int) -> None:
        """Send a signal to the program's process group."""
        self._send(self._following.signal(number))

    def close(self) -> None:
        """Let go of the program; it goes on. One that was never asked for is not started."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is None:
            return
        if not self._begun:
            channel.abandon()
            return
        if not self.finished:
            channel.send(self._following.detach(), text=True)
        channel.close()

    def _send(self, message: bytes) -> None:
        self._begun = True
        if self._channel is not None:
            self._channel.send(message, text=True)

    def _drain(self, channel: Channel) -> None:
        while channel.messages and not self.finished:
            self._events += self._following.take(channel.messages.popleft())
        if self.finished:
            channel.close()

    def _broken(self, error: PlatformError) -> None:
        """Plan the next try, or raise *error*."""
        former = self._retries
        pause_s = self._let_go(error, repeatable=self._following.can_resume)
        if self._retries is not former:
            self._told = False
        if self.on_break is not None and not self._told:
            self._told = True
            self.on_break(error.text)
        self._next_try = time.monotonic() + pause_s

    def _rest(self, watch: Iterable[int], timeout_s: float | None) -> set[int]:
        """Wait for the time of the next try; then try."""
        pause_s = max(0.0, self._next_try - time.monotonic())
        early = timeout_s is not None and timeout_s < pause_s
        poller = select.poll()
        for fd in watch:
            poller.register(fd, select.POLLIN)
        wait_s = timeout_s if early and timeout_s is not None else pause_s
        ready = {fd for fd, _ in poller.poll(wait_s * 1000)}
        if not ready and not early:
            try:
                self._channel = self._connect()
            except PlatformError as exc:
                self._broken(exc)
        return ready


class Run(Stream):
    """A session's main program."""

    @property
    def session(self) -> Session:
        """The session as last told. Waits for the first word of it."""
        while self._following.session is None:
            self.pump()
        return self._following.session

    def wait(self) -> Session:
        """Wait for the program's end, dropping what output was not taken; how it ended is in
        ``.ended``.
        """
        for _ in self.events():
            pass
        session = self.session
        while session.ended is None and session.status is not SessionStatus.TERMINATED:
            call = calls.session(session.id, wait_s=calls.POLL_S, version=session.version)
            session = self._transport.call(call)
        return session

    def stop(self, grace_s: float | None = None) -> Session:
        """Ask for the end; ``wait`` for it."""
        return self._transport.call(calls.stop(self.session.id, grace_s))


class Exec(Stream):
    """One more program in a running session."""

    def wait(self) -> Ended:
        """Wait for the program's end, dropping what output was not taken."""
        for _ in self.events():
            pass
        if self._following.ended is None:
            raise PlatformError("the server did not say how the program ended.")
        return self._following.ended
