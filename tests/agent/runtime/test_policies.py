"""Sandbox policies in real sessions: what is refused, what still works, what they can't do."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from madang.agent.launcher import seccomp
from madang.agent.launcher.offers import OTHER_NUMBERS, OWN_CALLS
from madang.agent.runtime.process import ProcessRuntime
from madang.kit.policy import parse
from madang.testing.sessions import (
    PYTHON,
    ChosenRuntime,
    Launcher,
    Outcome,
    Sessions,
    choices,
    open_launcher,
    spec,
)
from madang.testing.sessions import sessions as open_sessions
from madang.wire.errors import PolicyInvalid, PolicyUnkept
from madang.wire.kernel import RUNSC, ExecSpec, KernelId
from madang.wire.policy import SESSION, SITE, Sandbox, merge
from madang.wire.session import Reason
from madang.wire.syscalls import numbers

IS_ROOT = os.geteuid() == 0
ORDINARY = 2_000_074_000
NUMBERS = numbers(platform.machine())
ASK = f"""
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.argtypes = [ctypes.c_long] + [ctypes.c_ulong] * 6
numbers = {NUMBERS}
def code(name, *arguments):
    ctypes.set_errno(0)
    libc.syscall(numbers[name], *[a & (2**64 - 1) for a in (*arguments, *[0] * 6)][:6])
    return ctypes.get_errno()
"""
SECCOMP_LOGS = "log" in seccomp._words(seccomp.LOGGED)


def session_policy(text: str) -> Sandbox:
    return merge([parse(f"version = 1\n{text}", SESSION)], label="session")


@pytest.fixture(scope="module")
def launcher(docker_socket: str) -> Iterator[Launcher]:
    with open_launcher(docker_socket=docker_socket) as found:
        yield found


@pytest.fixture(params=choices())
async def sessions(launcher: Launcher, request: pytest.FixtureRequest) -> AsyncIterator[Sessions]:
    async with open_sessions(ChosenRuntime(launcher, request.param), launcher) as found:
        yield found


async def ask(sessions: Sessions, text: str, code: str) -> Outcome:
    return await sessions.python(ASK + code, sandbox=session_policy(text))


async def test_a_refused_call_fails_with_the_error_of_its_rule(sessions: Sessions) -> None:
    text = "[[deny]]\ncalls = ['socketpair', 'kcmp']\nwith = 'EACCES'"
    done = await ask(sessions, text, "print(code('socketpair', 1, 1), code('mount'), code('kcmp'))")
    assert done.out == b"13 1 13\n", done.err


async def test_without_a_policy_the_base_alone_holds(sessions: Sessions) -> None:
    done = await sessions.python(ASK + "print(code('socketpair', 1, 1), code('mount'))")
    assert done.out.split()[1] == b"1"
    assert done.out.split()[0] != b"13"


async def test_arguments_are_checked_whole_where_it_was_asked(sessions: Sessions) -> None:
    text = (
        "[[check]]\ncalls = ['prctl']\nargument = 0\nallow = [3]\nwith = 'EXDEV'\nwide = true\n"
        "[[check]]\ncalls = ['socket']\nargument = 1\ndeny_bits = 2\nwith = 'EXDEV'\n"
        "when_argument = 0\nwhen = ['AF_INET']"
    )
    code = (
        "print(code('prctl', 3), code('prctl', 4), code('prctl', 3 + (1 << 32)),"
        " code('socket', 2, 2), code('socket', 2, 1), code('socket', 1, 2))"
    )
    assert (await ask(sessions, text, code)).out == b"0 18 18 18 0 0\n"


async def test_threads_children_and_their_programs_have_it_too(sessions: Sessions) -> None:
    code = """
import os, subprocess, threading
found = []
thread = threading.Thread(target=lambda: found.append(code('kcmp')))
thread.start(); thread.join()
pid = os.fork()
if pid == 0:
    os._exit(code('kcmp'))
found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
script = "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall(%d); "
script = script % numbers['kcmp'] + "print(ctypes.get_errno())"
found.append(int(subprocess.check_output(["/usr/bin/python3", "-ISc", script])))
print(found)
"""
    done = await ask(sessions, "[[deny]]\ncalls = ['kcmp']\nwith = 'EXDEV'", code)
    assert done.out == b"[18, 18, 18]\n", done.err


async def test_it_can_not_be_taken_off_from_inside(sessions: Sessions) -> None:
    code = f"""
import struct
allow = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))
header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 1, ctypes.addressof(allow)))
print(code('prctl', 22, 2, ctypes.addressof(header)), code('prctl', 22, 0), code('kcmp'))
with open("/proc/self/status") as file:
    print(next(line for line in file if line.startswith("Seccomp:")).split()[1])
sys.stdout.flush()
other = {0x40000000 | NUMBERS["kcmp"]}
ctypes.set_errno(0); libc.syscall(other, 0, 0, 0, 0, 0, 0); print(ctypes.get_errno())
"""
    done = await ask(sessions, "[[deny]]\ncalls = ['kcmp']\nwith = 'EXDEV'", code)
    if sessions.lacks(OTHER_NUMBERS):
        assert (done.out, done.ended.signal) == (b"0 22 18\n2\n", signal.SIGSYS)
    else:
        assert done.out == b"0 22 18\n2\n38\n", done.err


@pytest.mark.parametrize("way", ["ld.so", "memfd", "script"])
async def test_another_way_to_execute_does_not_lose_it(sessions: Sessions, way: str) -> None:
    script = f"import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall({NUMBERS['kcmp']})"
    script += "; print(ctypes.get_errno())"
    code = f"""
import glob, os, shutil
python, arguments = os.path.realpath("/usr/bin/python3"), ["python3", "-ISc", {script!r}]
sys.stdout.flush()
if {way!r} == "ld.so":
    loader = (glob.glob("/lib64/ld-linux*") + glob.glob("/lib/ld-linux*"))[0]
    os.execv(loader, [loader, python, *arguments[1:]])
elif {way!r} == "memfd":
    fd = os.memfd_create("x", 0)
    with open(python, "rb") as source, os.fdopen(fd, "wb", closefd=False) as target:
        shutil.copyfileobj(source, target)
    os.execve(fd, arguments, os.environ)
else:
    with open("/work/run", "w") as file:
        file.write("#!/usr/bin/python3 -IS\\n" + {script!r} + "\\n")
    os.chmod("/work/run", 0o755)
    os.link("/work/run", "/work/other")
    os.execv("/work/other", ["other"])
"""
    done = await ask(sessions, "[[deny]]\ncalls = ['kcmp']\nwith = 'EXDEV'", code)
    assert done.out == b"18\n", done.err


RACE = """
import threading, time
flag = ctypes.c_uint(1)
stop = False
def flip():
    while not stop:
        flag.value = 2
        flag.value = 1
thread = threading.Thread(target=flip); thread.start()
gained, end = 0, time.monotonic() + 5
for _ in range(20000):
    if time.monotonic() > end: break
    ctypes.set_errno(0)
    fd = libc.syscall(numbers['socket'], flag.value, 1, 0, 0, 0, 0)
    if fd >= 0:
        family = __import__('socket').socket(fileno=fd).family
        gained += family == 2
stop = True
thread.join()
print(gained)
"""


async def test_a_race_between_threads_gains_nothing(sessions: Sessions) -> None:
    """Arguments come to the filter in registers: there is nothing to change after the look."""
    text = "[[check]]\ncalls = ['socket']\nargument = 0\nallow = ['AF_UNIX']"
    done = await ask(sessions, text, RACE)
    assert done.out == b"0\n", done.err


async def test_a_killing_rule_ends_the_program_and_is_named(sessions: Sessions) -> None:
    done = await ask(sessions, "\n[[deny]]\ncalls = ['kcmp']\nwith = 'kill'", "code('kcmp')")
    assert (done.ended.reason, done.ended.signal, done.code) == (Reason.SIGNAL, 31, 159)
    assert "the sandbox policy kills for kcmp (session line 3)" in done.ended.text


@pytest.mark.skipif(not SECCOMP_LOGS, reason="this kernel logs no system calls")
async def test_a_logging_rule_lets_it_pass(sessions: Sessions) -> None:
    rule, code = "[[deny]]\ncalls = ['kcmp']\nwith = 'log'", "print(code('kcmp') != 1)"
    if sessions.chosen == RUNSC:
        with pytest.raises(PolicyUnkept, match=r"session line 2.*gVisor"):
            await ask(sessions, rule, code)
        return
    assert (await ask(sessions, rule, code)).out == b"True\n"


def only(sessions: Sessions) -> str:
    """Nothing but what every program needs, and what the runtime itself does."""
    calls = list(OWN_CALLS.get(sessions.chosen, ()))
    return f"[[only]]\ncalls = {calls}\nwith = 'EPERM'"


async def test_the_needed_calls_are_enough_for_a_session(sessions: Sessions) -> None:
    """Programs, pipes, terminals, signals, further programs, stopping."""
    strict = session_policy(only(sessions))
    done = await sessions.run("/bin/sh", "-c", "cat /etc/hostname; exit 5", sandbox=strict)
    assert (done.code, done.err) == (5, b"")
    terminal = await sessions.run("/bin/sh", "-c", "test -t 1 && echo yes", tty=True,
                                  sandbox=strict)  # fmt: skip
    assert b"yes" in terminal.out
    kernel = await sessions.start("/bin/cat", stdin=True, sandbox=strict)
    await sessions.runtime.exec(kernel, "e1", ExecSpec(argv=("/bin/echo", "more")))
    await sessions.keepers.stop(sessions.io(kernel), reason="user", text="", grace_s=20)
    assert (await sessions.outcome(kernel)).ended.signal == 15


async def test_with_only_the_needed_calls_python_has_no_sockets(sessions: Sessions) -> None:
    done = await ask(
        sessions, only(sessions), "print(code('socket', 1, 1), code('kcmp'), code('mount'))"
    )
    assert done.out == b"1 1 1\n", done.err


async def test_a_policy_that_refuses_what_the_runtime_does_is_refused(sessions: Sessions) -> None:
    if sessions.chosen not in OWN_CALLS:
        pytest.skip(f"{sessions.chosen} does nothing under the session's filter")
    with pytest.raises(PolicyInvalid, match=OWN_CALLS[sessions.chosen][0]):
        await sessions.start("/bin/true", sandbox=session_policy("[[only]]\ncalls = []"))


async def test_exec_has_the_policy_of_its_session(sessions: Sessions) -> None:
    kernel = await sessions.start(
        "/bin/sleep", "1000", sandbox=session_policy("[[deny]]\ncalls = ['kcmp']\nwith = 'EXDEV'")
    )
    argv = ("/usr/bin/python3", "-I", "-S", "-c", ASK + "sys.exit(code('kcmp'))")
    assert (await sessions.exec(kernel, "e1", *argv)).code == 18


async def test_what_this_machine_does_not_widen_does_not_start(sessions: Sessions) -> None:
    wide = merge([parse("version = 1\nwiden = ['perf']", SITE)])
    with pytest.raises(PolicyInvalid, match=r"sandbox\.widen"):
        await sessions.start("/bin/true", sandbox=wide)


async def test_a_session_tells_its_policy(sessions: Sessions) -> None:
    asked = spec("true", sandbox=session_policy("[[deny]]\ncalls = ['kcmp']"))
    kernel = KernelId("0123456789policy", 1)
    sessions.kernels.append(kernel)
    prepared = await sessions.runtime.prepare(kernel, asked)
    assert prepared.enforced["policy"] == "session"
    assert prepared.warnings == ()


async def test_what_runs_keeps_its_policy_and_its_name(sessions: Sessions) -> None:
    """A changed policy reaches only what starts later, also when a start is asked for again."""
    text = "[[deny]]\ncalls = ['kcmp']\nwith = 'EXDEV'"
    kernel = await sessions.start("/bin/sleep", "1000", sandbox=session_policy(text))
    later = spec("true", sandbox=Sandbox(broken="line 1: unreadable", label="site 2"))

    again = await sessions.runtime.prepare(kernel, later)
    await sessions.runtime.start(kernel, later)

    assert again.enforced["policy"] == "session"
    found = next(each for each in await sessions.runtime.adopt() if each.kernel == kernel)
    assert found.enforced["policy"] == "session"
    done = await sessions.exec(kernel, "e1", *PYTHON, ASK + "sys.exit(code('kcmp'))")
    assert done.code == 18


async def test_a_text_that_can_not_be_read_starts_nothing(sessions: Sessions) -> None:
    with pytest.raises(PolicyInvalid, match="line 1: unreadable"):
        await sessions.start("/bin/true", sandbox=Sandbox(broken="line 1: unreadable"))


async def test_the_runtime_without_isolation_takes_no_policy(tmp_path: object) -> None:
    runtime = ProcessRuntime(str(tmp_path))
    asked = spec("true", sandbox=session_policy("[[deny]]\ncalls = ['kcmp']"))
    with pytest.raises(PolicyUnkept, match="use `native`"):
        await runtime.prepare(KernelId("0123456789abcdef", 1), asked)
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user's run is this one")
@pytest.mark.timeout(200)
def test_an_ordinary_user_s_launcher_keeps_policies_too() -> None:
    folder = Path(tempfile.mkdtemp(prefix="madang-rootless-"))
    try:
        os.chown(folder, ORDINARY, ORDINARY)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "--basetemp", str(folder / "pytest"), "-rs"],
            user=ORDINARY, group=ORDINARY, extra_groups=[], timeout=190, capture_output=True,
            env={**os.environ, "HOME": str(folder)}, text=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
