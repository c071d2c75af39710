"""Sessions on gVisor's kernel: what of the machine they reach, signals, deaths, the gate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from madang.agent.launcher import filters, guests, gvisor, offers, registry, seccomp
from madang.agent.launcher.filters import Filters
from madang.agent.launcher.offers import Offers
from madang.agent.runtime import layout
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import (
    PYTHON,
    ChosenRuntime,
    Launcher,
    Sessions,
    open_launcher,
    spec,
)
from madang.testing.sessions import sessions as open_sessions
from madang.wire.errors import NetworkRefused, PolicyUnkept, RuntimeNotOffered
from madang.wire.kernel import RUNSC, ExecSpec, KernelId
from madang.wire.network import Network, NetworkMode
from madang.wire.policy import Act, Answer, NetRule, Rule, Sandbox
from madang.wire.session import Reason

IS_ROOT = os.geteuid() == 0
WHY_NOT = offers.find(RUNSC)[1] if IS_ROOT else offers.NEEDS_ROOT
here = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
KERNEL, GOFER, CLIENT = "runsc-sandbox", "runsc-gofer", "runsc"
ASLEEP = "echo on; sleep 1000 & wait"


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as found:
        yield found


@pytest.fixture
async def sessions(launcher: Launcher) -> AsyncIterator[Sessions]:
    async with open_sessions(ChosenRuntime(launcher, RUNSC), launcher) as found:
        yield found


def init_of(sessions: Sessions, kernel: KernelId) -> int:
    record = registry.load(sessions.runtime.kernel_dir(kernel))
    assert record is not None
    assert record.init is not None
    return record.init.pid


def parts_of(sessions: Sessions, kernel: KernelId) -> dict[str, list[int]]:
    """What the session's processes on the machine call themselves → pids; programs have no name."""
    found: dict[str, list[int]] = {}
    for pid in layout.descendants(init_of(sessions, kernel)):
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        found.setdefault(os.path.basename(name), []).append(pid)
    return found


# -- what they reach -----------------------------------------------------------------------------


@here
async def test_its_kernel_is_nobody_with_an_empty_root_and_a_filter(sessions: Sessions) -> None:
    """Whoever breaks out of gVisor's kernel is there."""
    kernel = await sessions.start("/bin/sh", "-c", ASLEEP)
    await sessions.until(kernel, b"on")
    (pid,) = parts_of(sessions, kernel)[KERNEL]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}

    assert set(status["Uid"]) == {"65534"}
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    assert {path.name for path in Path(f"/proc/{pid}/root").iterdir()} <= {"proc", "etc"}
    for namespace in ("user", "net", "mnt"):
        ours = os.readlink(f"/proc/{init_of(sessions, kernel)}/ns/{namespace}")
        assert os.readlink(f"/proc/{pid}/ns/{namespace}") != ours


@here
async def test_what_opens_files_for_it_has_none_that_programs_may_not_read(
    sessions: Sessions,
) -> None:
    """It is root: a gVisor that was broken into could ask for the machine's password hashes."""
    kernel = await sessions.start("/bin/sh", "-c", ASLEEP)
    await sessions.until(kernel, b"on")
    (pid,) = parts_of(sessions, kernel)[GOFER]
    etc = Path(f"/proc/{pid}/root/etc")

    assert gvisor.closed("/etc"), "this machine has such files"
    assert (etc / "passwd").read_bytes()
    assert (etc / "shadow").read_bytes() == b""
    for path in map(Path, gvisor.closed(str(etc))):
        assert not (os.listdir(path) if path.is_dir() else path.read_bytes()), path


@here
async def test_what_programs_ask_for_themselves_is_not_asked_of_the_machine(
    sessions: Sessions,
) -> None:
    """Priority and how to be spared: gVisor says yes and keeps it to itself."""
    code = (
        "import os, time\n"
        "os.nice(-5)\n"
        "open('/proc/self/oom_score_adj', 'w').write('-900')\n"
        "print('on', flush=True); time.sleep(1000)"
    )
    kernel = await sessions.start(*PYTHON, code)
    await sessions.until(kernel, b"on")
    least_nice = os.getpriority(os.PRIO_PROCESS, init_of(sessions, kernel))

    for pid in layout.descendants(init_of(sessions, kernel)):
        assert os.getpriority(os.PRIO_PROCESS, pid) >= least_nice
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) >= 0


@here
async def test_a_socket_of_the_machine_can_not_be_reached_by_name(sessions: Sessions) -> None:
    code = "import socket\nsocket.socket(socket.AF_UNIX).connect('/madang/run/x.sock')"
    asked = spec(*PYTHON, code)
    kernel = await sessions.prepare(asked)
    service = Path(sessions.runtime.kernel_dir(kernel), "service")
    listener = await asyncio.start_unix_server(lambda _r, _w: None, service / "x.sock")
    (service / "x.sock").chmod(0o666)
    try:
        await sessions.runtime.start(kernel, asked)
        done = await sessions.outcome(kernel)
    finally:
        listener.close()
        (service / "x.sock").unlink()

    assert done.code == 1
    assert b"PermissionError" in done.err


@here
async def test_main_and_execs_share_locks_sockets_and_pipes_in_files(sessions: Sessions) -> None:
    code = (
        "import fcntl, os, socket\n"
        "held = open('lock', 'w'); fcntl.flock(held, fcntl.LOCK_EX)\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind('name'); listener.listen()\n"
        "port = socket.create_server(('127.0.0.1', 5000))\n"
        "os.mkfifo('pipe'); print('on', flush=True)\n"
        "print(open('pipe').read(), flush=True); input()"
    )
    kernel = await sessions.start(*PYTHON, code, stdin=True)
    await sessions.until(kernel, b"on")
    other = (
        "import fcntl, socket\n"
        "socket.socket(socket.AF_UNIX).connect('name')\n"
        "socket.create_connection(('127.0.0.1', 5000))\n"
        "try: fcntl.flock(open('lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: open('pipe', 'w').write('held')"
    )
    done = await sessions.exec(kernel, "other", *PYTHON, other)

    assert done.code == 0, done.err
    assert await sessions.until(kernel, b"held") == b"on\nheld\n"


# -- signals -------------------------------------------------------------------------------------


@here
async def test_a_signal_reaches_the_whole_group_of_its_program_alone(sessions: Sessions) -> None:
    kernel = await sessions.start("/bin/sh", "-c", "trap 'echo main' USR1; echo on; sleep 9 & wait")
    await sessions.until(kernel, b"on")
    script = (
        "trap 'echo parent' USR1; "
        "(trap 'echo child; exit' USR1; echo on; while :; do sleep 0.05; done) & wait; wait"
    )
    await sessions.runtime.exec(kernel, "e1", ExecSpec(argv=("/bin/sh", "-c", script)))
    await sessions.until(kernel, b"on", "e1")

    await sessions.keepers.signal(sessions.io(kernel, "e1"), signal.SIGUSR1)
    done = await sessions.outcome(kernel, "e1")

    assert sorted(done.out.split()) == [b"child", b"on", b"parent"]
    assert sessions.output(kernel)[0] == b"on\n"


@here
async def test_a_session_without_a_main_program_is_signalled_whole(sessions: Sessions) -> None:
    kernel = await sessions.start()
    await sessions.runtime.exec(kernel, "e1", ExecSpec(argv=("/bin/sh", "-c", ASLEEP)))
    await sessions.until(kernel, b"on", "e1")

    await sessions.keepers.signal(sessions.io(kernel), signal.SIGTERM)
    done = await sessions.outcome(kernel, "e1")

    assert done.ended.signal == signal.SIGTERM


@here
async def test_no_program_can_signal_or_trace_process_1(sessions: Sessions) -> None:
    code = (
        "import os, signal\n"
        "for number in range(1, 32):\n"
        "    try: os.kill(1, number); print('sent', number)\n"
        "    except PermissionError: pass\n"
        "for name in ('mem', 'fd/0'):\n"
        "    try: print(open(f'/proc/1/{name}', 'r+b').read(1))\n"
        "    except OSError: pass"
    )
    done = await sessions.python(code)

    assert (done.out, done.err, done.code) == (b"", b"", 0)


# -- deaths --------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("who", [KERNEL, GOFER, CLIENT])
async def test_what_is_killed_of_it_ends_the_session_and_leaves_nothing(
    sessions: Sessions, who: str
) -> None:
    kernel = await sessions.start("/bin/sh", "-c", ASLEEP)
    await sessions.until(kernel, b"on")
    (pid,) = parts_of(sessions, kernel)[who]

    os.kill(pid, signal.SIGKILL)
    done = await sessions.outcome(kernel)

    assert (done.ended.reason, done.ended.signal) == (Reason.SIGNAL, signal.SIGKILL)


@here
async def test_an_exec_whose_runsc_is_killed_ends_alone(sessions: Sessions) -> None:
    kernel = await sessions.start()
    await sessions.runtime.exec(kernel, "e1", ExecSpec(argv=("/bin/sh", "-c", "exec sleep 777")))
    (pid,) = parts_of(sessions, kernel)[CLIENT]

    os.kill(pid, signal.SIGKILL)
    killed = await sessions.outcome(kernel, "e1")
    look = await sessions.exec(kernel, "e2", "/usr/bin/pgrep", "-fc", "sleep 777")

    assert killed.ended.signal == signal.SIGKILL
    assert look.out == b"0\n"


@here
async def test_many_programs_leave_no_file_and_no_zombie_behind(sessions: Sessions) -> None:
    kernel = await sessions.start()
    script = "(setsid sh -c 'sleep 0.1' &); exit 3"
    for number in range(6):
        assert (await sessions.exec(kernel, f"e{number}", "/bin/sh", "-c", script)).code == 3
    code = (
        "import os, time\n"
        "end = time.time() + 20\n"
        "while time.time() < end and (left := [p for p in os.listdir('/proc') if p.isdecimal()\n"
        "        and p not in ('1', str(os.getpid()))]): time.sleep(0.05)\n"
        "print(left)"
    )
    seen = await sessions.exec(kernel, "look", *PYTHON, code)
    work = Path(f"/proc/{init_of(sessions, kernel)}/root/mnt")

    assert seen.out == b"[]\n"
    assert {path.name for path in work.iterdir()} == {"session", "nothing"}
    assert set(parts_of(sessions, kernel)) <= {KERNEL, GOFER, ""}


# -- what is refused -----------------------------------------------------------------------------


@here
async def test_a_network_is_refused(sessions: Sessions) -> None:
    with pytest.raises(NetworkRefused, match="gVisor"):
        await sessions.prepare(spec("/bin/true", network=Network(mode=NetworkMode.FULL)))


NET = Sandbox(
    nets=(NetRule(layer="site", line=1, act=Act.CONNECT, targets=("10.0.0.0/8",)),), label="site 1"
)
LOG = Sandbox(rules=(Rule(layer="site", line=2, calls=("kcmp",), answer=Answer.LOG),))


@pytest.mark.parametrize(("sandbox", "place"), [(NET, "site line 1"), (LOG, "site line 2")])
def test_rules_that_gvisor_can_not_keep_are_refused_or_told(
    sandbox: Sandbox, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "_ABILITIES", {"nets": (lambda: True, "")})
    monkeypatch.setattr(seccomp, "check_kept", lambda *_args, **_more: [])
    with pytest.raises(PolicyUnkept, match=f"{place}.*gVisor"):
        Filters((), accept_unkept=False).of(sandbox, RUNSC)
    found = Filters((), accept_unkept=True).of(sandbox, RUNSC)

    assert not found.kept.rules + found.kept.nets
    assert place in found.warnings[0]
    assert Filters((), accept_unkept=False).of(sandbox, "runc").kept == sandbox


@pytest.mark.parametrize(("arch", "yama", "words"), [
    ("aarch64", "0", "x86_64 only"), ("x86_64", "3", "ptrace_scope"),
    ("x86_64", "1", ""), ("x86_64", "", ""),
])  # fmt: skip
def test_where_it_is_offered(tmp_path: Path, arch: str, yama: str, words: str) -> None:
    (tmp_path / "scope").write_text(yama)
    why = offers._why_not_gvisor(arch, str(tmp_path / "scope"))
    assert (words in why) if words else not why


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "SEARCHED", str(tmp_path))
    monkeypatch.setattr(offers, "_why_not_gvisor", lambda: "")
    with pytest.raises(RuntimeNotOffered, match="apt-get install runsc"):
        Offers("native", offers.RUNTIMES, rootless=False).of(spec("true", runtime=RUNSC))


# -- the guests ----------------------------------------------------------------------------------

on_x86 = pytest.mark.skipif(
    platform.machine() != guests.MACHINE, reason=f"its instructions are {guests.MACHINE}'s"
)
LOOK = (
    "import ctypes, os, sys\n"
    "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
    "print(sys.orig_argv[0], sys.argv[1:], os.environ['V'], status['NoNewPrivs'].strip(),"
    " status['Seccomp'].strip(), ctypes.CDLL(None).unshare(0x10000000))"
)


@pytest.fixture
def passed(tmp_path: Path) -> str:
    path = tmp_path / "gate"
    path.write_bytes(guests.gate(seccomp.program()))
    path.chmod(0o755)
    return str(path)


@on_x86
def test_the_gate_passes_arguments_and_variables_on_under_the_filter(passed: str) -> None:
    argv = [passed, sys.executable, "called so", "-Sc", LOOK, "a b", "", "ü"]
    done = subprocess.run(argv, env={"V": "x=y", "LD_PRELOAD": "/no"}, capture_output=True)

    assert done.stdout.decode() == "called so ['a b', '', 'ü'] x=y 1 2 -1\n", done.stderr


@on_x86
def test_the_gate_without_a_program_says_so(passed: str) -> None:
    done = subprocess.run([passed, "/no/such/program", "x"], capture_output=True)

    assert done.returncode == 126
    assert b"no such file" in done.stderr
    assert done.stderr.endswith(b"missing\n")


@on_x86
def test_the_gate_stays_shut_when_the_filter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    path.write_bytes(guests.gate(b"\xff" * 8))
    path.chmod(0o755)
    done = subprocess.run([path, "/bin/echo", "echo", "open"], capture_output=True)

    assert (done.returncode, done.stdout) == (126, b"")


@on_x86
def test_process_1_signals_what_it_is_told_and_ends_with_its_input(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_bytes(guests.one())
    path.chmod(0o755)
    sleeping = [subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True) for _ in range(2)]
    one = subprocess.Popen([path], stdin=subprocess.PIPE)
    assert one.stdin is not None
    orders = [(signal.SIGTERM, sleeping[0].pid), (0, 1), (signal.SIGINT, -sleeping[1].pid)]
    for number, target in orders:
        one.stdin.write(guests.order(number, target))
        one.stdin.flush()

    assert [each.wait(PATIENCE_S) for each in sleeping] == [-signal.SIGTERM, -signal.SIGINT]
    lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
    ignored = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn"))
    assert ignored >> (signal.SIGCHLD - 1) & 1
    one.stdin.close()
    assert one.wait(PATIENCE_S) == 0


@here
async def test_a_kernel_that_can_not_start_is_quoted_and_may_be_tried_again(
    sessions: Sessions,
) -> None:
    """Its files have no room; later they have."""
    kernel = await sessions.start()
    ballast = Path(f"/proc/{init_of(sessions, kernel)}/root/mnt/ballast")
    with open(ballast, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    first = await sessions.exec(kernel, "e1", "/bin/true")
    ballast.unlink()
    second = await sessions.exec(kernel, "e2", "/bin/true")

    assert (first.ended.reason, first.code) == (Reason.EXIT, 126)
    assert first.ended.text
    assert second.code == 0
