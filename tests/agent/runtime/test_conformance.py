"""The runtimes on this machine, held to the contract."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import ClassVar, cast

import pytest

from madang.agent.launcher import offers
from madang.agent.launcher.offers import DOCKER
from madang.agent.runtime.native import NativeRuntime
from madang.agent.runtime.process import ProcessRuntime
from madang.kit.clock import SystemClock
from madang.testing.docker import Docker
from madang.testing.runtimes import RuntimeConformance
from madang.testing.sessions import (
    ChosenRuntime,
    Launcher,
    Sessions,
    WarmRuntime,
    open_launcher,
    warm_starts,
)
from madang.testing.sessions import sessions as open_sessions
from madang.wire.size import MIB

IS_ROOT = os.geteuid() == 0
ORDINARY = 2_000_071_000


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as started:
        yield started


class NativeConformance(RuntimeConformance):
    @pytest.fixture
    async def sessions(self, launcher: Launcher) -> AsyncIterator[Sessions]:
        runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
        async with open_sessions(runtime, launcher) as found:
            yield found


@pytest.mark.skipif(not IS_ROOT, reason="this is the suite of root's launcher")
class TestNative(NativeConformance):
    """A launcher with root's powers."""


@pytest.fixture(scope="module")
def warm_launcher() -> Iterator[Launcher]:
    with open_launcher(warm_bytes=512 * MIB) as started:
        yield started


@pytest.mark.skipif(not IS_ROOT, reason="only root's launcher keeps interpreters warm")
class TestNativeWarm(RuntimeConformance):
    """The same launcher; programs begin as forks of a warm interpreter."""

    @pytest.fixture
    async def sessions(self, warm_launcher: Launcher) -> AsyncIterator[Sessions]:
        async with open_sessions(warm_launcher.runtime(), warm_launcher) as found:
            yield found

    async def test_it_is_warm(self, sessions: Sessions) -> None:
        runtime = cast(WarmRuntime, sessions.runtime)
        before = await warm_starts(runtime)
        done = await sessions.python("print(len(open('/proc/self/uid_map').readlines()))")

        assert done.out == b"2\n"
        assert await warm_starts(runtime) == before + 1


@pytest.mark.skipif(IS_ROOT, reason="run by an ordinary user; see the last test")
class TestNativeRootless(NativeConformance):
    """A launcher of an ordinary user."""


@pytest.mark.skipif(not IS_ROOT, reason="OCI runtimes need a launcher with root's powers")
class OciConformance(RuntimeConformance):
    chosen: ClassVar[str]

    @pytest.fixture
    async def sessions(self, launcher: Launcher) -> AsyncIterator[Sessions]:
        _program, why = offers.find(self.chosen)
        if why:
            pytest.skip(f"{self.chosen}: {why}")
        async with open_sessions(ChosenRuntime(launcher, self.chosen), launcher) as found:
            yield found


class TestCrun(OciConformance):
    """Programs started by crun."""

    chosen = "crun"


class TestRunc(OciConformance):
    """Programs started by runc."""

    chosen = "runc"


@pytest.fixture(scope="module")
def docker_launcher(docker: Docker) -> Iterator[Launcher]:
    with open_launcher(docker_socket=docker.socket) as started:
        yield started


class TestDocker(RuntimeConformance):
    """Sessions in boxes that Docker makes."""

    @pytest.fixture
    async def sessions(self, docker_launcher: Launcher, docker: Docker) -> AsyncIterator[Sessions]:
        runtime = ChosenRuntime(docker_launcher, DOCKER)
        async with open_sessions(runtime, docker_launcher) as found:
            yield found
        await docker.wait_empty()


class TestRunsc(OciConformance):
    """Programs on gVisor."""

    chosen = "runsc"


class TestProcess(RuntimeConformance):
    """Plain processes, for tests elsewhere: the same ends and files, no isolation."""

    @pytest.fixture
    async def sessions(self, tmp_path: Path) -> AsyncIterator[Sessions]:
        async with open_sessions(ProcessRuntime(str(tmp_path))) as found:
            yield found


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user runs TestNativeRootless itself")
@pytest.mark.timeout(400)
def test_an_ordinary_user_s_launcher_conforms() -> None:
    folder = Path(tempfile.mkdtemp(prefix="madang-rootless-"))
    try:
        os.chown(folder, ORDINARY, ORDINARY)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", f"{__file__}::TestNativeRootless"),
                *("--basetemp", str(folder / "pytest"), "-p", "no:randomly", "-rs"),
            ],
            user=ORDINARY, group=ORDINARY, extra_groups=[], timeout=390, capture_output=True,
            env={**os.environ, "HOME": str(folder), "HYPOTHESIS_STORAGE_DIRECTORY": str(folder)},
            text=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
