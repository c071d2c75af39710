"""A fake server for each test that asks for one, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.client.fake import TOKEN, FakeServer

from madang.client import Client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    root = tmp_path / "session"
    for name in ("work", "outputs"):
        (root / name).mkdir(parents=True)
    fake = FakeServer(str(root))
    fake.start()
    try:
        yield fake
    finally:
        fake.close()


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.url, TOKEN, patience_s=10.0) as made:
        yield made
