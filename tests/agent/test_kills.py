"""kill -9 of the agent, the launcher and keepers, on real sessions."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from madang.agent.launcher import registry
from madang.agent.runtime.native import NativeRuntime
from madang.agent.settings import AgentSettings
from madang.kit.clock import SystemClock
from madang.storage import BlobStore
from madang.testing.nodes import NodeUnderTest, node
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import Launcher, open_launcher, spec
from madang.testing.simulation import assignment
from madang.wire.kernel import Assignment, KernelId, KernelState
from madang.wire.link import Attach, ReadLog
from madang.wire.log import LogRecord
from madang.wire.session import Reason

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="root's launcher needs root"),
]


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with open_launcher() as started:
        yield started


@pytest.fixture
def settings(launcher: Launcher) -> Iterator[AgentSettings]:
    yield AgentSettings(
        node="n1", state_dir=str(launcher.state), disk_reserve_bytes=0, heartbeat_s=0.5
    )
    shutil.rmtree(launcher.state / "server")
    assert launcher.leftovers() == []


def runtime(launcher: Launcher) -> NativeRuntime:
    return NativeRuntime(launcher.socket, str(launcher.state), SystemClock())


@pytest.fixture
async def it(
    launcher: Launcher, settings: AgentSettings, tmp_path: Path
) -> AsyncIterator[NodeUnderTest]:
    blobs = BlobStore(str(tmp_path))
    async with node(lambda: runtime(launcher), settings, blobs) as found:
        yield found


def shell(number: int, script: str) -> Assignment:
    return assignment(f"{number:010d}", spec=spec("/bin/sh", "-c", script))


def keeper_of(it: NodeUnderTest, kernel: KernelId) -> int:
    record = registry.load(f"{it.settings.state_dir}/kernels/{kernel}")
    assert record is not None
    assert record.keeper is not None
    return record.keeper.pid


async def test_a_killed_keeper_is_a_lost_session_whose_output_is_kept(it: NodeUnderTest) -> None:
    wanted = shell(1, "echo kept; sleep 60")
    await it.want(wanted)
    report = await it.running(wanted.kernel)
    await it.until(lambda: bool(it.reports[wanted.kernel].log_end))
    assert report.state is KernelState.RUNNING

    os.kill(keeper_of(it, wanted.kernel), signal.SIGKILL)

    assert (await it.ended(wanted.kernel)).reason is Reason.LOST
    assert await it.output(wanted.kernel) == b"kept\n"


async def test_a_killed_launcher_is_waited_for(it: NodeUnderTest, launcher: Launcher) -> None:
    before, during = shell(1, "sleep 60"), shell(2, "echo started")
    await it.want(before)
    started = await it.running(before.kernel)
    launcher.kill()

    await it.want(during)
    beats = it.heartbeats
    await it.until(lambda: it.heartbeats > beats + 1)
    assert not it.is_in(during.kernel, KernelState.RUNNING)
    launcher.start()

    assert await it.output(during.kernel) == b"started\n"
    assert it.reports[before.kernel].state is KernelState.RUNNING
    assert it.reports[before.kernel].started_at == started.started_at


async def test_what_ends_while_the_launcher_is_away_is_settled_when_it_is_back(
    it: NodeUnderTest, launcher: Launcher
) -> None:
    wanted = shell(1, "sleep 60")
    await it.want(wanted)
    await it.running(wanted.kernel)
    launcher.kill()

    await it.stop_kernel(wanted.kernel)
    beats = it.heartbeats
    await it.until(lambda: it.heartbeats > beats + 1)
    launcher.start()

    assert (await it.ended(wanted.kernel)).reason is Reason.USER


_AGENT = """
import asyncio, sys
from madang.agent.runtime.native import NativeRuntime
from madang.agent.settings import AgentSettings
from madang.kit.clock import SystemClock
from madang.storage import BlobStore
from madang.testing.nodes import NodeUnderTest
from madang.testing.sessions import spec
from madang.testing.simulation import assignment

async def main(state, socket, blobs):
    settings = AgentSettings(node="n1", state_dir=state, disk_reserve_bytes=0)
    clock, store = SystemClock(), BlobStore(blobs)
    it = NodeUnderTest(settings, lambda: NativeRuntime(socket, state, clock), store, clock)
    await it.start()
    print("ready", flush=True)
    for number in range(1000):
        script = "echo once" if number % 2 else "echo once; sleep 60"
        await it.want(assignment(f"{number:010d}", spec=spec("/bin/sh", "-c", script)))
        print(number, flush=True)
        await asyncio.sleep(0.005)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("round_", range(3))
async def test_an_agent_killed_at_any_moment_starts_nothing_twice_and_loses_nothing(
    launcher: Launcher, settings: AgentSettings, tmp_path: Path, round_: int
) -> None:
    """Its successor is told what the killed one was told, and goes on."""
    victim = subprocess.Popen(
        [sys.executable, "-c", _AGENT, settings.state_dir, launcher.socket, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        await asyncio.to_thread(victim.stdout.readline)
        await asyncio.sleep(random.Random(round_).uniform(0, 0.1))
        victim.kill()
        told = 1 + len(victim.stdout.read().split())
    wanted = [
        shell(number, "echo once" if number % 2 else "echo once; sleep 60")
        for number in range(told)
    ]

    blobs = BlobStore(str(tmp_path))
    async with node(lambda: runtime(launcher), settings, blobs, wanted=wanted) as found:
        for number, each in enumerate(wanted):
            if number % 2:
                assert (await found.ended(each.kernel)).exit_code == 0
            else:
                await found.running(each.kernel)
                await found.first_output(each.kernel)
                await found.stop_kernel(each.kernel, grace_s=0)
            assert await found.output(each.kernel) == b"once\n"


async def test_a_frozen_session_outlives_the_launcher_and_wakes_afterwards(
    it: NodeUnderTest, launcher: Launcher
) -> None:
    script = "echo ready; read line; echo got $line; sleep 60"
    wanted = assignment("frozen0001", spec=spec("/bin/sh", "-c", script, stdin=True))
    await it.want(wanted)
    assert await it.first_output(wanted.kernel) == b"ready\n"
    order = replace(wanted, frozen=True, freeze_revision=it.revision + 1)
    await it.want(order)
    await it.until(lambda: it.reports[wanted.kernel].frozen_since is not None)

    launcher.kill()
    launcher.start()
    stream = await it.open(Attach(kernel=wanted.kernel))
    await stream.send(b"one\n")
    await it.until(lambda: it.reports[wanted.kernel].frozen_since is None)

    output = await it.open(ReadLog(kernel=wanted.kernel, follow=True))
    async with asyncio.timeout(PATIENCE_S):
        async for item in output:
            if isinstance(item, LogRecord) and b"got one" in item.data:
                break
    await output.close()
    await stream.close()
