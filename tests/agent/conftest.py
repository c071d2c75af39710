"""Fixtures of agents on real runtimes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.testing.docker import Docker, docker_daemon, missing
from madang.testing.nodes import NodeFolder
from madang.testing.sessions import Launcher, open_launcher


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """One for all tests: it takes a while to come up. Those that kill it have their own."""
    if why := missing():
        pytest.skip(why)
    with docker_daemon() as found:
        yield found


@pytest.fixture(scope="session")
def docker_socket(request: pytest.FixtureRequest) -> str:
    """Of the engine; empty where there is none, for suites of all runtimes."""
    return "" if missing() else str(request.getfixturevalue("docker").socket)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher | None]:
    if os.geteuid() != 0:
        yield None
        return
    with open_launcher() as started:
        yield started


@pytest.fixture(params=["process", pytest.param("native", marks=pytest.mark.root)])
def state(
    request: pytest.FixtureRequest, launcher: Launcher | None, tmp_path: Path
) -> Iterator[NodeFolder]:
    if request.param == "process":
        yield NodeFolder(str(tmp_path), None)
        return
    if launcher is None:
        pytest.skip("this launcher needs root; the rootless one has its own suite")
    yield NodeFolder(str(launcher.state), launcher)
    shutil.rmtree(launcher.state / "server")
    assert launcher.leftovers() == []
