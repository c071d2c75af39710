"""One platform for all end-to-end tests of a worker; each test cleans up after itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from madang.client import Client
from madang.testing.platform import Platform, start


@pytest.fixture(scope="session")
def shared_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    if os.geteuid() != 0:
        pytest.skip("needs root: sessions of several users")
    folder = tmp_path_factory.mktemp("platform")
    environment = {"MADANG_NODE_CPU_OVERCOMMIT": "50"}
    with start(folder, environment=environment) as platform:
        yield platform


@pytest.fixture
def platform(shared_platform: Platform) -> Iterator[Platform]:
    """With no session before the test, and none after it."""
    yield shared_platform
    with shared_platform.client() as client:
        for session in list(client.list_sessions(ended=True)):
            client.remove(session.id, force=True)
        assert not list(client.list_sessions(ended=True))


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    with platform.client() as client:
        yield client
