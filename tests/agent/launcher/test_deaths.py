"""kill -9 of every process, at bad moments: sessions go on or end with a reason; nothing is left.

That nothing is left (processes, folders, loop devices) is checked when ``own_sessions`` closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from madang.agent.launcher import registry
from madang.agent.launcher.processes import ProcessId
from madang.agent.runtime import layout
from madang.kit.ids import new_id
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import Launcher, Sessions, spec
from madang.wire.errors import RuntimeFailed
from madang.wire.kernel import KernelId
from madang.wire.session import Reason

IS_ROOT = os.geteuid() == 0
ORDINARY = 2_000_083_000
needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs root: groups, disks")


def record(sessions: Sessions, kernel: KernelId) -> registry.Record:
    found = registry.load(sessions.runtime.kernel_dir(kernel))
    assert found is not None
    return found


def processes(found: registry.Record) -> tuple[ProcessId, ProcessId]:
    """keeper and init"""
    assert found.keeper is not None
    assert found.init is not None
    return found.keeper, found.init


async def gone(process: ProcessId) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while ProcessId.of(process.pid) == process:
            await asyncio.sleep(0.01)


async def buried(process: ProcessId) -> None:
    """By the system's own process 1: who should have done it was killed."""
    async with asyncio.timeout(PATIENCE_S):
        while os.path.exists(f"/proc/{process.pid}"):
            await asyncio.sleep(0.05)


def groups(launcher: Launcher) -> list[Path]:
    """Control groups of sessions and slots of this launcher."""
    from madang.agent.launcher.main import _group_name

    name = _group_name(str(launcher.state))
    return [path for base in Path("/sys/fs/cgroup").glob(f"*/{name}") for path in base.glob("s*")]


async def test_sessions_outlive_their_launcher_and_are_found_again(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    sessions = own_sessions
    kernel = await sessions.start(
        "/bin/sh", "-c", "echo one; read x; echo two $x; exit 5", stdin=True
    )
    await sessions.until(kernel, b"one")

    own_launcher.kill()
    own_launcher.start()
    found = {entry.kernel: entry for entry in await sessions.runtime.adopt()}
    assert found[kernel].running
    feed = await sessions.keepers.stdin(sessions.io(kernel))
    await feed.write(b"three\n")
    done = await sessions.outcome(kernel)
    await feed.close()

    assert (done.out, done.code) == (b"one\ntwo three\n", 5)


async def test_an_end_that_no_launcher_saw_is_known_to_the_next(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    sessions = own_sessions
    kernel = await sessions.start("/bin/sh", "-c", "read x; echo $x; exit 3", stdin=True)
    own_launcher.kill()
    feed = await sessions.keepers.stdin(sessions.io(kernel))
    await feed.write(b"x\n")
    await sessions.gone(kernel)
    await feed.close()

    own_launcher.start()
    (found,) = await sessions.runtime.adopt()
    ended = await sessions.runtime.settle(kernel)

    assert not found.running
    assert (ended.reason, ended.exit_code) == (Reason.EXIT, 3)


@needs_root
async def test_an_adopted_session_can_be_killed_frozen_executed_in_and_removed(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    sessions = own_sessions
    kernel = await sessions.start("/bin/sleep", "1000")
    own_launcher.kill()
    own_launcher.start()

    await sessions.runtime.freeze(kernel)
    await sessions.runtime.thaw(kernel)
    done = await sessions.exec(kernel, "e1", "/bin/echo", "still here")
    await sessions.runtime.kill(kernel)
    ended = (await sessions.outcome(kernel)).ended

    assert done.out == b"still here\n"
    assert ended.signal == signal.SIGKILL


async def test_calls_wait_for_a_launcher_that_is_started_again(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    own_launcher.kill()
    starting = asyncio.create_task(own_sessions.run("/bin/echo", "patience"))
    await asyncio.sleep(0.1)
    own_launcher.start()

    assert (await starting).out == b"patience\n"


@needs_root
async def test_disks_of_removed_sessions_go_while_adopted_ones_live(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    """A new launcher in another mount namespace would leave them mounted in the old one."""
    sessions = own_sessions
    kept = await sessions.start("/bin/sleep", "1000")
    removed = await sessions.start("/bin/sleep", "1000")
    own_launcher.kill()
    own_launcher.start()

    await sessions.runtime.remove(removed)

    loops = [Path(f"/sys/block/{name}/loop/backing_file") for name in os.listdir("/sys/block")]
    backing = [path.read_text() for path in loops if path.exists()]
    assert not [path for path in backing if str(removed) in path]
    assert [path for path in backing if str(kept) in path]


async def test_a_killed_keeper_ends_its_session_as_lost(own_sessions: Sessions) -> None:
    sessions = own_sessions
    kernel = await sessions.start("/bin/sh", "-c", "echo on; sleep 1000")
    await sessions.until(kernel, b"on")
    keeper, init = processes(record(sessions, kernel))

    os.kill(keeper.pid, signal.SIGKILL)
    await gone(init)
    ended = await sessions.runtime.settle(kernel)

    assert ended.reason is Reason.LOST
    assert "keeper" in ended.text


async def test_a_killed_init_ends_its_session_with_all_output(own_sessions: Sessions) -> None:
    sessions = own_sessions
    kernel = await sessions.start("/bin/sh", "-c", "echo on; sleep 1000 & sleep 1000")
    await sessions.until(kernel, b"on")
    _, init = processes(record(sessions, kernel))

    os.kill(init.pid, signal.SIGKILL)
    done = await sessions.outcome(kernel)

    assert (done.ended.reason, done.code, done.out) == (Reason.SIGNAL, 137, b"on\n")


async def test_keeper_and_launcher_killed_together(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    sessions = own_sessions
    kernel = await sessions.start("/bin/sleep", "1000")
    keeper, init = processes(record(sessions, kernel))
    own_launcher.kill()
    os.kill(keeper.pid, signal.SIGKILL)
    await gone(init)
    own_launcher.start()

    assert (await sessions.runtime.settle(kernel)).reason is Reason.LOST
    await buried(init)


async def test_a_record_of_another_boot_harms_nobody(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    """Its pids may be anybody's by now."""
    sessions = own_sessions
    kernel = await sessions.start("/bin/true")
    await sessions.outcome(kernel)
    own_launcher.kill()
    folder = sessions.runtime.kernel_dir(kernel)
    old = record(sessions, kernel)
    me = ProcessId.of(os.getpid())
    old.state, old.boot, old.keeper, old.init = registry.STARTED, "another", me, me
    old.save(folder)
    own_launcher.start()

    (found,) = await sessions.runtime.adopt()
    await sessions.runtime.kill(kernel)

    assert not found.running


async def test_torn_folders_are_swept(own_launcher: Launcher, own_sessions: Sessions) -> None:
    own_launcher.kill()
    for number, content in enumerate(["", "{", '{"kernel": 7}', "[]"]):
        folder = own_launcher.state / "kernels" / f"{new_id()}.{number}"
        folder.mkdir()
        (folder / "kernel.json").write_text(content)
    own_launcher.start()
    assert await own_sessions.runtime.adopt() == []

    async with asyncio.timeout(PATIENCE_S):
        while own_launcher.leftovers():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
async def test_a_launcher_killed_at_any_moment_loses_nothing(
    own_launcher: Launcher, own_sessions: Sessions, seed: int
) -> None:
    """Each session runs at most once and ends; calls in flight come through."""
    sessions, chance = own_sessions, random.Random(seed)

    async def life(number: int) -> str:
        script = f"echo start {number} >> /outputs/log; cat /outputs/log; sleep 0.05; echo end"
        return (await sessions.run("/bin/sh", "-c", script)).out.decode()

    async def murder() -> None:
        for _ in range(6):
            await asyncio.sleep(chance.uniform(0.0, 0.15))
            own_launcher.kill()
            own_launcher.start()

    async with asyncio.TaskGroup() as tasks:
        lives = [tasks.create_task(life(number)) for number in range(8)]
        tasks.create_task(murder())

    assert [task.result() for task in lives] == [f"start {n}\nend\n" for n in range(8)]


@needs_root
async def test_after_all_sessions_are_removed_only_the_slots_have_groups(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    sessions = own_sessions
    async with asyncio.TaskGroup() as tasks:
        for number in range(6):
            tasks.create_task(sessions.run("/bin/echo", str(number)))
    own_launcher.kill()
    own_launcher.start()
    await sessions.run("/bin/true")
    await sessions.close()

    async with asyncio.timeout(PATIENCE_S):
        while len({path.name for path in groups(own_launcher)}) > 2:
            await asyncio.sleep(0.02)


async def test_a_start_whose_slot_is_killed_is_an_error_and_can_be_repeated(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    """Slots are killed under the launcher's feet; it makes new ones."""
    sessions = own_sessions
    await sessions.run("/bin/true")
    for _ in range(3):
        for pid in _children(own_launcher):
            with contextlib.suppress(ProcessLookupError):  # Workers leave when there is no work.
                os.kill(pid, signal.SIGKILL)
        done = None
        while done is None:
            kernel = await sessions.prepare(spec("/bin/echo", "again"))
            try:
                await sessions.runtime.start(kernel, spec("/bin/echo", "again"))
            except Exception as exc:
                assert "could not be started" in str(exc)
                continue
            done = await sessions.outcome(kernel)
        assert done.out == b"again\n"


async def test_when_the_zygote_is_killed_sessions_go_on_and_new_ones_start(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    """More of them than slots are ready."""
    sessions = own_sessions
    before = await sessions.start("/bin/cat", stdin=True)
    for _ in range(2):
        os.kill(_zygote(own_launcher), signal.SIGKILL)
        async with asyncio.TaskGroup() as tasks:
            runs = [tasks.create_task(sessions.run("/bin/echo", str(n))) for n in range(6)]
        assert [run.result().out for run in runs] == [b"%d\n" % n for n in range(6)]

    found = await sessions.runtime.adopt()
    assert [f.running for f in found if f.kernel == before] == [True]


async def test_a_kill_while_it_starts_is_an_end_or_as_if_it_never_began(
    own_launcher: Launcher, own_sessions: Sessions
) -> None:
    """Whichever comes first, a start repeated runs the program at most once."""
    sessions = own_sessions
    await sessions.run("/bin/true")
    for number in range(10):
        asked = spec("/bin/sh", "-c", "echo ran >> /outputs/log; cat /outputs/log; sleep 1000")
        kernel = await sessions.prepare(asked)
        starting = asyncio.create_task(sessions.runtime.start(kernel, asked))
        await asyncio.sleep(number * 0.002)
        await sessions.runtime.kill(kernel)
        try:
            await starting  # a kill that overtook it had nothing to kill
        except RuntimeFailed:
            await sessions.runtime.start(kernel, asked)
            await sessions.until(kernel, b"ran")
        await sessions.runtime.kill(kernel)
        done = await sessions.outcome(kernel)
        assert done.ended.signal == signal.SIGKILL
        assert done.out in {b"", b"ran\n"}


def _zygote(launcher: Launcher) -> int:
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in _children(launcher)}
    return next(pid for pid, name in names.items() if name == "madang-zygote")


def _children(launcher: Launcher) -> list[int]:
    assert launcher.process is not None
    pid = launcher.process.pid
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def test_lost_is_told_in_words() -> None:
    assert "keeper" in layout.lost(1.0).text


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user runs this file itself")
def test_all_this_is_true_for_an_ordinary_user_s_launcher() -> None:
    folder = Path(tempfile.mkdtemp(prefix="madang-rootless-"))
    try:
        os.chown(folder, ORDINARY, ORDINARY)
        argv = [sys.executable, "-m", "pytest", __file__, "--basetemp", str(folder / "pytest")]
        done = subprocess.run(
            argv, user=ORDINARY, group=ORDINARY, extra_groups=[], timeout=110, text=True,
            capture_output=True, env={**os.environ, "HOME": str(folder), "TMPDIR": str(folder)},
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
