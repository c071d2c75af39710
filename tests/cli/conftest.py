"""The command line against the fake server, as child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.client.fake import TOKEN, FakeServer

COMMAND = (sys.executable, "-m", "madang.cli")


@dataclass
class Cli:
    server: FakeServer
    project: Path
    """Where commands run."""
    env: dict[str, str]

    def run(self, *args: str | bytes, **more: Any) -> subprocess.CompletedProcess[bytes]:
        options: dict[str, Any] = {"cwd": self.project, "env": self.env, "timeout": 30}
        if "input" not in more:
            options["stdin"] = subprocess.DEVNULL
        return subprocess.run(
            [*COMMAND, *args], capture_output=True, check=False, **(options | more)
        )

    def start(self, *args: str, **more: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*COMMAND, *args],
            cwd=self.project,
            env=self.env,
            stdin=more.pop("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **more,
        )


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
def cli(server: FakeServer, tmp_path: Path) -> Cli:
    project = tmp_path / "project"
    project.mkdir()
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ["PYTHONPATH"],
        "HOME": str(tmp_path / "home"),
        "MADANG_URL": server.url,
        "MADANG_TOKEN": TOKEN,
    }
    return Cli(server, project, env)
