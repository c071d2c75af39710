"""The manager dies and comes back: everything goes on from the rows."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from madang.manager.app import ManagerSettings
from madang.manager.db import open_database
from madang.manager.fleet import store as ledger
from madang.manager.session import store
from madang.testing.manager import ManagerBox, ScriptedAgent, manager_box
from madang.wire.kernel import Assignment, KernelReport, KernelState, Wanted
from madang.wire.session import Ended, Reason


def inventory(assignment: Assignment, state: KernelState) -> tuple[KernelReport, ...]:
    ended = Ended(reason=Reason.EXIT, exit_code=0) if state is KernelState.ENDED else None
    kernel, nonce = assignment.kernel, assignment.nonce
    return (KernelReport(kernel=kernel, nonce=nonce, state=state, ended=ended),)


async def begin(box: ManagerBox, agent: ScriptedAgent, status: str) -> Assignment | None:
    """A session brought to *status*."""
    session = await box.call("POST", "/v1/sessions", {"argv": ["x"], "name": "it"})
    if status == "PENDING":
        return None
    await box.add_agent(agent)
    assignment = await agent.assigned(session["id"])
    if status in {"PREPARING", "RUNNING", "TERMINATING", "TERMINATED"}:
        await agent.preparing(assignment)
    if status in {"RUNNING", "TERMINATING", "TERMINATED"}:
        await agent.running(assignment)
        await box.until("it", "RUNNING")
    if status == "TERMINATING":
        await box.call("POST", "/v1/sessions/it/stop", {})
    if status == "TERMINATED":
        await agent.ended(assignment)
    await box.until("it", status)
    return assignment


STATES: dict[str, KernelState | None] = {
    "PENDING": None,
    "SCHEDULED": None,
    "PREPARING": KernelState.PREPARING,
    "RUNNING": KernelState.RUNNING,
    "TERMINATING": KernelState.ENDED,
    "TERMINATED": KernelState.ENDED,
}


@pytest.mark.parametrize("status", STATES)
async def test_a_restart_in_each_status_loses_nothing(database_url: str, status: str) -> None:
    settings = ManagerSettings(database_url=database_url)
    agent = ScriptedAgent()
    async with manager_box(settings) as box:
        assignment = await begin(box, agent, status)
    async with manager_box(settings) as box:
        assert (await box.call("GET", "/v1/sessions/it"))["status"] == status
        state = STATES[status]
        has = () if assignment is None or state is None else inventory(assignment, state)
        told = len(agent.messages)
        box.connect(agent, has)
        await agent.until(lambda: len(agent.messages) > told)
        if status in {"PENDING", "SCHEDULED"}:
            found = await box.call("GET", "/v1/sessions/it")
            again = await agent.assigned(found["id"])
            await agent.running(again)
            await agent.ended(again)
        elif status in {"PREPARING", "RUNNING"}:
            assert assignment is not None
            await agent.assigned(assignment.kernel.session, Wanted.RUN)
            await agent.ended(assignment)
        await box.until("it", "TERMINATED")
        history = await box.call("GET", "/v1/sessions/it/history")
        assert [entry["target"] for entry in history].count("SCHEDULED") == 1
        assert (await box.call("GET", "/v1/nodes"))[0]["allocated"]["cpu"] == 0


WRITER = """
import asyncio, sys
from madang.kit.ids import new_id
from madang.manager.app import ManagerSettings
from madang.testing.manager import ScriptedAgent, manager_box

async def main():
    async with manager_box(ManagerSettings(database_url=sys.argv[1])) as box:
        agent = ScriptedAgent(); agent.auto = True
        await box.add_agent(agent)
        print("ready", flush=True)
        while True:
            session = await box.call("POST", "/v1/sessions", {"argv": ["true"]})
            print(session["id"], flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_kill_at_any_moment_leaves_rows_that_agree(sqlite_url: str) -> None:
    accepted: list[str] = []
    for turn in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, sqlite_url], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        read: Callable[[], str] = process.stdout.readline
        assert (await asyncio.to_thread(read)).strip() == "ready"
        accepted += [(await asyncio.to_thread(read)).strip() for _ in range(10 + 7 * turn)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        accepted += [line for line in process.stdout.read().split("\n")[:-1] if len(line) == 26]
        process.stdout.close()
    database = open_database(sqlite_url)
    await database.open()
    async with database.read() as tx:
        node = (await ledger.list_nodes(tx))[0]
        placed = await store.list_placed(tx)
        assert sum(row.cpu_milli for row in placed) == node.used.cpu_milli
        assert sum(row.mem_bytes for row in placed) == node.used.mem_bytes
        for session_id in accepted:
            row = await store.find(tx, session_id)
            assert row is not None, "an accepted session was lost"
            history = await store.list_history(tx, session_id)
            assert history[-1].target == row.status
            sources = [entry.source for entry in history[1:]]
            assert sources == [entry.target for entry in history[:-1]]
    await database.close()
