"""Rules about addresses in real sessions: who is refused, what is told, what changes while it runs."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from madang.agent.launcher import fence
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.kit.policy import parse
from madang.testing.sessions import Launcher, Sessions, open_launcher
from madang.testing.sessions import sessions as open_sessions
from madang.wire.kernel import KernelId
from madang.wire.policy import SESSION, Resolved, Sandbox, merge

pytestmark = pytest.mark.skipif(not fence.possible(), reason=fence.TAKES)

TRY = """
import errno, os, socket, sys
def attempt(call, *arguments):
    try:
        call(*arguments)
        return "ok"
    except OSError as exc:
        return errno.errorcode[exc.errno]
def connect(host, port, kind=socket.SOCK_STREAM):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as sock:
        return attempt(sock.connect, (host, port))
server = socket.create_server(("127.0.0.1", 0))
port = server.getsockname()[1]
"""


def policy(text: str) -> Sandbox:
    return merge([parse(f"version = 1\n{text}", SESSION)], label="session")


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as found:
        yield found


@pytest.fixture
async def sessions(launcher: Launcher) -> AsyncIterator[Sessions]:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    async with open_sessions(runtime, launcher) as found:
        yield found


def refusals(sessions: Sessions, kernel: KernelId) -> list[dict[str, Any]]:
    path = os.path.join(sessions.runtime.kernel_dir(kernel), "io", "main", "refusals")
    found = {}
    with open(path, encoding="ascii") as file:
        for line in file:
            each = json.loads(line)
            found[each["layer"], each["line"], each["what"], each["object"]] = each
    return list(found.values())


async def test_a_session_is_refused_what_its_policy_says(sessions: Sessions) -> None:
    text = "[[connect]]\ndeny = ['127.0.0.0/8']\nwith = 'ENETUNREACH'\nwhy = 'quiet'"
    code = "print(connect('127.0.0.1', port), connect('::ffff:127.0.0.1', port))"
    done = await sessions.python(TRY + code, sandbox=policy(text))

    assert done.out == b"ENETUNREACH ENETUNREACH\n", done.err
