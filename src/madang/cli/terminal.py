"""The terminal: our lines on stderr, raw mode, window size, detach keys."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

LIVE_AFTER_S: Final = 0.15
"""Shorter waits draw nothing."""
DETACH_KEYS: Final = b"\x10\x11"
"""Ctrl-P Ctrl-Q."""


class Notes:
    """Our lines on stderr, and one live line below them where stderr is a terminal.

    The live line is erased before anything else is written, so no program's output is lost to it.
    """

    def __init__(self, *, quiet: bool = False, plain: bool = False) -> None:
        self.on_terminal = _is_terminal(2)
        self._quiet = quiet
        self._styled = self.on_terminal and not plain
        self._drawn = False
        self._begun = time.monotonic()

    def line(self, label: str, text: str) -> None:
        """One line that stays."""
        self.clear()
        self._begun = time.monotonic()
        text = "".join(char if char.isprintable() else " " for char in text)
        if not self._quiet:
            shown = f"\x1b[2m{label:<6}\x1b[0m" if self._styled else f"{label:<6}"
            _write(2, f"{shown} {text}\n".encode("utf-8", "replace"))

    def say(self, text: str) -> None:
        """One line without a label."""
        self.clear()
        if not self._quiet:
            text = "".join(char if char.isprintable() else " " for char in text)
            _write(2, f"{text}\n".encode("utf-8", "replace"))

    def error(self, text: str) -> None:
        """What went wrong: also said where nothing else of ours is."""
        quiet, self._quiet = self._quiet, False
        self.line("error", text)
        self._quiet = quiet

    def live(self, label: str, text: str) -> None:
        """Show what goes on, once it takes a moment; plain output has no such line."""
        if self._quiet or not self._styled or time.monotonic() - self._begun < LIVE_AFTER_S:
            return
        width = window(2)[1]
        shown = f"{label:<6} {text}"[: max(width - 1, 20)]
        _write(2, f"\r\x1b[2K{shown}".encode("utf-8", "replace"))
        self._drawn = True

    def clear(self) -> None:
        if self._drawn:
            _write(2, b"\r\x1b[2K")
            self._drawn = False

    def prompt(self, text: str) -> None:
        """A question; its answer is read elsewhere."""
        self.clear()
        _write(2, text.encode())


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def is_terminal(fd: int) -> bool:
    return _is_terminal(fd)


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def window(fd: int) -> tuple[int, int]:
    """Rows and columns."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return 24, 80
    return size.lines or 24, size.columns or 80


def write_all(fd: int, data: bytes) -> None:
    """Write to a descriptor that somebody else may have made non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()


def _write(fd: int, data: bytes) -> None:
    """Our own words are not worth failing for."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        write_all(fd, data)


@contextlib.contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """Hand every key to the program; the terminal is as before afterwards, whatever happens."""
    import termios
    import tty

    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def full_screen() -> Iterator[Callable[[float], bytes]]:
    """The terminal's other page. The terminal is as before afterwards, also after SIGTERM.

    Gives a function that waits some seconds for keys, and returns what was typed.
    """
    import signal

    keys = is_terminal(0)
    with contextlib.ExitStack() as stack:
        for signum in (signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, signum, signal.signal(signum, _leave))
        if keys:
            stack.enter_context(_single_keys(0))
        stack.callback(_write, 1, b"\x1b[?25h\x1b[?1049l")
        _write(1, b"\x1b[?1049h\x1b[?25l")
        yield lambda seconds: _wait_keys(seconds) if keys else _wait(seconds)


def _leave(signum: int, _frame: object) -> None:
    raise SystemExit(128 + signum)


def _wait_keys(seconds: float) -> bytes:
    return os.read(0, 64) if select.select([0], [], [], seconds)[0] else b""


def _wait(seconds: float) -> bytes:
    time.sleep(seconds)
    return b""


@contextlib.contextmanager
def _single_keys(fd: int) -> Iterator[None]:
    """Keys come one by one and are not shown; Ctrl-C still is a signal."""
    import termios
    import tty

    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class DetachKeys:
    """Finds the detach keys in what is typed."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What goes on to the program, and whether the keys were typed.

        A first detach key at the end waits for what follows it.
        """
        data = self._held + data
        before, found, _ = data.partition(DETACH_KEYS)
        if found:
            return before, True
        self._held = data[-1:] if data.endswith(DETACH_KEYS[:1]) else b""
        return data[: len(data) - len(self._held)], False
