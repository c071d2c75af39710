"""One program seen from the keeper: its output, its input, who listens, how it ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import struct
import termios
import time
from dataclasses import asdict
from typing import Final

from madang.agent.launcher.clients import Client
from madang.agent.launcher.output import Log
from madang.wire.log import MAX_DATA, Stream
from madang.wire.session import Ended

SOCKET: Final = "keeper.sock"
ENDED: Final = "ended.json"
CLAIMED: Final = "claimed"
"""There from before the program can have run; becomes ``ended.json``, for which it holds room on
the disk."""
_ENDED_BYTES: Final = 16 * 1024
_READS_PER_TURN: Final = 16
_STDIN_BUFFER: Final = 256 * 1024
_END_OF_INPUT: Final = b"\x04"
"""What a terminal takes for the end."""


class Program:
    def __init__(self, name: str, folder: str, log_limit_bytes: int) -> None:
        os.makedirs(folder, 0o700, exist_ok=True)
        _claim(f"{folder}/{CLAIMED}")
        self.name = name
        self.folder = folder
        self.log = Log(f"{folder}/log", log_limit_bytes)
        self.listener = _listen(folder)
        self.clients: dict[int, Client] = {}
        self.outputs: dict[int, int] = {}
        """Descriptor → stream."""
        self.stdin: int | None = None
        self.tty = False
        self.known = False
        """Whether the init has told of it; before, it can't have run."""
        self.status: int | None = None
        self.exited_at: float | None = None
        """Monotonic."""
        self.failure: tuple[int, str] | None = None
        self.started_at = time.time()
        self.started_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.ended = False
        self._input = bytearray()
        self._input_ended = False

    def connect(self, fds: list[int], *, tty: bool) -> None:
        """Take our ends of the program's pipes, or of its terminal."""
        for fd in fds:
            os.set_blocking(fd, False)
        self.known = True
        self.tty = tty
        self.outputs = {fds[0]: Stream.STDOUT}
        if tty:
            self.stdin = fds[0]
        else:
            self.outputs[fds[1]] = Stream.STDERR
            self.stdin = fds[2] if len(fds) > 2 else None

    def read(self, fd: int) -> None:
        """Take output in; forget the descriptor at its end."""
        stream = self.outputs[fd]
        for _ in range(_READS_PER_TURN):
            try:
                data = os.read(fd, MAX_DATA)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno != errno.EIO:  # EIO: the last program has left the terminal.
                    raise
                data = b""
            if not data:
                self.close_output(fd)
                return
            self.log.append(stream, data)

    def drain(self) -> None:
        """Read what is left after all writers are gone."""
        for fd in list(self.outputs):
            before = -1
            while fd in self.outputs and before != self.log.end + self.log.dropped_bytes:
                before = self.log.end + self.log.dropped_bytes
                self.read(fd)
            if fd in self.outputs:
                self.close_output(fd)

    def close_output(self, fd: int) -> None:
        del self.outputs[fd]
        if fd == self.stdin:
            self.stdin = None
        os.close(fd)

    @property
    def takes_input(self) -> bool:
        """Whether there is room for more; else clients wait."""
        return len(self._input) < _STDIN_BUFFER

    @property
    def has_input(self) -> bool:
        return self.stdin is not None and bool(self._input)

    def feed(self, data: bytes) -> None:
        if self.stdin is not None and not self._input_ended:
            self._input += data
            self.write_input()

    def end_input(self) -> None:
        """No more will come; what was fed before still reaches the program."""
        if self.tty:
            self.feed(_END_OF_INPUT)
            return
        self._input_ended = True
        self.write_input()

    def write_input(self) -> None:
        if self.stdin is None:
            self._input.clear()
            return
        try:
            while self._input:
                del self._input[: os.write(self.stdin, self._input[:MAX_DATA])]
        except BlockingIOError:
            return
        except OSError:  # The program closed its stdin.
            self._input.clear()
            self._input_ended = not self.tty
        if self._input_ended:
            self.close_input()

    def close_input(self) -> None:
        if self.stdin is not None and self.stdin not in self.outputs:
            os.close(self.stdin)
            self.stdin = None

    def resize(self, rows: int, cols: int) -> None:
        if self.tty and self.stdin is not None:
            size = struct.pack("HHHH", rows, cols, 0, 0)
            fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, size)

    def tell_watchers(self) -> None:
        for client in self.clients.values():
            if client.watching:
                client.tell_end(self.log.end)

    def tell_stopping(self) -> None:
        for client in self.clients.values():
            if client.watching:
                client.tell({"stopping": True})

    def finish(self, ended: Ended) -> None:
        """Write down how it ended, then tell those who watch."""
        for fd in list(self.outputs):
            self.close_output(fd)
        self.close_input()
        self.log.close()
        self.ended = True
        _write_ended(self.folder, ended)
        for client in self.clients.values():
            if client.watching:
                client.told_end = self.log.end
                client.tell({"end": self.log.end})
                client.tell({"ended": True})
            client.close()
        self.clients.clear()
        self.listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.folder}/{SOCKET}")


def _claim(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(fd, 0, _ENDED_BYTES)
    except OSError as exc:
        if exc.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
            raise
    finally:
        os.close(fd)


def _write_ended(folder: str, ended: Ended) -> None:
    """Whole or not at all, on disk when this returns, also where the disk is full."""
    data = json.dumps(asdict(ended)).encode()
    fd = os.open(f"{folder}/{CLAIMED}", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(f"{folder}/{CLAIMED}", f"{folder}/{ENDED}")


def _listen(folder: str) -> socket.socket:
    """Bound by way of a descriptor: a socket's path has at most 107 bytes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{SOCKET}")
    here = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    old_mask = os.umask(stat.S_IRWXG | stat.S_IRWXO | stat.S_IXUSR)
    try:
        listener.bind(f"/proc/self/fd/{here}/{SOCKET}")
        listener.listen(64)
    finally:
        os.umask(old_mask)
        os.close(here)
    return listener
