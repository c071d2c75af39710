"""The way out of a build in a root of its own: a TCP port of the session for the agent's socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from madang.testing.roots import FakeRootRuntime
from madang.testing.sessions import PYTHON, Launcher, Sessions, sessions, spec
from madang.wire.kernel import KernelId

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the privileged launcher")

ASK = """
import socket, sys
for number in range(int(sys.argv[1])):
    link = socket.create_connection(("127.0.0.1", 3128))
    if number % 2:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
        link.sendall(b"x" * 100000)  # Leaves with a reset, what comes back unread.
    else:
        link.sendall(b"hello")
        link.shutdown(socket.SHUT_WR)
        assert link.recv(5, socket.MSG_WAITALL) == b"hello"
    link.close()
print("done")
"""


@pytest.fixture
async def rooted(launcher: Launcher) -> AsyncIterator[Sessions]:
    async with sessions(FakeRootRuntime(launcher), launcher) as found:
        yield found


@contextmanager
def echo(folder: str) -> Iterator[None]:
    """An agent's proxy that gives back what it gets."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/proxy.sock")
    os.chmod(f"{folder}/proxy.sock", 0o666)
    listener.listen(200)

    def serve(link: socket.socket) -> None:
        with link:
            try:
                while data := link.recv(65536):
                    link.sendall(data)
            except OSError:
                pass  # It left.

    def accept() -> None:
        try:
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
        except OSError:
            pass  # Closed: over.

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


async def begin(rooted: Sessions, *argv: str, build: bool = True) -> KernelId:
    asked = replace(spec(*PYTHON, *argv), build=build)
    kernel = await rooted.prepare(asked)
    with echo(f"{rooted.runtime.kernel_dir(kernel)}/service"):
        await rooted.runtime.start(kernel, asked)
        await rooted.gone(kernel)
    return kernel


async def test_clients_that_leave_end_nothing(rooted: Sessions) -> None:
    done = await rooted.outcome(await begin(rooted, ASK, "200"))
    assert (done.out, done.err) == (b"done\n", b"")


async def test_others_than_builds_have_none(rooted: Sessions) -> None:
    done = await rooted.outcome(await begin(rooted, ASK, "1", build=False))
    assert b"ConnectionRefusedError" in done.err
