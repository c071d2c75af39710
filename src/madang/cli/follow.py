"""Following a program from the terminal: its output out, our keys and signals in.

Ctrl-C: with a terminal the first one asks (stop, detach, keep waiting), the second detaches.
Without a terminal SIGINT detaches, like SIGTERM and SIGHUP always do; every way out says that the
session goes on and how to end it. With a pseudo-terminal (``-t``) keys belong to the program, and
Ctrl-P Ctrl-Q detaches. For ``exec``, which can't be attached to again, Ctrl-C goes to the program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from madang.cli.terminal import DetachKeys, Notes, is_terminal, raw_mode, window, write_all
from madang.client.events import StreamEvent
from madang.client.streams import HIGH_WATER, Run, Stream
from madang.wire import exits
from madang.wire.errors import PlatformError
from madang.wire.log import LogGap, LogRecord
from madang.wire.log import Stream as LogStream
from madang.wire.policy import Refusal
from madang.wire.session import Session
from madang.wire.size import format_bytes

_CHUNK: Final = 64 * 1024
_TICK_S: Final = 0.25
"""Redraws of the live line."""
_FIRST_WORD_S: Final = 3.0
_CAUGHT: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)


def feeds_stdin(asked: bool | None) -> bool:
    """Whether our stdin goes to the program: if asked for, or if it is a pipe, file or socket."""
    if asked is not None:
        return asked
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


class Follower:
    """Moves bytes and signals until the program ends or we leave."""

    def __init__(
        self,
        stream: Stream,
        notes: Notes,
        *,
        stdin: bool,
        tty: bool,
        on_session: Callable[[Session], None] | None = None,
        on_tick: Callable[[], None] | None = None,
        stop_on_interrupt: bool = False,
    ) -> None:
        self._stream = stream
        self._notes = notes
        self._stdin = stdin
        self._raw = tty and stdin and is_terminal(0)
        self._on_session = on_session
        self._on_tick = on_tick
        self._stop_on_interrupt = stop_on_interrupt
        self._keys = DetachKeys()
        self._answer_fd: int | None = None
        self._interrupts = 0
        self._code: int | None = None
        self._line_open = False
        self._name = ""
        stream.on_break = self._broken

    def follow(self) -> int | None:
        """Until the program has ended (None), or we left it (our exit code)."""
        with _signals() as wake, raw_mode(0) if self._raw else contextlib.nullcontext():
            while self._code is None and not self._stream.finished:
                self._step(wake)
            self._take()
        self._notes.clear()
        if self._line_open and is_terminal(1) and is_terminal(2):
            write_all(1, b"\n")
        self._stream.close()
        return None if self._stream.finished and self._code is None else self._code

    def _step(self, wake: int) -> None:
        watch = {wake}
        if self._stdin and self._answer_fd != 0 and self._stream.backlog <= HIGH_WATER:
            watch.add(0)
        if self._answer_fd is not None:
            watch.add(self._answer_fd)
        ready = self._stream.pump(watch, _TICK_S if self._on_tick else None)
        self._take()
        if wake in ready:
            for number in os.read(wake, 64):
                self._signalled(number)
        if self._answer_fd is not None and self._answer_fd in ready:
            self._answered(os.read(self._answer_fd, 64))
        elif 0 in ready:
            self._typed()
        if self._on_tick is not None:
            self._on_tick()

    # Output

    def _take(self) -> None:
        for event in self._stream.take():
            self._show(event)

    def _show(self, event: StreamEvent) -> None:
        if isinstance(event, LogRecord):
            self._notes.clear()
            self._print(event)
        elif isinstance(event, LogGap):
            lost = format_bytes(event.end - event.start)
            self._notes.line("note", f"about {lost} of output are no longer kept")
        elif isinstance(event, Refusal):
            self._notes.say(f"madang: {event.text}")
        elif isinstance(event, Session):
            self._name = event.name
            if self._on_session is not None:
                self._on_session(event)

    def _print(self, record: LogRecord) -> None:
        try:
            write_all(2 if record.stream is LogStream.STDERR else 1, record.data)
        except BrokenPipeError:
            self._leave(exits.CLOSED_PIPE, "nobody reads the output any more")
        except OSError as exc:
            if self._code is None:
                self._notes.error(f"the output can't be written here: {exc.strerror}.")
            self._leave(exits.INTERNAL, "no room for its output here")
        self._line_open = not record.data.endswith(b"\n")

    def _broken(self, reason: str) -> None:
        self._notes.line("note", f"{reason} Trying again …")

    # Input

    def _typed(self) -> None:
        data = os.read(0, _CHUNK)
        if not data:
            self._stdin = False
            self._stream.close_stdin()
            return
        leave = False
        if self._raw:
            data, leave = self._keys.feed(data)
        if data:
            self._stream.write(data)
        if leave:
            self._leave(exits.DETACHED, "detached")

    # Signals

    def _signalled(self, number: int) -> None:
        if number == signal.SIGWINCH:
            if self._raw:
                self._stream.resize(*window(0))
        elif number == signal.SIGINT:
            self._interrupts += 1
            self._interrupted()
        else:
            name = signal.Signals(number).name
            self._leave(128 + number, f"{name} came to this command")

    def _interrupted(self) -> None:
        if not isinstance(self._stream, Run):
            if self._interrupts > 2:
                self._leave(exits.INTERRUPTED, "interrupted")
            self._stream.signal(signal.SIGINT)
        elif self._stop_on_interrupt and self._interrupts == 1:
            self._stop(self._stream)
        elif self._interrupts == 1 and self._ask():
            text = (
                f"\n{self._name or 'the session'}: [s]top, [d]etach, or [Enter] to keep waiting? "
            )
            self._notes.prompt(text)
        else:
            self._leave(exits.DETACHED, "detached")

    def _ask(self) -> bool:
        """Find a terminal to ask; whether there is one."""
        if not self._notes.on_terminal:
            return False
        if is_terminal(0):
            self._answer_fd = 0
            return True
        try:
            self._answer_fd = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        return True

    def _answered(self, answer: bytes) -> None:
        if self._answer_fd:
            os.close(self._answer_fd)
        self._answer_fd = None
        choice = answer.strip()[:1].lower()
        if choice == b"s" and isinstance(self._stream, Run):
            self._stop(self._stream)
        elif choice == b"d" or not answer:
            self._leave(exits.DETACHED, "detached")
        else:
            self._interrupts = 0
            self._notes.line("note", "still waiting; Ctrl-C asks again")

    def _stop(self, run: Run) -> None:
        self._notes.line("stop", "asked for; Ctrl-C again to leave it to itself")
        try:
            run.stop()
        except PlatformError as exc:
            self._notes.line("note", exc.text)

    def _leave(self, code: int, reason: str) -> None:
        if self._code is not None:
            return
        self._code = code
        if isinstance(self._stream, Run):
            self._learn_name(self._stream)
            name = self._name
            text = f"{reason}; {name} goes on. madang attach {name} · madang stop {name}"
            if not name:
                text = f"{reason}; the server did not say yet whether there is a session: madang ps"
            end = "\r\n" if self._raw else ""
            self._notes.line("left", text + end.rstrip("\n"))

    def _learn_name(self, run: Run) -> None:
        """Who leaves before the server's first word waits for it: nothing goes on nameless."""
        give_up = time.monotonic() + _FIRST_WORD_S
        with contextlib.suppress(PlatformError):
            while not self._name and not run.finished and time.monotonic() < give_up:
                run.pump(timeout_s=0.1)
                self._take()


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A descriptor on which signals arrive as bytes, instead of what they do by default."""

    def nothing(_number: int, _frame: FrameType | None) -> None:
        """Python wakes the descriptor; a handler of its own is needed for that."""

    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {number: signal.signal(number, nothing) for number in _CAUGHT}
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)
