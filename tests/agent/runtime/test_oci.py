"""Sessions whose programs an OCI runtime starts: what it must not give away, deaths."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from madang.agent import files
from madang.agent.launcher import containers, gvisor, offers, registry
from madang.agent.launcher.offers import Offers
from madang.agent.launcher.processes import ProcessId
from madang.agent.runtime.process import ProcessRuntime
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import (
    PYTHON,
    ChosenRuntime,
    Launcher,
    Sessions,
    oci_choices,
    open_launcher,
    spec,
)
from madang.testing.sessions import sessions as open_sessions
from madang.wire.errors import PlatformError, RuntimeNotOffered, SizeInvalid
from madang.wire.kernel import RUNSC, KernelId, KernelSpec
from madang.wire.session import Reason
from madang.wire.size import MIB

IS_ROOT = os.geteuid() == 0
OCI = oci_choices()

SPY = """
import os, time
own = {os.getpid(), 1}
got = set()
FOLDERS = [("cwd", os.O_RDONLY), ("root", os.O_RDONLY), ("exe", os.O_RDONLY), ("exe", os.O_WRONLY)]
MEMORY = [(name, os.O_RDONLY) for name in ("mem", "environ", "maps")]
TRIED = FOLDERS + MEMORY + [(f"fd/{n}", os.O_RDONLY) for n in range(3, 10)]
end = time.time() + 30
print("on", flush=True)
while time.time() < end and not os.path.exists("enough"):
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if int(pid) in own:
            continue
        for name, flags in TRIED:
            try:
                fd = os.open(f"/proc/{pid}/{name}", flags)
            except OSError:
                continue
            try:
                # Of a dead process some can be opened, but there is nothing in them.
                found = name not in ("mem", "environ", "maps") or os.read(fd, 1)
                # What is the session's own program by now was perhaps so before.
                who = open(f"/proc/{pid}/comm").read().strip()
                if found and who not in ("true", "gate"):
                    got.add(f"{name} {flags} {who}")
            except OSError:
                pass
            finally:
                os.close(fd)
print(sorted(got))
"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as found:
        yield found


@pytest.fixture(params=OCI)
async def sessions(launcher: Launcher, request: pytest.FixtureRequest) -> AsyncIterator[Sessions]:
    async with open_sessions(ChosenRuntime(launcher, request.param), launcher) as found:
        yield found


def record_of(sessions: Sessions, kernel: KernelId) -> registry.Record:
    found = registry.load(sessions.runtime.kernel_dir(kernel))
    assert found is not None
    return found


def status_of(process: ProcessId | None) -> dict[str, str]:
    assert process is not None
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def put(sessions: Sessions, kernel: KernelId, path: str, data: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield data

    await files.write_file(await sessions.runtime.files(kernel), path, chunks())


# -- what the runtime could give away ------------------------------------------------------------


async def test_the_init_keeps_what_containers_take_and_no_more(sessions: Sessions) -> None:
    kernel = await sessions.start("/bin/sleep", "1000")
    init = record_of(sessions, kernel).init
    status = status_of(init)
    kept = gvisor.KEPT if sessions.chosen == RUNSC else containers.KEPT
    mask = sum(1 << capability for capability in kept)

    assert {int(status[name], 16) for name in ("CapBnd", "CapPrm", "CapEff")} == {mask}
    assert (status["NoNewPrivs"], status["CapInh"]) == ("1", "0" * 16)
    assert init is not None
    lines = Path(f"/proc/{init.pid}/mountinfo").read_text().splitlines()
    roots = {line.split()[4] for line in lines}
    assert not {f"/{name}" for name in ("root", "home", "boot", "var")} & roots
    left = {path.name for path in Path(f"/proc/{init.pid}/root/mnt").iterdir()}
    assert left == (
        {"session", "nothing"} if sessions.chosen == RUNSC else set()
    )  # a start's files are gone


async def test_the_runtime_can_not_be_reached_while_it_starts_programs(
    sessions: Sessions,
) -> None:
    """Its program, folders, memory and descriptors (the class of CVE-2019-5736)."""
    program = offers.find(sessions.chosen)[0]
    before = hashlib.sha256(Path(program).read_bytes()).digest()
    kernel = await sessions.start(*PYTHON, SPY)
    await sessions.until(kernel, b"on")

    for number in range(12):
        assert (await sessions.exec(kernel, f"e{number}", "/bin/true")).code == 0
    await put(sessions, kernel, "enough", b"yes")

    assert (await sessions.outcome(kernel)).out == b"on\n[]\n"
    assert hashlib.sha256(Path(program).read_bytes()).digest() == before


async def test_a_script_can_not_run_the_runtime_itself(sessions: Sessions) -> None:
    """``#!/proc/self/exe``, or a link to it, names whoever executes it."""
    kernel = await sessions.start()
    await put(sessions, kernel, "script", b"#!/proc/self/exe\n")
    made = await sessions.exec(
        kernel, "make", "/bin/sh", "-c", "chmod +x script; ln -s /proc/self/exe link"
    )
    done = [
        await sessions.exec(kernel, f"e{number}", path)
        for number, path in enumerate(("/work/script", "/work/link", "/proc/self/exe"))
    ]

    assert made.code == 0
    assert [each.code for each in done[1:]] == [126, 126]
    assert done[0].code != 0
    assert b"crun" not in done[0].out + done[0].err.replace(b"/proc/self/exe", b"")


@pytest.mark.parametrize("number", [0, 3, 5, 7, 8, 10])
async def test_a_leaked_folder_is_no_working_directory(sessions: Sessions, number: int) -> None:
    """``/proc/self/fd/N`` of the runtime (the class of CVE-2024-21626)."""
    done = await sessions.run("/bin/true", cwd=f"/proc/self/fd/{number}")

    assert (done.code, done.out) == (126, b"")
    assert "working directory" in done.ended.text


async def test_a_link_leads_a_working_directory_nowhere_else(sessions: Sessions) -> None:
    kernel = await sessions.start()
    await sessions.exec(kernel, "make", "/bin/sh", "-c", "ln -s /mnt m; ln -s ../../.. up")

    inside = await sessions.exec(kernel, "a", "/bin/sh", "-c", "echo *", cwd="/work/m")
    above = await sessions.exec(kernel, "b", "/bin/sh", "-c", "pwd -P", cwd="/work/up")

    assert (inside.code, inside.out) == (0, b"*\n")  # The session's own /mnt, not the runtime's.
    assert above.out == b"/\n"


async def test_programs_share_memory_processes_and_files(sessions: Sessions) -> None:
    """Each is a container of its own, but they are one session."""
    kernel = await sessions.start("/bin/sh", "-c", "echo 1 > /dev/shm/x; echo on; sleep 1000")
    await sessions.until(kernel, b"on")

    done = await sessions.exec(kernel, "look", "/bin/sh", "-c", "cat /dev/shm/x; pgrep -c sleep")

    assert (done.code, done.out) == (0, b"1\n1\n")


async def test_what_is_not_text_is_refused_in_words(sessions: Sessions) -> None:
    done = await sessions.run("/bin/echo", "\xff", argv_encoding="latin-1")

    assert done.code == 126
    assert "UTF-8" in done.ended.text


async def test_a_runtime_that_fails_is_quoted(sessions: Sessions) -> None:
    kernel = await sessions.start()
    await put(sessions, kernel, "bad", b"#!/no/such/interpreter\n")
    await sessions.exec(kernel, "make", "/bin/chmod", "+x", "bad")

    done = await sessions.exec(kernel, "run", "/work/bad")

    assert done.code in {1, 126, 127}
    assert b"no such file" in (done.ended.text.encode() + done.err).lower()


# -- deaths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", OCI)
async def test_a_session_outlives_its_launcher(chosen: str) -> None:
    with open_launcher() as launcher:
        async with open_sessions(ChosenRuntime(launcher, chosen), launcher) as sessions:
            kernel = await sessions.start("/bin/sh", "-c", "read x; echo $x; exit 5", stdin=True)
            launcher.kill()
            launcher.start()

            (found,) = await sessions.runtime.adopt()
            more = await sessions.exec(kernel, "e1", "/bin/echo", "still here")
            await sessions.runtime.freeze(kernel)
            await sessions.runtime.thaw(kernel)
            feed = await sessions.keepers.stdin(sessions.io(kernel))
            await feed.write(b"y\n")
            done = await sessions.outcome(kernel)
            await feed.close()

    assert found.enforced["runtime"] == chosen
    assert more.out == b"still here\n"
    assert (done.out, done.code) == (b"y\n", 5)


@pytest.mark.parametrize("who", ["keeper", "init"])
async def test_killing_either_of_its_processes_ends_it_all(sessions: Sessions, who: str) -> None:
    kernel = await sessions.start("/bin/sh", "-c", "setsid sleep 1000 & echo on; sleep 1000")
    await sessions.until(kernel, b"on")
    process = getattr(record_of(sessions, kernel), who)

    os.kill(process.pid, signal.SIGKILL)
    await asyncio.wait_for(_ended(sessions, kernel), PATIENCE_S)
    ended = await sessions.runtime.settle(kernel)

    assert ended.reason in {Reason.LOST, Reason.SIGNAL}  # `sessions` sees that nothing is left.


async def _ended(sessions: Sessions, kernel: KernelId) -> None:
    while any(each.kernel == kernel and each.running for each in await sessions.runtime.adopt()):
        await sessions.runtime.wait_change()


@pytest.mark.skipif(not IS_ROOT, reason="OCI runtimes need a launcher with root's powers")
async def test_a_runtime_without_room_fails_and_the_session_goes_on(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own processes use up what the session may have: it can't go on, the session can."""
    runtime = ChosenRuntime(launcher, "runc")
    async with open_sessions(runtime, launcher) as sessions:
        kernel = await sessions.start(*PYTHON, _FILL, pids=16)
        await sessions.until(kernel, b"on")

        done = await sessions.exec(kernel, "no-room", "/bin/true")

        assert done.code != 0
        assert (await sessions.runtime.usage(kernel)).pids == 16


_FILL = """
import os, time
try:
    while True:
        if os.fork() == 0: time.sleep(1000)
except OSError: print("on", flush=True)
time.sleep(1000)
"""


# -- choosing ------------------------------------------------------------------------------------


def asked(runtime: str, **size: Any) -> KernelSpec:
    return spec("/bin/true", runtime=runtime, **size)


def test_what_root_does_not_allow_is_not_offered() -> None:
    found = Offers("native", ("native",), rootless=False)

    assert found.names == ["native"]
    assert found.of(asked("")).name == "native"
    with pytest.raises(RuntimeNotOffered, match=r"node\.runtimes.*Offered: native"):
        found.of(asked("crun"))


@pytest.mark.parametrize("name", ["podman", "../../bin/sh", "process"])
def test_what_is_no_runtime_is_not_offered(name: str) -> None:
    with pytest.raises(RuntimeNotOffered, match="no such runtime"):
        Offers("native", offers.RUNTIMES, rootless=False).of(asked(name))


def test_an_ordinary_user_s_launcher_offers_its_own_alone() -> None:
    with pytest.raises(RuntimeNotOffered, match="as root"):
        Offers("native", offers.RUNTIMES, rootless=True).of(asked("runc"))


def test_a_program_that_others_can_change_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "crun"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o777)
    monkeypatch.setattr(offers, "SEARCHED", str(tmp_path))

    assert "by others" in offers.find("crun")[1]
    assert "apt-get install runc" in offers.find("runc")[1]
    program.chmod(0o755)
    assert "/usr" in offers.find("crun")[1] or not IS_ROOT


@pytest.mark.parametrize(
    ("size", "word"), [({"pids": 8}, "--pids 16"), ({"mem_bytes": 20 * MIB}, "mem")]
)
async def test_a_session_too_small_for_the_runtime_is_refused(
    sessions: Sessions, size: dict[str, int], word: str
) -> None:
    least = {"pids": sessions.least.pids, "mem_bytes": sessions.least.mem_bytes}
    if not any(least[name] for name in size):
        pytest.skip(f"{sessions.chosen} fits into any session")
    with pytest.raises(SizeInvalid, match=word):
        await sessions.start("/bin/true", **size)


async def test_the_default_is_root_s_choice(launcher: Launcher) -> None:
    found = Offers("crun", (), rootless=False)
    if "crun" in found.missing:
        pytest.skip(f"crun: {found.missing['crun']}")
    assert found.names[0] == "crun"
    assert found.of(asked("")).name == "crun"
    assert found.of(asked("native")).name == "native"


async def test_without_isolation_there_is_no_choice(tmp_path: Path) -> None:
    async with open_sessions(ProcessRuntime(str(tmp_path))) as found:
        with pytest.raises(PlatformError, match="Offered: process"):
            await found.runtime.prepare(KernelId("0123456789abcdef", 1), asked("crun"))
