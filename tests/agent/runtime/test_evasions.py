"""Ways around a session's policy: one run of them all under it, one without, a test for each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from madang.agent import files
from madang.agent.launcher import fence
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.kit.policy import parse
from madang.testing import evasions
from madang.testing.sessions import Launcher, Sessions, open_launcher, sessions, spec
from madang.wire.policy import NO_SANDBOX, SESSION, Sandbox, merge

pytestmark = pytest.mark.skipif(not fence.possible(), reason=fence.TAKES)

RUN = ("/usr/bin/python3", "-I", "-S", "evasions.py")
NOT_EVERYWHERE = frozenset({"connect_by_several_paths", "use_another_protocol"})
"""Kernels may lack the protocol."""


@dataclass
class Tried:
    with_policy: dict[str, str | None]
    without: dict[str, str | None]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as found:
        yield found


@pytest.fixture(scope="module")
def tried(launcher: Launcher) -> Tried:
    return asyncio.run(_tried(launcher))


async def _tried(launcher: Launcher) -> Tried:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    policy = merge([parse(evasions.POLICY, SESSION)], label="session")
    async with sessions(runtime, launcher) as found:
        return Tried(await _try(found, policy), await _try(found, NO_SANDBOX))


async def _try(found: Sessions, sandbox: Sandbox) -> dict[str, str | None]:
    asked = spec(*RUN, sandbox=sandbox, pids=64)
    kernel = await found.prepare(asked)
    server = await found.runtime.files(kernel)
    await files.write_file(server, "evasions.py", _parts(Path(evasions.__file__)))
    server = await found.runtime.files(kernel)
    await files.write_file(server, "secret", _parts(Path(__file__)))
    await found.runtime.start(kernel, asked)
    done = await found.outcome(kernel)
    results: dict[str, str | None] = dict(map(json.loads, done.out.splitlines()))
    assert results.keys() == evasions.EVASIONS.keys(), done
    return results


async def _parts(path: Path) -> AsyncIterator[bytes]:
    yield path.read_bytes()


@pytest.mark.parametrize("name", evasions.EVASIONS)
def test_a_policy_is_not_evaded(tried: Tried, name: str) -> None:
    gained = tried.with_policy[name]
    assert gained is None, f"{evasions.EVASIONS[name].__doc__}\ngained: {gained}"


@pytest.mark.parametrize("name", evasions.EVASIONS.keys() - NOT_EVERYWHERE)
def test_it_would_gain_something_without_a_policy(tried: Tried, name: str) -> None:
    gained = tried.without[name]
    assert gained is not None
    assert not gained.startswith(("broke", "hung"))
