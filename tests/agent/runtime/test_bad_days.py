"""Bad days of a machine: its disk is full, its sessions are hostile to themselves and to us."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import PYTHON, Launcher, Sessions, open_launcher, spec
from madang.testing.sessions import sessions as open_sessions
from madang.wire.errors import PlatformError, StorageFull
from madang.wire.kernel import ExecSpec
from madang.wire.session import Reason
from madang.wire.size import MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="these need mounts and limits of root")


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as started:
        yield started


@pytest.fixture
async def sessions(launcher: Launcher) -> AsyncIterator[Sessions]:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    async with open_sessions(runtime, launcher) as found:
        yield found


async def test_a_full_disk_refuses_new_sessions_and_spares_running_ones() -> None:
    with open_launcher(disk="400m") as launcher:
        runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
        async with open_sessions(runtime, launcher) as found:
            script = "trap 'echo over; exit 3' USR1; echo on; while :; do sleep 0.05; done"
            running = await found.start("/bin/sh", "-c", script)
            await found.until(running, b"on")

            with launcher.full_disk():
                with pytest.raises(StorageFull, match="disk"):
                    await found.run("/bin/true")
                with pytest.raises(PlatformError, match=r"[Nn]o space|disk"):
                    await found.exec(running, "one", "/bin/true")
                await found.keepers.signal(found.io(running), signal.SIGUSR1)
                ended = (await found.outcome(running)).ended
            again = await found.run("/bin/echo", "room again")

    assert ended.exit_code == 3
    assert again.out == b"room again\n"


async def test_a_memory_bomb_in_an_exec_is_no_one_else_s(sessions: Sessions) -> None:
    kernel = await sessions.start("/bin/sleep", "1000", mem_bytes=64 * MIB)
    neighbour = await sessions.start("/bin/sleep", "1000")

    done = await sessions.exec(kernel, "bomb", *PYTHON, "x = bytearray(1 << 30)")

    assert done.ended.signal == 9
    running = {found.kernel: found.running for found in await sessions.runtime.adopt()}
    assert running[neighbour]


async def test_a_fork_bomb_dies_with_one_kill(sessions: Sessions, launcher: Launcher) -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    kernel = await sessions.start(*PYTHON, bomb, pids=200)
    async with asyncio.timeout(PATIENCE_S):
        while (await sessions.runtime.usage(kernel)).pids != 200:
            await asyncio.sleep(0.02)

        await sessions.runtime.remove(kernel)

    await launcher.wait_clean()


async def test_a_session_full_of_hostile_files_is_removed(sessions: Sessions) -> None:
    code = (
        "import os\n"
        "for n in range(3000):\n"
        "    os.mkdir('d'); os.chdir('d')\n"
        "    os.close(os.open(b'\\xff\\n' + bytes([128 + n % 128]), os.O_CREAT))\n"
        "    os.chmod('.', 0o300)\n"
        "os.mkfifo('fifo'); os.symlink('/', 'root'); os.symlink('loop', 'loop')"
    )
    done = await sessions.python(code, disk_bytes=100 * MIB)
    assert done.code == 0, done.err
    await sessions.close()


async def test_a_million_empty_files_are_a_disk_limit_too(sessions: Sessions) -> None:
    done = await sessions.python("for n in range(10**6): open(str(n), 'w').close()")
    assert done.ended.reason == Reason.DISK


async def test_frozen_stopped_and_traced_programs_can_be_removed(sessions: Sessions) -> None:
    stopped = await sessions.start("/bin/sh", "-c", "echo on; kill -STOP $$; sleep 1000")
    await sessions.until(stopped, b"on")
    frozen = await sessions.start("/bin/sleep", "1000")
    await sessions.runtime.freeze(frozen)

    async with asyncio.timeout(PATIENCE_S):
        await sessions.runtime.remove(stopped)
        await sessions.runtime.remove(frozen)


async def test_a_frozen_session_can_be_stopped_in_its_grace(sessions: Sessions) -> None:
    kernel = await sessions.start("/bin/sleep", "1000")
    await sessions.runtime.freeze(kernel)
    await sessions.runtime.kill(kernel)

    async with asyncio.timeout(PATIENCE_S):
        ended = (await sessions.outcome(kernel)).ended

    assert ended.exit_code == 137


async def test_a_thousand_descriptors_and_a_thousand_lines_do_no_harm(sessions: Sessions) -> None:
    code = (
        "import os, socket\n"
        "kept = [socket.socketpair() for _ in range(900)]\n"
        "for n in range(1000): print(n, flush=True)"
    )
    done = await sessions.python(code)
    assert done.out.count(b"\n") == 1000


async def test_starting_and_removing_at_once_leaves_nothing(
    sessions: Sessions, launcher: Launcher
) -> None:
    async def hurried() -> None:
        asked = spec("/bin/sleep", "1000")
        kernel = await sessions.prepare(asked)
        start = asyncio.ensure_future(sessions.runtime.start(kernel, asked))
        await asyncio.sleep(0)
        await sessions.runtime.remove(kernel)
        await asyncio.gather(start, return_exceptions=True)

    await asyncio.gather(*(hurried() for _ in range(12)))

    await launcher.wait_clean()


async def test_execs_in_a_dying_session_end_or_are_refused(sessions: Sessions) -> None:
    kernel = await sessions.start()

    async def execute(number: int) -> None:
        await sessions.runtime.exec(kernel, f"e{number}", ExecSpec(argv=("/bin/sleep", "1000")))

    execs = [asyncio.ensure_future(execute(number)) for number in range(10)]
    await asyncio.sleep(0.02)
    await sessions.runtime.kill(kernel)
    results = await asyncio.gather(*execs, return_exceptions=True)

    assert (await sessions.outcome(kernel)).code == 137
    assert all(result is None or isinstance(result, Exception) for result in results)
