"""Rules that a guard keeps, on the real kernel: files, counts, answers; and life without it."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from madang.agent import files
from madang.agent.keepers import StdinWriter
from madang.agent.launcher import fanotify, landlock, watch
from madang.agent.launcher.keeper_guard import SILENCE_S
from madang.agent.refusals import read_refusals
from madang.agent.runtime.native import NativeRuntime
from madang.kit.codec import to_builtins
from madang.kit.policy import parse
from madang.testing.patience import PATIENCE_S, until
from madang.testing.sessions import PYTHON, Outcome, Sessions
from madang.wire.errors import Conflict, PlatformError
from madang.wire.kernel import KernelId
from madang.wire.policy import SITE, Refusal, Sandbox, merge
from madang.wire.session import Reason

needs_fanotify = pytest.mark.skipif(not fanotify.possible(), reason="takes root with fanotify")
needs_watch = pytest.mark.skipif(not watch.possible(), reason=watch.TAKES)
needs_landlock = pytest.mark.skipif(
    landlock.abi() < landlock.LEAST_ABI, reason="takes Landlock of Linux 6.2"
)


def policy(text: str) -> Sandbox:
    return merge([parse(f"version = 1\n{text}", SITE)], "site 1")


def refusals(sessions: Sessions, kernel: KernelId) -> list[Refusal]:
    """All, once the session has ended; while it runs they come later than the refusal."""
    return read_refusals(sessions.io(kernel))


async def guard(sessions: Sessions, kernel: KernelId, sandbox: Sandbox) -> list[str]:
    """Other live rules."""
    runtime = sessions.runtime
    assert isinstance(runtime, NativeRuntime)
    answer = await runtime._call("guard", kernel=str(kernel), sandbox=to_builtins(sandbox))
    later: list[str] = answer["later"]
    return later


def guards_of(sessions: Sessions, kernel: KernelId, whose: str = "guard") -> int:
    record = json.loads(Path(sessions.runtime.kernel_dir(kernel), "kernel.json").read_text())
    pid: int = record[whose]["pid"]
    return pid


@asynccontextmanager
async def typing_to(sessions: Sessions, kernel: KernelId) -> AsyncIterator[StdinWriter]:
    writer = await sessions.keepers.stdin(sessions.io(kernel))
    try:
        yield writer
    finally:
        await writer.close()


async def python(sessions: Sessions, code: str, rules: str, **more: Any) -> Outcome:
    return await sessions.python(code, sandbox=policy(rules), **more)


TRY = """
import os, sys
def attempt(path):
    try:
        os.close(os.open(path, os.O_RDONLY))
        return "passed"
    except OSError as exc:
        return exc.strerror
"""


@needs_fanotify
async def test_files_are_judged_by_what_a_path_leads_to(sessions: Sessions) -> None:
    code = (
        TRY
        + """
os.mkdir("/work/secret"); open("/tmp/x", "w").close()
os.symlink("/usr/bin/env", "/work/harmless")
print(attempt("/usr/bin/env"), attempt("/work/harmless"), attempt("/usr/../usr/bin/./env"))
print(attempt("/tmp/x"), attempt("/usr/bin/id"))
"""
    )
    kernel = await sessions.start(
        *PYTHON, code, sandbox=policy('[[files]]\ndeny = ["/usr/bin/env"]\nwhy = "no env"')
    )
    outcome = await sessions.outcome(kernel)
    refused = "Operation not permitted"

    assert outcome.out.decode().splitlines() == [f"{refused} " * 2 + refused, "passed passed"]
    found = refusals(sessions, kernel)
    assert [(r.what, r.object, r.count, r.answer) for r in found] == [
        ("open", "/usr/bin/env", 3, "EPERM")
    ]
    assert found[0].text == "open of /usr/bin/env refused by site policy, line 2 (no env)"


@needs_fanotify
async def test_execution_is_judged_apart(sessions: Sessions) -> None:
    code = (
        TRY
        + """
import subprocess
print(attempt("/usr/bin/env"))
try:
    subprocess.run(["/usr/bin/env"])
except OSError as exc:
    print(exc.strerror)
"""
    )
    rules = '[[files]]\naccess = ["execute"]\ndeny = ["/usr/bin/env"]'
    outcome = await python(sessions, code, rules)

    assert outcome.out.decode().splitlines() == ["passed", "Operation not permitted"]


@needs_fanotify
async def test_the_program_itself_is_judged(sessions: Sessions) -> None:
    outcome = await python(sessions, "", '[[files]]\ndeny = ["/usr/bin/python3*"]')

    assert outcome.code == 126
    assert "Operation not permitted" in outcome.ended.text


@needs_fanotify
async def test_rules_about_files_change_while_a_session_runs(sessions: Sessions) -> None:
    code = (
        TRY
        + """
for line in sys.stdin:
    print(attempt("/usr/bin/env"), attempt("/usr/bin/id"), flush=True)
"""
    )
    first = '[[files]]\ndeny = ["/usr/bin/env"]'
    kernel = await sessions.start(*PYTHON, code, sandbox=policy(first), stdin=True)
    async with typing_to(sessions, kernel) as stdin:
        await stdin.write(b"1\n")
        assert await sessions.until(kernel, b"\n") == b"Operation not permitted passed\n"
        assert await guard(sessions, kernel, policy('[[files]]\ndeny = ["/usr/bin/id"]')) == []
        await stdin.write(b"2\n")
        assert b"passed Operation" in await sessions.until(kernel, b"passed Operation")
        await guard(sessions, kernel, Sandbox())
        await stdin.write(b"3\n")
        assert b"passed passed" in await sessions.until(kernel, b"passed passed")


@needs_fanotify
async def test_a_folder_of_which_no_rule_spoke_is_asked_about_when_one_does(
    sessions: Sessions,
) -> None:
    code = (
        TRY
        + """
import textwrap
for line in sys.stdin:
    print(attempt(os.__file__), attempt(textwrap.__file__), flush=True)
"""
    )
    elsewhere = policy('[[files]]\ndeny = ["/usr/bin/env"]')
    here = policy('[[files]]\ndeny = ["/usr/**/textwrap.py"]')
    refused = b"passed Operation not permitted\n"
    kernel = await sessions.start(*PYTHON, code, sandbox=elsewhere, stdin=True)
    async with typing_to(sessions, kernel) as stdin:
        said = b""
        for rules, found in ((here, refused), (elsewhere, b"passed passed\n")) * 2:
            await guard(sessions, kernel, rules)
            await stdin.write(b"1\n" * 3)
            said += found * 3
            assert await sessions.until(kernel, said) == said


@needs_watch
async def test_calls_that_a_session_makes_are_written_down_and_no_others(
    sessions: Sessions,
) -> None:
    code = """
import os
os.sched_yield()
print(os.spawnvp(os.P_WAIT, "/usr/bin/true", ["true"]))
for line in iter(input, ""):
    os.getpgrp()
"""
    kernel = await sessions.start(
        *PYTHON, code, sandbox=policy('[[watch]]\nof = "calls"'), stdin=True
    )
    await sessions.until(kernel, b"0\n")
    async with typing_to(sessions, kernel) as stdin:
        await guard(sessions, kernel, Sandbox())
        first = {r.object for r in refusals(sessions, kernel) if r.what == "call"}
        await stdin.write(b"1\n\n")
        await sessions.outcome(kernel)

    found = {r.object for r in refusals(sessions, kernel) if r.what == "call"}
    assert found >= first
    assert {"execve", "openat", "sched_yield", "wait4", "exit_group"} <= found
    assert not {"ptrace", "mount", "getpgrp", "socket"} & found


@needs_landlock
async def test_files_are_changed_only_where_a_rule_lets_them(sessions: Sessions) -> None:
    code = """
import os
def attempt(function, *arguments):
    try:
        function(*arguments)
        return "passed"
    except OSError as exc:
        return exc.strerror
print(attempt(open, "/outputs/x", "w"), attempt(open, "/work/x", "w"),
      attempt(os.mkdir, "/home/user/x"), attempt(os.rename, "/outputs/x", "/outputs/y"),
      attempt(open, "/dev/null", "w"), attempt(os.truncate, "/work/before", 0), sep="|")
"""
    asked = policy('[[write]]\nonly = ["/outputs", "/tmp"]\n[[write]]\nonly = ["/outputs"]')
    outcome = await sessions.python(code, sandbox=asked)

    words = outcome.out.decode().strip().split("|")
    refused, missing = "Permission denied", "No such file or directory"
    assert words == ["passed", refused, refused, "passed", "passed", missing]


async def test_executions_are_counted(sessions: Sessions) -> None:
    code = """
import subprocess
for number in range(5):
    try:
        subprocess.run(["/bin/true"]); print("ran")
    except OSError as exc:
        print(exc.strerror)
"""
    kernel = await sessions.start(
        *PYTHON, code, sandbox=policy('[[count]]\nof = "exec"\nlimit = 3\nwith = "EAGAIN"')
    )
    outcome = await sessions.outcome(kernel)

    refused = "Resource temporarily unavailable"
    assert outcome.out.decode().splitlines() == ["ran", "ran", refused, refused, refused]
    assert [(r.what, r.object, r.count) for r in refusals(sessions, kernel)] == [
        ("exec", "more than 3", 3)
    ]


async def test_threads_are_no_forks_and_a_kill_is_one(sessions: Sessions) -> None:
    code = """
import os, threading
for _ in range(20):
    t = threading.Thread(target=int); t.start(); t.join()
print("threads", flush=True)
if os.fork() == 0:
    os._exit(0)
os.wait(); print("forked", flush=True)
os.fork()
print("never")
"""
    outcome = await python(sessions, code, '[[count]]\nof = "fork"\nlimit = 2\nwith = "kill"')

    assert outcome.out.decode().splitlines() == ["threads", "forked"]
    assert outcome.ended.signal == signal.SIGKILL


async def test_calls_say_what_a_rule_makes_them_say(sessions: Sessions) -> None:
    code = """
import os
u = os.uname()
print(u.nodename, u.release, u.sysname, len(os.sched_getaffinity(0)), os.cpu_count())
import ctypes
info = (ctypes.c_uint64 * 20)()
assert ctypes.CDLL(None).sysinfo(info) == 0
print(info[4], info[0] > 0)
"""
    rules = """
[[answer]]
call = "uname"
nodename = "box"
release = "9.9"
[[answer]]
call = "sched_getaffinity"
cpus = 7
[[answer]]
call = "sysinfo"
mem_bytes = 123456789
"""
    outcome = await python(sessions, code, rules)

    first, second = outcome.out.decode().splitlines()
    assert first.split()[:4] == ["box", "9.9", "Linux", "7"]
    assert second == "123456789 True"


async def test_a_rule_that_the_filter_does_not_hand_over_counts_later(sessions: Sessions) -> None:
    kernel = await sessions.start(
        "/bin/sleep", "60", sandbox=policy("[[count]]\nof='exec'\nlimit=9")
    )
    more = policy("[[count]]\nof='exec'\nlimit=5\n[[count]]\nof='open'\nlimit=5")

    assert await guard(sessions, kernel, more) == ["site line 5"]
    await sessions.runtime.kill(kernel)
    await sessions.outcome(kernel)
    with pytest.raises(Conflict):
        await guard(sessions, kernel, more)


@needs_fanotify
async def test_a_session_without_rules_gets_a_guard_when_it_needs_one(sessions: Sessions) -> None:
    code = (
        TRY
        + """
for line in sys.stdin:
    print(attempt("/usr/bin/env"), flush=True)
"""
    )
    kernel = await sessions.start(*PYTHON, code, stdin=True)
    async with typing_to(sessions, kernel) as stdin:
        await stdin.write(b"1\n")
        await sessions.until(kernel, b"passed\n")
        assert await guard(sessions, kernel, policy('[[files]]\ndeny = ["/usr/bin/env"]')) == []
        await stdin.write(b"2\n")
        await sessions.until(kernel, b"not permitted\n")
    await until(lambda: [r.count for r in refusals(sessions, kernel)], lambda seen: seen == [1])


@needs_fanotify
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_session_whose_guard_is_lost_is_stopped_before_an_open_passes(
    sessions: Sessions, number: signal.Signals
) -> None:
    code = (
        TRY
        + """
print("up", flush=True)
while attempt("/usr/bin/env") != "passed":
    pass
open("/outputs/leaked", "w").close()
"""
    )
    rules = policy('[[files]]\ndeny = ["/usr/bin/env"]')
    kernel = await sessions.start(*PYTHON, code, sandbox=rules)
    await sessions.until(kernel, b"up")
    os.kill(guards_of(sessions, kernel), number)
    outcome = await sessions.outcome(kernel)

    assert outcome.ended.reason is Reason.GUARD
    assert "its guard was lost" in outcome.ended.text
    assert not outcome.ended.has_outputs


@needs_fanotify
async def test_a_guard_outlives_the_launcher(own_sessions: Sessions) -> None:
    sessions = own_sessions
    launcher = sessions.launcher
    assert launcher is not None
    code = (
        TRY
        + """
for line in sys.stdin:
    print(attempt("/usr/bin/env"), attempt("/usr/bin/id"), flush=True)
"""
    )
    rules = policy('[[files]]\ndeny = ["/usr/bin/env"]')
    kernel = await sessions.start(*PYTHON, code, sandbox=rules, stdin=True)
    launcher.kill()
    launcher.start()
    async with typing_to(sessions, kernel) as stdin:
        await stdin.write(b"1\n")
        await sessions.until(kernel, b"Operation not permitted passed\n")
        await guard(sessions, kernel, policy('[[files]]\ndeny = ["/usr/bin/id"]'))
        await stdin.write(b"2\n")
        await sessions.until(kernel, b"passed Operation not permitted\n")
    launcher.kill()
    os.kill(guards_of(sessions, kernel), signal.SIGKILL)
    launcher.start()
    assert (await sessions.outcome(kernel)).ended.reason is Reason.GUARD


@needs_fanotify
@pytest.mark.timeout(240)
async def test_a_session_whose_guard_hangs_is_stopped_and_nothing_passes_meanwhile(
    sessions: Sessions,
) -> None:
    code = (
        TRY
        + """
print("up", flush=True)
input()
attempt("/usr/bin/env")
open("/outputs/leaked", "w").close()
"""
    )
    kernel = await sessions.start(
        *PYTHON, code, sandbox=policy('[[files]]\ndeny = ["/usr/bin/env"]'), stdin=True
    )
    await sessions.until(kernel, b"up")
    hung = os.pidfd_open(guards_of(sessions, kernel))
    try:
        signal.pidfd_send_signal(hung, signal.SIGSTOP)
        began = time.monotonic()
        async with typing_to(sessions, kernel) as stdin:
            await stdin.write(b"1\n")
        outcome = await sessions.outcome(kernel, patience_s=SILENCE_S + PATIENCE_S)

        assert outcome.ended.reason is Reason.GUARD
        assert SILENCE_S <= time.monotonic() - began <= SILENCE_S + PATIENCE_S
        assert not outcome.ended.has_outputs
        assert select.select([hung], [], [], PATIENCE_S)[0], "it is still there"
    finally:
        os.close(hung)


async def test_a_late_guard_that_can_not_keep_the_rules_is_dismissed_and_the_session_goes_on(
    own_sessions: Sessions,
) -> None:
    sessions = own_sessions
    launcher = sessions.launcher
    assert launcher is not None
    code = "for line in iter(input, ''):\n    print(line, flush=True)"
    walls = policy("[[connect]]\ndeny = ['10.0.0.0/8']")
    kernel = await sessions.start(*PYTHON, code, stdin=True)
    path = Path(sessions.runtime.kernel_dir(kernel), "kernel.json")
    before = path.read_text()
    record = json.loads(before)
    group = record["group"]
    group["paths"] = {name: f"{at}/gone" for name, at in group["paths"].items()}
    launcher.kill()
    path.write_text(json.dumps(record))
    launcher.start()
    with pytest.raises(PlatformError, match="rules about addresses take root"):
        await guard(sessions, kernel, walls)
    launcher.kill()
    path.write_text(before)
    launcher.start()
    async with typing_to(sessions, kernel) as stdin:
        await stdin.write(b"still here\n")
        await sessions.until(kernel, b"still here\n")
        assert await guard(sessions, kernel, walls) == []
        await stdin.write(b"\n")
    assert (await sessions.outcome(kernel)).code == 0


async def test_a_guard_leaves_with_its_session(sessions: Sessions) -> None:
    rules = policy("[[count]]\nof='exec'\nlimit=9")
    kernel = await sessions.start("/bin/sleep", "60", sandbox=rules)
    pidfd = os.pidfd_open(guards_of(sessions, kernel))
    try:
        await sessions.runtime.kill(kernel)
        await sessions.outcome(kernel)
        assert select.select([pidfd], [], [], PATIENCE_S)[0]
    finally:
        os.close(pidfd)


@needs_fanotify
async def test_nothing_passes_when_the_keeper_is_killed(sessions: Sessions) -> None:
    code = (
        TRY
        + """
print("up", flush=True)
while attempt("/usr/bin/env") != "passed":
    pass
open("/outputs/leaked", "w").close()
"""
    )
    rules = policy('[[files]]\ndeny = ["/usr/bin/env"]')
    kernel = await sessions.start(*PYTHON, code, sandbox=rules)
    await sessions.until(kernel, b"up")
    fds = [os.pidfd_open(guards_of(sessions, kernel, whose)) for whose in ("guard", "init")]
    try:
        os.kill(guards_of(sessions, kernel, "keeper"), signal.SIGKILL)
        for fd in fds:
            assert select.select([fd], [], [], PATIENCE_S)[0]
    finally:
        for fd in fds:
            os.close(fd)
    async with aclosing(files.list_files(await sessions.runtime.files(kernel), "/outputs")) as left:
        assert [entry.path async for entry in left] == []
    await sessions.runtime.settle(kernel)
