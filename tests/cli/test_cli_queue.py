"""``why``, ``queue``, ``group``, ``node``, ``reserve``, ``replay`` against a real manager."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from madang.cli.replay import parse_nodes
from madang.cli.wishes import parse_time
from madang.manager.app import ManagerSettings
from madang.testing.manager import ManagerBox, manager_box
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import InvalidRequest
from madang.wire.exits import REFUSED


class Shell:
    """Commands of an administrator."""

    def __init__(self, box: ManagerBox, home: Path) -> None:
        self.box = box
        self._env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ["PYTHONPATH"],
            "HOME": str(home),
            "MADANG_URL": box.url,
            "MADANG_TOKEN": box.token,
        }

    async def __call__(self, *args: str, code: int = 0, stdin: bytes = b"") -> str:
        command = [sys.executable, "-m", "madang.cli", *args]
        done = await asyncio.to_thread(
            subprocess.run, command, env=self._env, input=stdin, capture_output=True, timeout=60
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return (done.stdout + done.stderr).decode()


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    settings = ManagerSettings(database_url=f"sqlite:///{tmp_path / 'm.db'}")
    async with manager_box(settings) as box:
        yield Shell(box, tmp_path)


async def waiting(shell: Shell, name: str, cpu: str) -> None:
    await shell("run", "-d", "--name", name, "--cpu", cpu, "--no-sync", "--", "sleep", "9")
    async with asyncio.timeout(PATIENCE_S):
        while (await shell.box.call("GET", f"/v1/sessions/{name}"))["pending"] is None:
            await asyncio.sleep(0.02)


async def test_a_waiting_session_is_explained(shell: Shell) -> None:
    agent = await shell.box.add_agent()
    await shell("run", "-d", "--name", "holder", "--cpu", "3", "--no-sync", "--", "sleep", "9")
    held = await shell.box.call("GET", "/v1/sessions/holder")
    await agent.running(await agent.assigned(held["id"]))
    await waiting(shell, "calm-otter", "2")
    why = await shell("why", "calm-otter")
    assert "holder holds 3" in why
    assert "place     1 of 1 in group default" in why
    assert "option    starts now with cpu 1" in why
    assert "option    starts after holder ends" in why
    queue = await shell("queue", "--group", "default")
    assert "calm-otter" in queue.splitlines()[1]
    plan = await shell("run", "--dry-run", "--cpu", "2", "--no-sync", "--", "true")
    assert "starts now with cpu 1" in plan
    assert "has its place: n1" in await shell("run", "--dry-run", "--cpu", "1", "--no-sync", "true")


async def test_groups_machines_and_reservations(shell: Shell) -> None:
    await shell.box.add_agent()
    await shell("group", "add", "big", "--file", "-", stdin=b'order = "fair"\n')
    await shell("node", "set", "n1", "--group", "big")
    assert "n1" in (await shell("group", "ls")).splitlines()[1]
    assert await shell("group", "show", "big") == 'order = "fair"\n'
    await shell("group", "edit", "big", "--file", "-", stdin=b'order = "drf"\n')
    assert "big" in (await shell("node", "ls")).splitlines()[1]
    await shell("reserve", "add", "course", "--from", "2099-05-04T09:00", "--to", "8h",
                "--group", "big")  # fmt: skip
    assert "2099-05-04 09:00" in await shell("reserve", "ls")
    await shell("reserve", "rm", "course")
    assert "order" in await shell(
        "group", "add", "bad", "--file", "-", code=REFUSED, stdin=b"order = 1"
    )
    assert "has machines: n1" in await shell("group", "rm", "big", code=REFUSED)


async def test_a_replay_is_a_table_of_three(shell: Shell) -> None:
    agent = await shell.box.add_agent()
    agent.auto = True
    await shell.box.call("POST", "/v1/sessions", {"name": "one", "argv": ["x"]})
    await shell.box.until("one", "TERMINATED")
    text = await shell("replay", "--from", "1h", "--set", "order=drf", "--add-node", "cpu=8,mem=8g")
    assert text.splitlines()[0].split() == ["HAPPENED", "SIMULATED", "CHANGED"]
    assert "1 passes planned again, 0 came out otherwise" in text


def test_times_are_of_the_next_day_or_a_date() -> None:
    now = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    assert parse_time("12:30", now) - now.timestamp() == 1800
    assert parse_time("11:00", now) - now.timestamp() == 23 * 3600
    assert parse_time("2026-03-02T12:00", now) - now.timestamp() == 86400
    for wrong in ("noon", "25:00", "2026-13-01", "1:2:3"):
        with pytest.raises(InvalidRequest):
            parse_time(wrong, now)


def test_machines_of_a_replay() -> None:
    assert parse_nodes("cpu=2,mem=1g,count=3").count == 3
    for wrong in ("cpu=2", "cpu=2,mem=1g,gpu=1", "cpu=2,mem=1g,count=-1"):
        with pytest.raises(InvalidRequest):
            parse_nodes(wrong)
