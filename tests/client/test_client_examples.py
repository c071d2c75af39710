"""Examples do what they say: those in docstrings, and the scripts in ``examples/client``."""

from __future__ import annotations

import asyncio
import doctest
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tests.client.fake import TOKEN, FakeServer

import madang.client
import madang.client.aio
import madang.client.sync
from madang.client import AsyncClient, Client
from madang.wire.session import SessionSpec, SessionStatus

EXAMPLES = Path(__file__).parents[2] / "examples" / "client"


@pytest.mark.parametrize("module", [madang.client, madang.client.sync, madang.client.aio])
def test_examples_in_docstrings_work(
    module: ModuleType, server: FakeServer, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text("print(1)")
    (Path(server.folder) / "work/train.py").write_text("print(1)")  # the fake puts nothing there
    known = {
        "url": server.url,
        "token": TOKEN,
        "folder": str(folder),
        "asyncio": asyncio,
        "Client": Client,
        "AsyncClient": AsyncClient,
        "SessionSpec": SessionSpec,
        "SessionStatus": SessionStatus,
    }
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for test in finder.find(module, globs=known):
        runner.run(test)

    assert runner.tries > 0
    assert runner.failures == 0


@pytest.mark.parametrize(
    ("script", "output"),
    [
        ("run.py", "epoch 0\nepoch 1\nepoch 2\nexit 0, exit\n"),
        ("many.py", "[0, 1, 4, 9, 16]\n"),
    ],
)
def test_example_scripts_work(script: str, output: str, server: FakeServer) -> None:
    env = {**os.environ, "MADANG_URL": server.url, "MADANG_TOKEN": TOKEN}

    done = subprocess.run(
        [sys.executable, EXAMPLES / script],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert (done.returncode, done.stdout) == (0, output), done.stderr


def test_the_sync_client_loads_no_event_loop() -> None:
    code = (
        "import sys, madang.client.sync as c; c.Client('http://127.0.0.1:1')\n"
        "print([m for m in ('asyncio', 'aiohttp', 'ssl', 'http.client') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
