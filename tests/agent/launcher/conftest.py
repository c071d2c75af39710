"""A launcher for each test that kills one, or one for all tests of a file that don't."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing.sessions import Launcher, Sessions, open_launcher
from madang.testing.sessions import sessions as open_sessions


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as found:
        yield found


@pytest.fixture
def own_launcher() -> Iterator[Launcher]:
    with open_launcher() as found:
        yield found


async def _sessions(launcher: Launcher) -> AsyncIterator[Sessions]:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    async with open_sessions(runtime, launcher) as found:
        yield found


@pytest.fixture
async def sessions(launcher: Launcher) -> AsyncIterator[Sessions]:
    async for found in _sessions(launcher):
        yield found


@pytest.fixture
async def own_sessions(own_launcher: Launcher) -> AsyncIterator[Sessions]:
    async for found in _sessions(own_launcher):
        yield found
