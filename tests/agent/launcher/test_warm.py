"""Warm starts: like cold ones in all that a program can see, alone, and never needed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from madang.agent import files
from madang.agent.launcher import cgroups, main, pressure
from madang.agent.launcher.processes import stat_fields
from madang.agent.launcher.registry import Uids
from madang.agent.launcher.warm import block_of, key_of, name_of
from madang.agent.runtime.native import NativeRuntime
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import (
    HOST,
    Launcher,
    Outcome,
    Sessions,
    WarmRuntime,
    numpy_image,
    open_launcher,
    spec,
    warm_starts,
)
from madang.testing.sessions import sessions as open_sessions
from madang.wire.kernel import ImageMount, KernelId, WarmLoad
from madang.wire.policy import Answer, Rule, Sandbox
from madang.wire.session import Reason
from madang.wire.size import MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root keeps interpreters warm")

COLD = "/usr/bin/python3"
WARM = "python3"
IN_NEST = "print(len(open('/proc/self/uid_map').readlines()) - 1)"
"""1 in a nest, 0 elsewhere."""


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher(warm_bytes=512 * MIB) as found:
        yield found


@pytest.fixture
def own_launcher() -> Iterator[Launcher]:
    with open_launcher(warm_bytes=512 * MIB) as found:
        yield found


class _AsTold(WarmRuntime):
    """Programs are started by the name that the test gives."""

    prepare = NativeRuntime.prepare
    start = NativeRuntime.start
    run = NativeRuntime.run


def _runtime(launcher: Launcher) -> NativeRuntime:
    runtime = launcher.runtime()
    runtime.__class__ = _AsTold
    return runtime


@pytest.fixture
async def sessions(launcher: Launcher) -> AsyncIterator[Sessions]:
    async with open_sessions(_runtime(launcher), launcher) as found:
        yield found


@pytest.fixture
async def own_sessions(own_launcher: Launcher) -> AsyncIterator[Sessions]:
    async with open_sessions(_runtime(own_launcher), own_launcher) as found:
        yield found


async def _starts(sessions: Sessions) -> int:
    return await warm_starts(sessions.runtime)


async def _script(
    sessions: Sessions, program: str, text: str | None, *argv: str, **more: object
) -> Outcome:
    """Run *program* with *argv*; *text* is put into ``work.py`` before."""
    asked = spec(program, *argv, **more)
    kernel = await sessions.prepare(asked)
    if text is not None:

        async def content() -> AsyncIterator[bytes]:
            yield text.encode()

        await files.write_file(await sessions.runtime.files(kernel), "work.py", content())
    await sessions.runtime.start(kernel, asked)
    return await sessions.outcome(kernel)


LOOK = """
import os, signal, sys, threading, warnings
def show(*things): print(*things, sep="\\n")
show(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.warnoptions, sys._xoptions)
show(sys.prefix, sys.exec_prefix, sys.base_prefix)
show(*((s.name, s.mode, s.encoding, s.errors, s.newlines, s.line_buffering, s.write_through)
       for s in (sys.stdin, sys.stdout, sys.stderr)))
show(*(type(s.buffer).__name__ for s in (sys.stdin, sys.stdout, sys.stderr)))
show(sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stdout.buffer.raw.closefd)
main = sys.modules["__main__"]
show({k: str(v).partition(" object at")[0] for k, v in vars(main).items()
      if k.startswith("__") and k != "__builtins__"}, list(vars(main))[:7])
show(type(__builtins__).__name__, main.__dict__ is globals())
show(sorted(os.environ.items()), os.getcwd(), os.umask(0o22))
show([signal.getsignal(n) for n in (2, 13, 15, 25)])
show(threading.main_thread().name, threading.active_count(), threading.main_thread().ident > 0)
show(os.getpgrp() == os.getpid() == os.getsid(0), os.getppid(), os.getpriority(0, 0))
show(sorted(os.listdir("/proc/self/fd"))[:-1], len(os.listdir("/proc/self/task")))
show(open("/proc/self/cmdline", "rb").read().split(b"\\0")[1:], open("/proc/self/comm").read()[:6])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
show(*(status[k][-9:] for k in status if k.startswith(("Cap", "Shd", "NoNewPrivs"))))
show(*(int(status[k], 16) & 0x7FFFFFFF for k in ("SigBlk", "SigIgn", "SigCgt", "SigPnd")))
show(status["Groups"], status["Seccomp"], status["Umask"], open("/proc/self/oom_score_adj").read())
show(*(sorted(line.split("=")[0] for line in open("/proc/self/environ").read().split("\\0"))))
import resource
show(*(resource.getrlimit(n) for n in range(16)))
show(*(sorted(os.listdir(path)) for path in ("/", "/work", "/tmp", "/dev/shm")))
show(open("/proc/self/cgroup").read(), os.sched_getaffinity(0) != set(), os.cpu_count())
show(sorted(os.readlink(f"/proc/self/ns/{n}").split(":")[0] for n in os.listdir("/proc/self/ns")))
show(os.path.realpath("/proc/self/exe"), os.path.realpath("/proc/self/cwd"))
"""

PROGRAMS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "a text": (None, ("-c", LOOK, "one", "--two", "")),
    "a script": (LOOK, ("work.py", "one")),
    "a script by its path": (LOOK, ("/work/work.py",)),
    "a module": (LOOK, ("-m", "work", "one")),
    "a module of the library": (None, ("-m", "json.tool", "--help")),
    "no such script": (None, ("missing.py",)),
    "no such module": (None, ("-m", "missing")),
    "a folder": (None, ("/work",)),
    "an error": ("def f():\n    raise KeyError('x')\nf()\n", ("work.py",)),
    "an error in a text": (None, ("-c", "1/0")),
    "an error in a module": ("1/0", ("-m", "work")),
    "no Python": ("x = 1\ny = = 2\n", ("work.py",)),
    "no Python in a text": (None, ("-c", "for")),
    "another coding": ("# coding: latin-1\nprint('é', len('é'))\n", ("work.py",)),
    "a NUL byte": ("x = 1\0\n", ("work.py",)),
    "an exit code": (None, ("-c", "import sys; sys.exit(7)")),
    "an exit text": (None, ("-c", "import sys; sys.exit('enough')")),
    "a signal": (None, ("-c", "import os; os.kill(os.getpid(), 15)")),
    "an interrupt": (None, ("-c", "import os, time; os.kill(os.getpid(), 2); time.sleep(9)")),
    "last words": (
        (
            "import atexit, sys\natexit.register(print, 'last')\n"
            "sys.excepthook = lambda kind, value, tb: print(kind, tb.tb_lineno, tb.tb_next)\n1/0\n"
        ),
        ("work.py",),
    ),
    "the last error": (
        (
            "import atexit, sys, traceback\n"
            "atexit.register(lambda: traceback.print_tb(sys.last_traceback))\n1/0\n"
        ),
        ("work.py",),
    ),
    "threads": (
        (
            "import threading, time\n"
            "t = threading.Thread(target=lambda: (time.sleep(0.05), print('late')))\n"
            "t.start(); print('soon')\n"
        ),
        ("work.py",),
    ),
    "children": (
        (
            "import multiprocessing as m, subprocess, sys\n"
            "def double(x): return 2 * x\n"
            "if __name__ == '__main__':\n"
            "    for how in ('fork', 'spawn'):\n"
            "        with m.get_context(how).Pool(2) as pool: print(pool.map(double, range(3)))\n"
            "    argv = [sys.executable, '-c', 'print(1)']\n"
            "    print(subprocess.run(argv, capture_output=True).stdout)\n"
        ),
        ("work.py",),
    ),
    "a module that hides the library's": (
        (
            "import pathlib\nimport os\nos.mkdir('sub')\npathlib.Path('sub/x').write_text('')\n"
            "print(sorted(os.listdir('.')))"
        ),
        ("work.py",),
    ),
    "future statements": (None, ("-c", "def f(x: 1 + 1): pass\nprint(f.__annotations__)")),
}


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_warm_program_is_like_a_cold_one(sessions: Sessions, name: str) -> None:
    text, argv = PROGRAMS[name]
    cold = await _script(sessions, COLD, text, *argv)
    before = await _starts(sessions)
    warm = await _script(sessions, WARM, text, *argv)

    assert await _starts(sessions) == before + 1
    assert warm.out.decode() == cold.out.decode().replace(f"['{COLD}'", f"['{WARM}'")
    assert warm.err.decode().replace(COLD, WARM) == cold.err.decode().replace(COLD, WARM)
    assert (warm.ended.reason, warm.code, warm.ended.signal, warm.ended.text) == (
        *(cold.ended.reason, cold.code, cold.ended.signal),
        cold.ended.text,
    )


@pytest.mark.parametrize("name", ["python", "python3"])
async def test_its_interpreter_is_the_one_that_it_was_started_by(
    sessions: Sessions, name: str
) -> None:
    show = "import sys; print(sys.executable, sys.argv)"
    shell = await sessions.run("/bin/sh", "-c", f'{name} -c "{show}"')
    assert (await sessions.run(name, "-c", show)).out == shell.out


async def test_a_script_beside_a_module_of_the_library_s_name_gets_that(
    sessions: Sessions,
) -> None:
    """What is loaded already must not hide it."""
    kernel = await sessions.prepare(asked := spec(WARM, "work.py"))

    async def content(text: str) -> AsyncIterator[bytes]:
        yield text.encode()

    for path, text in (("work.py", "import struct; print(struct.mine)"), ("struct.py", "mine = 7")):
        await files.write_file(await sessions.runtime.files(kernel), path, content(text))
    await sessions.runtime.start(kernel, asked)

    assert (await sessions.outcome(kernel)).out == b"7\n"


@pytest.mark.parametrize(
    "argv",
    [
        (WARM,), (WARM, "-"), (WARM, "-u", "-c", "pass"), (WARM, "-I", "-c", "pass"),
        (WARM, "-c"), (WARM, "--version"), (COLD, "-c", "pass"), ("python3.11", "-c", "pass"),
        ("./python3", "x.py"), ("sh", "-c", "true"), (WARM, ""), (),
    ],
)  # fmt: skip
def test_what_a_fork_can_not_imitate_is_cold(argv: tuple[str, ...]) -> None:
    assert key_of(spec(*argv)) is None


@pytest.mark.parametrize("name", ["PYTHONPATH", "LD_PRELOAD", "OMP_NUM_THREADS", "LC_ALL", "PATH"])
def test_variables_that_count_while_it_starts_are_cold(name: str) -> None:
    assert key_of(spec(WARM, "x.py", env={name: "1"})) is None
    assert key_of(spec(WARM, "x.py", env={"LR": "0.1"})) is not None


def test_interpreters_are_shared_by_nobody_else() -> None:
    rule = Rule(layer="site", line=1, calls=("keyctl",), answer=Answer.ERRNO, code=1)
    image = ImageMount(name="a", digest="d", kind="layers", layers=("a" * 64,))
    asked = [
        spec(WARM, "x.py"),
        spec(WARM, "x.py", owner="other"),
        spec(WARM, "x.py", cpu=2.0),
        spec(WARM, "x.py", sandbox=Sandbox(rules=(rule,))),
        spec(WARM, "x.py", image=image),
    ]
    assert len({key_of(each) for each in asked}) == len(asked)
    assert key_of(spec(WARM, "-c", "1", hostname="b")) == key_of(
        spec(WARM, "y.py", mem_bytes=MIB * 99)
    )


# -- nothing is left for the next one --------------------------------------------------------------

LEAVE = """
import ctypes, os, random, sys
canary = "canary-" * 9
for folder in ("/work", "/tmp", "/dev/shm", "/home/user", "/var/tmp", "/outputs"):
    open(f"{folder}/canary", "w").write(canary)
os.environ["CANARY"] = sys.canary = canary
ctypes.CDLL(None).shmget(77, 4096, 0o1666)
sys.modules["canary"] = sys
random.seed(1)
try: open("/proc/self/oom_score_adj", "w").write("999")
except OSError: pass
print(os.getuid())
"""
FIND = """
import ctypes, os, re, sys
found = []
for folder in ("/work", "/tmp", "/dev/shm", "/home/user", "/var/tmp", "/outputs"):
    if os.path.exists(f"{folder}/canary"): found.append(folder)
if "CANARY" in os.environ or hasattr(sys, "canary") or "canary" in sys.modules:
    found.append("memory")
if ctypes.CDLL(None).shmget(77, 4096, 0) != -1: found.append("segment")
for line in open("/proc/self/maps"):
    low, high = (int(x, 16) for x in line.split()[0].split("-"))
    if "rw" in line and "[v" not in line:
        with open("/proc/self/mem", "rb") as memory:
            memory.seek(low)
            try: content = memory.read(high - low)
            except (OSError, OverflowError): continue
        if re.search(rb"(?:canary-){6}", content): found.append(line)
print(found, {p for p in os.listdir("/proc") if p.isdecimal()} - {str(os.getpid())})
"""


async def test_nothing_of_one_session_is_seen_by_the_next(sessions: Sessions) -> None:
    before = await _starts(sessions)
    await sessions.run(WARM, "-c", LEAVE, env={"SECRET": "canary-" * 9})
    done = await sessions.run(WARM, "-c", FIND)

    assert await _starts(sessions) == before + 2
    assert done.out == b"[] {'1'}\n", done


async def test_the_init_of_a_warm_session_keeps_nothing_of_what_it_was(
    own_sessions: Sessions,
) -> None:
    """Another process had prepared everything; see ``builder``."""
    kernel, _ = await _started(own_sessions)
    (init,) = [pid for pid in _named(_of(own_sessions), "madang-init") if not _powers(pid)]
    here = Path(f"/proc/{init}")
    (program,) = _children(init)
    files = sorted(os.readlink(entry) for entry in (here / "fd").iterdir())
    status = dict(line.split(":\t", 1) for line in (here / "status").read_text().splitlines())

    assert _place(here / "root") == _place(Path(f"/proc/{program}/root"))
    assert _place(here / "cwd") == _place(here / "root")
    named = [name for name in files if name.startswith("/") and name != "/dev/null"]
    assert named == ["/memfd:madang (deleted)"], "its order alone"
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert len(set(status["Uid"].split())) == 1
    assert status["Groups"].strip() == ""
    assert await _answers(own_sessions, kernel)


def _powers(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    sets = [line.split()[1] for line in status.splitlines() if line.startswith("Cap")]
    return sum(int(each, 16) for each in sets)


def _place(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_dev, info.st_ino


async def test_each_fork_draws_other_numbers(sessions: Sessions) -> None:
    show = (
        "import random, secrets, uuid, tempfile; print(random.random(), secrets.token_hex(8),"
        " uuid.uuid4(), tempfile.mktemp(), random.SystemRandom().random())"
    )
    seen = [(await sessions.run(WARM, "-c", show)).out.split() for _ in range(3)]
    assert all(len(set(column)) == 3 for column in zip(*seen, strict=True)), seen


async def test_times_of_processes_are_true(sessions: Sessions) -> None:
    """They are counted from the boot time that a session's own ``/proc/stat`` tells."""
    show = "print(next(line for line in open('/proc/stat') if line.startswith('btime')).split()[1])"
    done = await sessions.run(WARM, "-c", show)
    with open("/proc/stat", encoding="ascii") as file:
        ours = next(int(line.split()[1]) for line in file if line.startswith("btime"))

    assert abs(int(done.out) - ours) <= 1


VIEW = """
import os
lines = [line.split() for line in open("/proc/self/mountinfo")]
found = {(line[4], line[5], line[line.index("-") + 1]) for line in lines}
for folder, _, names in os.walk("/sys/devices"):
    found |= {(folder, name, open(f"{folder}/{name}").read()) for name in names}
for path in ("/proc/cpuinfo", "/proc/meminfo", "/etc/passwd", "/etc/group", "/etc/resolv.conf"):
    found.add((path, "", open(path).read().replace(str(os.getuid()), "UID")))
for entry in sorted(found): print(entry)
"""


async def test_mounts_and_files_of_its_own_are_as_in_a_cold_one(sessions: Sessions) -> None:
    before = await _starts(sessions)
    warm_one, cold_one = [
        (await sessions.run(program, "-c", VIEW, cpu=1)).out.decode().splitlines()
        for program in (WARM, COLD)
    ]

    assert await _starts(sessions) == before + 1
    assert warm_one == cold_one
    shown = "\n".join(warm_one)
    assert all(f"'{name}', 'r" in shown for name in ("/work", "/tmp", "/madang/run", "/dev/shm"))
    for name in ("/etc/passwd", "/proc/stat", "/sys", "/madang/run"):
        assert f"('{name}', 'ro," in shown


# -- images of all kinds ---------------------------------------------------------------------------


def _image(launcher: Launcher, name: str, modules: dict[str, str], *warm: str) -> ImageMount:
    """A layer with *modules*, for the machine's own Python."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    folder = launcher.state / "layers" / digest / "site"
    folder.mkdir(parents=True, exist_ok=True)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return ImageMount(
        name=name, digest=digest, kind="layers", layers=(digest,),
        env={"PYTHONPATH": "/env/site"}, warm=warm,
    )  # fmt: skip


async def _until_warm(sessions: Sessions, image: ImageMount) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await sessions.run(WARM, "-c", IN_NEST, image=image)).out != b"1\n":
            pass


async def test_modules_of_an_image_are_imported_already(sessions: Sessions) -> None:
    text = "import os, time\npid = os.getpid()\nuid = os.getuid()\nenviron = dict(os.environ)\n"
    image = _image(_of(sessions), "slow", {"slow": text}, "slow")
    await _until_warm(sessions, image)

    show = "import os, slow, sys; print(slow.pid != os.getpid(), slow.__file__, sys.path[1])"
    done = await sessions.run(WARM, "-c", show, image=image)

    assert done.out == b"True /env/site/slow.py /env/site\n"


BUDGET = 300 * MIB
LARGE = "kept = bytearray(100 << 20)\nfor at in range(0, len(kept), 4096): kept[at] = 1\n"


async def _kept(sessions: Sessions) -> WarmLoad:
    found = await sessions.runtime.warmth()
    assert found is not None
    return found


async def test_over_the_budget_the_one_that_was_not_used_for_longest_ends() -> None:
    """Two fit, three do not; the first was used after the second."""
    with open_launcher(warm_bytes=BUDGET) as launcher:
        async with open_sessions(_runtime(launcher), launcher) as sessions:
            first, second, third = (
                _image(launcher, name, {name: LARGE}, name)
                for name in ("large1", "large2", "large3")
            )
            await _until_warm(sessions, first)
            await _until_warm(sessions, second)
            await _until_warm(sessions, first)
            await _until_warm(sessions, third)
            async with asyncio.timeout(PATIENCE_S):
                while (kept := await _kept(sessions)).interpreters > 2 or not kept.used_bytes:
                    await asyncio.sleep(0.2)

            assert kept.budget_bytes == BUDGET
            assert kept.used_bytes <= BUDGET
            show = ("-c", IN_NEST)
            for image, nested in ((first, b"1\n"), (third, b"1\n"), (second, b"0\n")):
                assert (await sessions.run(WARM, *show, image=image)).out == nested, image.name


@contextlib.contextmanager
def _instead_of(launcher: Launcher, path: str, text: str) -> Iterator[None]:
    """What the launcher finds at *path*, in its own mount namespace."""
    assert launcher.process is not None
    enter = ("nsenter", "-t", str(launcher.process.pid), "-m")
    fake = launcher.state / "fake"
    fake.write_text(text)
    subprocess.run([*enter, "mount", "--bind", str(fake), path], check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "umount", path], check=True)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (pressure.MEMINFO, "MemTotal: 1000 kB\nMemAvailable: 40 kB\n"),
        (pressure.STALLS, "some avg10=90.00 total=1\nfull avg10=40.00 total=1\n"),
    ],
)
async def test_what_is_kept_warm_goes_where_memory_is_short_and_comes_back(
    own_sessions: Sessions, path: str, text: str
) -> None:
    if not os.path.exists(path):
        pytest.skip(f"this kernel has no {path}")
    show = ("-c", IN_NEST)
    await _until_warm(own_sessions, HOST)
    with _instead_of(_of(own_sessions), path, text):
        async with asyncio.timeout(PATIENCE_S):
            while (await _kept(own_sessions)).interpreters:
                await asyncio.sleep(0.1)
        for _ in range(2):
            assert (await own_sessions.run(WARM, *show)).out == b"0\n"
            assert not (await _kept(own_sessions)).interpreters

    await _until_warm(own_sessions, HOST)


async def test_a_numeric_library_is_imported_already(sessions: Sessions) -> None:
    try:
        plain = numpy_image(_of(sessions).state)
    except LookupError as exc:
        pytest.skip(str(exc))
    image = replace(plain, name="warm numpy", warm=("numpy",))
    await _until_warm(sessions, image)

    show = (
        "import sys; print('numpy' in sys.modules); import numpy as n;"
        "print(n.ones((50, 50)).dot(n.ones((50, 50))).sum(), n.random.random())"
    )
    seen = [(await sessions.run(WARM, "-c", show, image=image)).out.split() for _ in range(2)]
    cold = (await sessions.run(COLD, "-c", show, image=image)).out.split()

    assert [each[:2] for each in seen] == [[b"True", b"125000.0"]] * 2
    assert cold[:2] == [b"False", b"125000.0"]
    assert len({seen[0][2], seen[1][2], cold[2]}) == 3


def _of(sessions: Sessions) -> Launcher:
    assert sessions.launcher is not None
    return sessions.launcher


# fmt: off
HOSTILE: dict[str, str] = {
    "it ends": "import os; os._exit(0)",
    "it fails": "1/0",
    "it talks": "import os; os.write(3, b'x' * 1000); os.write(3, b'R')",
    "it floods": "import os\nfor _ in range(100): os.write(3, b'R')",
    "it lies about being ready": "import os, time; os.write(3, b'R'); time.sleep(1000)",
    "it has threads": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
    "it writes": "print('hello')",
    "it forks without end": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "it eats memory": "a = []\nwhile True: a.append(bytearray(1 << 20))",
    "it sends descriptors": "import socket, os\ns = socket.socket(fileno=3)\n"
    "for _ in range(50): socket.send_fds(s, [b'R'], [0, 1, 2])",
    "it ends its forks": "import os; os.register_at_fork(after_in_child=lambda: os._exit(1))",
    "its forks hang": "import os, time; os.register_at_fork(after_in_child=lambda: time.sleep(99))",
    "its forks come and hang": "import sys, time, __main__ as m\n"
    "m.enter = lambda *_: time.sleep(1000)",
    "its forks lie about who they are": "import os, struct, __main__ as m\n"
    "import socket\n"
    "def lie(hurry, init_fd, *rest):\n"
    "    if os.fork(): os._exit(0)\n"
    "    s = socket.socket(fileno=init_fd)\n"
    "    for pid in (1, 2, 3):\n"
    "        c = struct.pack('3i', pid, os.getuid(), os.getgid())\n"
    "        try: s.sendmsg([b'here'], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, c)])\n"
    "        except OSError: pass\n"
    "m.take_seat = lie",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_image_harms_its_own_warmth_alone(sessions: Sessions, name: str) -> None:
    """Whatever its code does when it is imported: sessions of it start, and so do all others."""
    image = _image(_of(sessions), name, {"evil": HOSTILE[name]}, "evil")
    for _ in range(4):
        done = await sessions.run(WARM, "-c", "print(1)", image=image)
        assert (done.out, done.code) == (b"1\n", 0), done
        other = await sessions.run(WARM, "-c", IN_NEST)
        assert other.out in {b"0\n", b"1\n"}
    process = _of(sessions).process
    assert process is not None
    assert process.poll() is None


async def test_a_fork_that_fails_now_and_then_is_no_reason_to_give_up(sessions: Sessions) -> None:
    """So it looks on a machine with too much to do: two in a row count, not two in all."""
    lame = (
        "import os, __main__ as m\n"
        "count, enter = 0, m.enter\n"
        "def before():\n"
        "    global count\n"
        "    count += 1\n"
        "os.register_at_fork(before=before)\n"
        "m.enter = lambda *given: os._exit(1) if count % 3 == 0 else enter(*given)\n"
    )
    image = _image(_of(sessions), "lame", {"lame": lame}, "lame")
    await _until_warm(sessions, image)
    show = f"import sys; {IN_NEST}; print('lame' in sys.modules)"
    seen = [(await sessions.run(WARM, "-c", show, image=image)).out for _ in range(9)]

    assert all(out.startswith(b"1\n") for out in seen), "the interpreter was kept"
    assert seen.count(b"1\nFalse\n") >= 2


# -- whoever is killed -----------------------------------------------------------------------------


def _named(launcher: Launcher, name: str) -> list[int]:
    """Processes of this launcher's groups."""
    groups = cgroups.detect(main._group_name(str(launcher.state)))
    pids = {pid for each in groups.names() for pid in groups.group(each).processes()}
    return [pid for pid in pids if _command(pid) == name]


def _command(pid: int) -> str:
    """Empty once it has gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


async def _started(sessions: Sessions) -> tuple[KernelId, int]:
    """A warm session that waits for input, and the pid of its holder."""
    program = f"{IN_NEST}\nimport sys; sys.stdout.flush(); print(sys.stdin.readline(), flush=True)"
    kernel = await sessions.start(WARM, "-c", program, stdin=True)
    assert await sessions.until(kernel, b"\n") == b"1\n"
    (holder,) = _named(_of(sessions), "madang-nest")
    return kernel, holder


async def _answers(sessions: Sessions, kernel: KernelId) -> bool:
    writer = await sessions.keepers.stdin(sessions.io(kernel))
    await writer.write(b"on\n")
    done = await sessions.outcome(kernel)
    await writer.close()
    return done.out == b"1\non\n\n"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def _gone(pid: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (fields := stat_fields(pid)) is not None and fields[0] != b"Z":
            await asyncio.sleep(0.01)


async def test_an_interpreter_is_killed_and_its_sessions_go_on(own_sessions: Sessions) -> None:
    kernel, holder = await _started(own_sessions)
    (interpreter,) = _children(holder)
    os.kill(interpreter, signal.SIGKILL)
    await _gone(interpreter)

    next_one = await own_sessions.run(WARM, "-c", "print(2)")

    assert next_one.out == b"2\n"
    assert await _answers(own_sessions, kernel)
    await own_sessions.close()
    await _gone(holder)


async def test_a_holder_is_killed_and_its_sessions_end(own_sessions: Sessions) -> None:
    kernel, holder = await _started(own_sessions)
    os.kill(holder, signal.SIGKILL)
    done = await own_sessions.outcome(kernel)

    assert done.ended.reason is not Reason.EXIT
    assert (await own_sessions.run(WARM, "-c", "print(2)")).out == b"2\n"


async def test_a_launcher_is_killed_and_its_warm_sessions_go_on(own_sessions: Sessions) -> None:
    launcher = _of(own_sessions)
    kernel, holder = await _started(own_sessions)
    (interpreter,) = _children(holder)
    launcher.kill()
    await _gone(interpreter)
    launcher.start()

    assert (await own_sessions.run(WARM, "-c", "print(2)")).out == b"2\n"
    assert await _answers(own_sessions, kernel)
    await own_sessions.runtime.remove(kernel)
    await _gone(holder)


async def test_a_fork_that_waits_is_killed_and_the_session_starts(own_sessions: Sessions) -> None:
    forks: list[int] = []
    async with asyncio.timeout(PATIENCE_S):
        while not forks:
            await asyncio.sleep(0.01)
            forks = [pid for pid in _named(_of(own_sessions), "python3") if _is_fork(pid)]
    for pid in forks:
        os.kill(pid, signal.SIGKILL)

    assert (await own_sessions.run(WARM, "-c", "print(2)")).out == b"2\n"


def _is_fork(pid: int) -> bool:
    """Whose parent is an init: of ours, in a test that has the machine's processes to itself."""
    fields = stat_fields(pid)
    return fields is not None and _command(int(fields[1])) == "madang-init"


# -- uids ------------------------------------------------------------------------------------------


def test_a_nest_s_name_tells_its_uids() -> None:
    assert block_of(name_of(range(5_000, 5_100))) == range(5_000, 5_100)


def test_blocks_of_uids_are_shared_with_nobody() -> None:
    uids = Uids(1_000, 100)
    block = uids.take_block(10)
    other = uids.take_block(10)
    assert block is not None and other is not None
    assert set(block).isdisjoint(other)
    own = uids.take_from(block[2:])
    assert own == block.start + 2

    taken = {uids.take() for _ in range(80)}

    assert taken.isdisjoint({*block, *other})
    uids.give_back(block)
    assert own not in {uids.take() for _ in range(9)}, "it is in use still"


def test_blocks_never_take_more_than_half() -> None:
    uids = Uids(1_000, 100)
    assert sum(uids.take_block(10) is not None for _ in range(10)) <= 5
