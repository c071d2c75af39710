"""The command line on a real pseudo-terminal: raw mode, window, keys, questions."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from tests.cli.conftest import COMMAND, Cli

from madang.testing.patience import PATIENCE_S
from madang.wire.api import ClientOp
from madang.wire.session import SessionStatus


@dataclass
class Terminal:
    """What a person sees and types."""

    fd: int
    process: subprocess.Popen[bytes]
    seen: bytearray = field(default_factory=bytearray)

    def until(self, text: bytes, timeout_s: float = PATIENCE_S) -> bytes:
        """Read until *text* was seen."""
        give_up = time.monotonic() + timeout_s
        while text not in self.seen:
            if not self._read(give_up - time.monotonic()):
                raise AssertionError(f"{text!r} not seen, but {bytes(self.seen)!r}")
        return bytes(self.seen)

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read(PATIENCE_S):
            pass
        return self.process.wait(PATIENCE_S)

    def read_more(self) -> None:
        assert self._read(PATIENCE_S), bytes(self.seen)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.fd], [], [], max(0.0, timeout_s))[0]:
            return False
        try:
            data = os.read(self.fd, 4096)
        except OSError:
            return False
        self.seen += data
        return bool(data)


@contextmanager
def terminal(cli: Cli, *args: str, size: tuple[int, int] = (33, 101)) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    env = {"TERM": "xterm", **cli.env}
    process = subprocess.Popen(
        [*COMMAND, *args],
        cwd=cli.project,
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )
    try:
        yield Terminal(ours, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)


def test_a_program_with_a_terminal_sees_it_and_gets_every_key(cli: Cli) -> None:
    script = "stty size; tty >/dev/null && echo yes; read x; echo got $x"
    with terminal(cli, "run", "-q", "-t", "--", "sh", "-c", script) as term:
        before = termios.tcgetattr(term.fd)
        term.until(b"33 101\r\nyes")
        term.type(b"word\r")
        code_seen = term.until(b"got word")
        assert term.process.wait(PATIENCE_S) == 0
        assert termios.tcgetattr(term.fd) == before

    assert b"got word" in code_seen


def test_ctrl_c_goes_to_a_program_that_has_the_terminal(cli: Cli) -> None:
    script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    with terminal(cli, "run", "-q", "-t", "--", "sh", "-c", script) as term:
        term.until(b"ready")
        term.type(b"\x03")
        term.until(b"caught")
        assert term.process.wait(PATIENCE_S) == 5


def test_a_new_window_size_reaches_the_program(cli: Cli) -> None:
    script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done"
    with terminal(cli, "run", "-q", "-t", "--", "sh", "-c", script) as term:
        term.until(b"ready")
        termios.tcsetwinsize(term.fd, (40, 120))
        os.kill(term.process.pid, signal.SIGWINCH)
        term.until(b"40 120")
        assert term.process.wait(PATIENCE_S) == 0


def test_detach_keys_leave_the_program_and_attach_finds_it(cli: Cli) -> None:
    script = "echo ready; read x; echo got $x"
    with terminal(cli, "run", "-t", "--name", "calm-otter", "--", "sh", "-c", script) as term:
        before = termios.tcgetattr(term.fd)
        term.until(b"ready")
        term.type(b"\x10\x11")
        term.until(b"calm-otter goes on")
        assert term.process.wait(PATIENCE_S) == 119
        assert termios.tcgetattr(term.fd) == before
    with terminal(cli, "attach", "--all", "calm-otter") as term:
        term.until(b"ready")
        term.type(b"word\r")
        term.until(b"got word")
        assert term.process.wait(PATIENCE_S) == 0


def test_a_killed_command_gives_the_terminal_back(cli: Cli) -> None:
    with terminal(cli, "run", "-t", "--", "sh", "-c", "echo ready; sleep 30") as term:
        before = termios.tcgetattr(term.fd)
        term.until(b"ready")
        os.kill(term.process.pid, signal.SIGTERM)
        assert term.process.wait(PATIENCE_S) == 143
        assert termios.tcgetattr(term.fd) == before


def test_the_first_ctrl_c_asks_and_can_be_answered(cli: Cli) -> None:
    args = ("run", "--name", "calm-otter", "--", "sh", "-c", "echo ready; sleep 30")
    with terminal(cli, *args) as term:
        term.until(b"ready")
        os.kill(term.process.pid, signal.SIGINT)
        term.until(b"keep waiting?")
        term.type(b"\n")
        term.until(b"still waiting")
        os.kill(term.process.pid, signal.SIGINT)
        while term.until(b"keep waiting?").count(b"keep waiting?") < 2:
            term.read_more()
        term.type(b"s\n")
        term.until(b"asked for")
        term.until(b"ended")
        assert term.process.wait(PATIENCE_S) == 143

    assert cli.server.session("calm-otter").status is SessionStatus.TERMINATED


def test_the_second_ctrl_c_detaches(cli: Cli) -> None:
    args = ("run", "--name", "calm-otter", "--", "sh", "-c", "echo ready; sleep 30")
    with terminal(cli, *args) as term:
        term.until(b"ready")
        os.kill(term.process.pid, signal.SIGINT)
        term.until(b"keep waiting?")
        os.kill(term.process.pid, signal.SIGINT)
        term.until(b"calm-otter goes on")
        assert term.process.wait(PATIENCE_S) == 119

    assert cli.server.session("calm-otter").status is SessionStatus.RUNNING


def test_the_live_line_never_eats_output(cli: Cli) -> None:
    cli.server.hold.clear()
    with terminal(cli, "run", "--", "sh", "-c", "printf partial; sleep 0.3; exit 0") as term:
        term.until(b"waits")
        cli.server.hold.set()
        seen = term.until(b"done")
        assert term.process.wait(PATIENCE_S) == 0

    assert b"partial" in seen.split(b"\x1b[2K")[-1]
    assert b"partial\r\n" in seen


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"\x03", 130)])
def test_top_ends_with_q_and_ctrl_c_and_gives_the_terminal_back(
    cli: Cli, key: bytes, code: int
) -> None:
    cli.run("run", "-d", "--name", "host-owl")
    with terminal(cli, "top") as term:
        before = termios.tcgetattr(term.fd)
        term.until(b"host-owl")
        term.until(b"q quits")
        term.type(key)
        term.until(b"\x1b[?1049l")
        assert term.process.wait(PATIENCE_S) == code
        assert termios.tcgetattr(term.fd) == before


def test_a_killed_top_gives_the_terminal_back(cli: Cli) -> None:
    with terminal(cli, "top") as term:
        before = termios.tcgetattr(term.fd)
        term.until(b"No session is running")
        os.kill(term.process.pid, signal.SIGTERM)
        term.until(b"\x1b[?1049l")
        assert term.process.wait(PATIENCE_S) == 143
        assert termios.tcgetattr(term.fd) == before


def test_top_stays_within_a_small_window(cli: Cli) -> None:
    for number in range(6):
        cli.run("run", "-d", "--name", f"host-owl-{number}")
    with terminal(cli, "top", size=(5, 24)) as term:
        seen = term.until(b"more").split(b"\x1b[H")[-1]
        term.type(b"q")
        assert term.process.wait(PATIENCE_S) == 0
    rows = re.sub(rb"\x1b\[[?0-9]*[A-Za-z]", b"", seen).split(b"\r\n")
    assert len(rows) <= 5
    assert max(map(len, rows)) <= 24


def test_top_asks_no_terminal_for_what_it_can_not(cli: Cli) -> None:
    cli.env["TERM"] = "dumb"
    with terminal(cli, "top") as term:
        seen = term.until(b"No session is running")
        assert term.process.wait(PATIENCE_S) == 0
    assert b"\x1b" not in seen


def test_a_shell_has_the_terminal(cli: Cli) -> None:
    cli.run("run", "-d", "--name", "host-owl")
    with terminal(cli, "shell", "host-owl") as term:
        term.type(b"tty >/dev/null && echo is-a-$((1+1))-tty; exit 6\r")
        term.until(b"is-a-2-tty")
        assert term.process.wait(PATIENCE_S) == 6

    assert ClientOp.EXEC in [m.op for m in cli.server.messages]
