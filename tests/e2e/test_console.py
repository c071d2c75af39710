"""``madang console`` and ``madang run -i`` with a real terminal, on a real platform."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from madang.client import Client
from madang.testing.platform import MADANG, Platform
from madang.wire.session import Session, SessionSpec, SessionStatus, SizeRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]
PATIENCE_S = 60.0
_ESCAPES = re.compile(rb"\x1b\[[?0-9;]*[A-Za-z]")


class Terminal:
    """A command on a terminal of ours."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self._seen = b""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, wanted: str) -> str:
        """What is shown up to *wanted*, without escape sequences; goes on behind it."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            plain = _ESCAPES.sub(b"", self._seen).decode("utf-8", "replace").replace("\r", "")
            before, found, after = plain.partition(wanted)
            if found:
                self._seen = after.encode()
                return before + found
            assert time.monotonic() < deadline, f"{wanted!r} does not come: {plain!r}"
            ready, _, _ = select.select([self._fd], [], [], 1.0)
            if ready:
                try:
                    data = os.read(self._fd, 65536)
                except OSError:
                    data = b""
                assert data, f"ended before {wanted!r} came: {plain!r}"
                self._seen += data


@contextmanager
def terminal(platform: Platform, *arguments: str, **variables: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*MADANG, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**platform.environment, "TERM": "xterm", **variables},
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.fixture
def session(client: Client) -> Session:
    size = SizeRequest(cpu=0.5, mem_bytes=256 << 20)
    made = client.create_session(SessionSpec(size=size))
    return client.wait_session(made.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)


def test_a_console_has_all_that_a_prompt_has(platform: Platform, session: Session) -> None:
    with terminal(platform, "console", session.name) as console:
        console.until(">>> ")
        console.type("x = 20\n")
        console.until(">>> ")
        console.type("def f():\n    return x + 1\n\n")
        console.until("... ")
        console.until(">>> ")
        console.type("f()\n")
        console.until("\n21\n")
        console.type("valu\t")
        console.type("\x15input('who? ') + '!'\n")
        console.until("who? ")
        console.type("ada\n")
        console.until("'ada!'")
        console.type("f?\n")
        console.until("f()")
        console.type("1/0\n")
        console.until("ZeroDivisionError: division by zero")
        console.type("while True: pass\n\n")
        time.sleep(1.0)
        console.type("\x03")
        console.until("KeyboardInterrupt")
        console.until(">>> ")
        console.type(".history\n")
        console.until("[1] x = 20")
        console.type(".restart\n")
        console.until("restarted")
        console.type("x\n")
        console.until("NameError")
        console.until(">>> ")  # Before it, a terminal takes Ctrl-D for itself.
        console.type("\x04")
        assert console.process.wait(PATIENCE_S) == 0


def test_pictures_go_to_a_file_or_to_a_terminal_that_draws(
    platform: Platform, session: Session
) -> None:
    picture = (
        "import struct, zlib\n"
        "class P:\n"
        "    def _repr_png_(self):\n"
        "        return b'\\x89PNG\\r\\n\\x1a\\n' + struct.pack('>I4sII', 13, b'IHDR', 640, 480)\n"
        "P()\n"
    )
    done = platform.madang("console", session.name, input=picture)
    found = re.search(r"\[image 640x480; saved to (\S+)\]", done.stdout)
    assert found is not None, done.stdout + done.stderr
    with open(found[1], "rb") as file:
        assert file.read(4) == b"\x89PNG"
    with terminal(platform, "console", session.name, KITTY_WINDOW_ID="1") as console:
        console.until(">>> ")
        console.type("P()\n")
        console.until("\x1b_Ga=T,f=100,m=0;")


def test_a_pipe_is_one_cell_and_its_result_the_exit_code(
    platform: Platform, session: Session
) -> None:
    done = platform.madang("console", session.name, input="for n in range(2):\n    print(n)\n7")
    assert (done.returncode, done.stdout) == (0, "0\n1\n7\n")
    done = platform.madang("console", session.name, input="1/0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_run_i_is_a_session_with_a_console_that_ends_with_it(
    platform: Platform, client: Client
) -> None:
    with terminal(platform, "run", "-i", "--no-sync", "--name", "talk", "python") as console:
        console.until(">>> ")
        console.type("open('/outputs/kept', 'w').write('kept')\n")
        console.until("\n4\n")
        console.type(".detach\n")
        assert console.process.wait(PATIENCE_S) == 0
    assert client.get_session("talk").status is SessionStatus.RUNNING
    done = platform.madang(
        "run", "-i", "--no-sync", "--no-output", "--name", "piped", input="6 * 7"
    )
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert client.wait_session("piped").status is SessionStatus.TERMINATED
