"""Rules about addresses in real sessions: who is refused, what is told, what can change."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, Final

import pytest

from madang.agent.launcher import fence
from madang.agent.refusals import read_refusals
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.kit.policy import parse
from madang.testing.patience import until
from madang.testing.sessions import PYTHON, Launcher, Sessions, open_launcher, spec
from madang.testing.sessions import sessions as open_sessions
from madang.wire.kernel import KernelId
from madang.wire.policy import SESSION, Refusal, Resolved, Sandbox, merge

pytestmark = pytest.mark.skipif(not fence.possible(), reason=fence.TAKES)

NUMBERS: Final = itertools.count()
TRY: Final = """
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


def refusals(sessions: Sessions, kernel: KernelId) -> list[Refusal]:
    """All, once the session has ended; while it runs they come later than the refusal."""
    return read_refusals(sessions.io(kernel))


async def start(sessions: Sessions, text: str = "", **more: Any) -> KernelId:
    """A session that does nothing by itself."""
    found = policy(text)
    return await sessions.start("sleep", "1000", sandbox=replace(found, **more))


async def tried(sessions: Sessions, kernel: KernelId, code: str) -> str:
    """What a program in the session prints."""
    name = f"try{next(NUMBERS)}"
    done = await sessions.exec(kernel, name, *PYTHON, TRY + code)
    assert done.code == 0, done.err
    return done.out.decode().strip()


async def test_a_session_is_refused_what_its_policy_says(sessions: Sessions) -> None:
    text = "[[connect]]\ndeny = ['127.0.0.0/8']\nwith = 'ENETUNREACH'\nwhy = 'quiet'"
    code = "print(connect('127.0.0.1', port), connect('::ffff:127.0.0.1', port), port)"
    kernel = await sessions.start(*PYTHON, TRY + code, sandbox=policy(text))
    done = await sessions.outcome(kernel)

    *answers, port = done.out.decode().split()
    assert answers == ["ENETUNREACH", "ENETUNREACH"], done.err
    [refusal] = refusals(sessions, kernel)
    assert refusal.object == f"127.0.0.1:{port}"
    assert (refusal.count, refusal.answer) == (2, "ENETUNREACH")
    assert refusal.pid > 0
    expected = f"connect to 127.0.0.1:{port} refused by session policy, line 2 (quiet)"
    assert refusal.text == expected


async def test_rules_change_while_the_session_runs(sessions: Sessions) -> None:
    first = "[[connect]]\nonly = ['127.0.0.1']"
    kernel = await start(sessions, first)
    code = "print(connect('127.0.0.1', port), connect('192.0.2.1', 1))"
    assert await tried(sessions, kernel, code) == "ok EPERM"

    second = policy("[[connect]]\ndeny = ['127.0.0.1']\nwith = 'EACCES'")
    assert await sessions.runtime.guard(kernel, second) == ()
    assert await tried(sessions, kernel, "print(connect('127.0.0.1', port))") == "EACCES"

    await sessions.runtime.guard(kernel, policy(""))
    assert await tried(sessions, kernel, "print(connect('127.0.0.1', port))") == "ok"


async def test_a_session_that_began_without_rules_gets_some(sessions: Sessions) -> None:
    kernel = await start(sessions)
    code = "print(connect('127.0.0.1', port))"
    assert await tried(sessions, kernel, code) == "ok"

    await sessions.runtime.guard(kernel, policy("[[connect]]\ndeny = ['*']"))

    assert await tried(sessions, kernel, code) == "EPERM"


async def test_binds_are_judged(sessions: Sessions) -> None:
    kernel = await start(sessions, "[[bind]]\nonly = ['*:0', '127.0.0.1:8000-8999']")
    code = """
def bind(host, port):
    with socket.socket() as sock:
        return attempt(sock.bind, (host, port))
print(bind("127.0.0.1", 8000), bind("127.0.0.1", 9000), bind("0.0.0.0", 8000))
"""
    assert await tried(sessions, kernel, code) == "ok EPERM EPERM"


async def test_names_stand_for_what_the_agent_found(sessions: Sessions) -> None:
    names = (Resolved(name="server.test", addresses=("127.0.0.1",)),)
    text = "[[connect]]\nonly = ['server.test']"
    kernel = await start(sessions, text, names=names)
    code = "print(connect('127.0.0.1', port), connect('127.0.0.2', port))"
    assert await tried(sessions, kernel, code) == "ok EPERM"

    moved = (Resolved(name="server.test", addresses=("127.0.0.2",)),)
    await sessions.runtime.guard(kernel, replace(policy(text), names=moved))

    assert await tried(sessions, kernel, code) == "EPERM ECONNREFUSED"


async def test_a_name_without_addresses_is_told_at_the_start(sessions: Sessions) -> None:
    found = policy("[[connect]]\ndeny = ['nowhere.test']")
    kernel = KernelId("unresolved", 1)
    sessions.kernels.append(kernel)

    prepared = await sessions.runtime.prepare(kernel, spec("true", sandbox=found))

    assert prepared.warnings == (
        "policy: session line 2 refuses nothing by nowhere.test: it has no address now",
    )


async def test_what_is_only_logged_is_told_and_passes(sessions: Sessions) -> None:
    text = "[[connect]]\nonly = []\nwith = 'log'\n[[bind]]\nonly = []\nwith = 'log'"
    kernel = await sessions.start(
        *PYTHON, TRY + "print(connect('127.0.0.1', port), port)", sandbox=policy(text)
    )
    done = await sessions.outcome(kernel)

    answer, port = done.out.decode().split()
    assert answer == "ok", done.err
    told = {(each.what, each.object, each.answer) for each in refusals(sessions, kernel)}
    assert told == {("bind", "127.0.0.1:0", "log"), ("connect", f"127.0.0.1:{port}", "log")}


async def test_a_flood_of_refusals_is_counted_and_harms_nobody(sessions: Sessions) -> None:
    kernel = await start(sessions, "[[connect]]\ndeny = ['127.0.0.1']")
    code = """
import time
until, count = time.monotonic() + 1.5, 0
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while time.monotonic() < until:
    attempt(sock.connect, ("127.0.0.1", 1 + count % 3000))
    count += 1
print(count)
"""
    guard = guard_of(sessions, kernel)
    before = cpu_s(guard)
    count = int(await tried(sessions, kernel, code))
    used = cpu_s(guard) - before

    assert count > 1000
    found = await until(lambda: refusals(sessions, kernel), lambda seen: len(seen) >= 100)
    assert len(found) <= 1001
    assert used < 0.75, "the guard is slower than who floods it"
    assert await tried(sessions, kernel, "print(connect('127.0.0.1', port))") == "EPERM"


def guard_of(sessions: Sessions, kernel: KernelId) -> int:
    with open(os.path.join(sessions.runtime.kernel_dir(kernel), "kernel.json")) as file:
        pid: int = json.load(file)["guard"]["pid"]
    return pid


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
