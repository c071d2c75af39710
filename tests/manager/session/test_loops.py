"""Deadlines, lost machines, retention: with a clock that the test owns."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from madang.manager.app import ManagerSettings
from madang.manager.fleet import store as ledger
from madang.manager.session.types import SessionSettings
from madang.testing.clock import FakeClock
from madang.testing.manager import ManagerBox, ScriptedAgent, manager_box
from madang.wire.kernel import Assignment, Wanted
from madang.wire.session import Ended, Reason

SETTINGS = SessionSettings(
    node_lost_after_s=300, retention_s=3600, retention_count=3, event_retention_s=600
)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def timed(sqlite_url: str, clock: FakeClock) -> AsyncIterator[ManagerBox]:
    settings = ManagerSettings(database_url=sqlite_url, sessions=SETTINGS)
    async with manager_box(settings, clock) as box:
        yield box


async def assigned(box: ManagerBox, agent: ScriptedAgent) -> Assignment:
    session = await box.call("POST", "/v1/sessions", {"argv": ["true"]})
    return await agent.assigned(session["id"])


async def read(box: ManagerBox, assignment: Assignment) -> dict[str, object]:
    found: dict[str, object] = await box.call("GET", f"/v1/sessions/{assignment.kernel.session}")
    return found


async def beat(agent: ScriptedAgent, clock: FakeClock, seconds: float) -> None:
    """Time passes while the agent shows that it lives."""
    for _ in range(int(seconds / 5)):
        await agent.send()
        await clock.advance(5)


async def test_a_start_that_takes_too_long_is_stopped_then_lost(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await beat(agent, clock, 65)
    found = await read(timed, assignment)
    assert found["status"] == "TERMINATING"
    stopping = await agent.assigned(assignment.kernel.session, Wanted.STOP)
    assert stopping.stop_reason == "start_failed"
    await beat(agent, clock, 130)
    found = await read(timed, assignment)
    assert found["status"] == "TERMINATED"
    assert found["result"] == "lost"
    await agent.until(lambda: assignment.kernel in agent.forgotten)
    nodes = await timed.call("GET", "/v1/nodes")
    assert nodes[0]["allocated"]["cpu"] == 0


async def test_preparing_has_ten_minutes(timed: ManagerBox, clock: FakeClock) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.preparing(assignment)
    await timed.until(assignment.kernel.session, "PREPARING")
    await beat(agent, clock, 590)
    assert (await read(timed, assignment))["status"] == "PREPARING"
    await beat(agent, clock, 15)
    assert (await read(timed, assignment))["status"] == "TERMINATING"


async def test_running_has_no_deadline(timed: ManagerBox, clock: FakeClock) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.running(assignment)
    await timed.until(assignment.kernel.session, "RUNNING")
    await beat(agent, clock, 2000)
    assert (await read(timed, assignment))["status"] == "RUNNING"


async def test_a_set_clock_ends_nothing(timed: ManagerBox, clock: FakeClock) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await beat(agent, clock, 10)
    clock.jump(86400)
    await beat(agent, clock, 10)
    assert (await read(timed, assignment))["status"] == "SCHEDULED"
    clock.jump(-2 * 86400)
    await beat(agent, clock, 20)
    assert (await read(timed, assignment))["status"] == "SCHEDULED"
    await beat(agent, clock, 40)
    assert (await read(timed, assignment))["status"] == "TERMINATING"


async def test_a_silent_machine_is_offline_and_its_sessions_are_lost_in_the_end(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await agent.running(assignment)
    await timed.until(assignment.kernel.session, "RUNNING")
    await clock.advance(30)
    assert (await timed.call("GET", "/v1/nodes"))[0]["status"] == "offline"
    assert (await read(timed, assignment))["status"] == "RUNNING"
    await clock.advance(320)
    found = await read(timed, assignment)
    assert found["status"] == "TERMINATED"
    assert found["result"] == "lost"
    assert found["ended"]["reason"] == "node_lost"  # type: ignore[index]
    told = len(agent.messages)
    timed.connect(agent)
    await agent.until(lambda: len(agent.messages) > told)
    assert assignment.kernel not in agent.wanted


async def test_ended_sessions_go_when_too_many_or_too_old(
    timed: ManagerBox, clock: FakeClock
) -> None:
    agent = await timed.add_agent()
    for _ in range(5):
        assignment = await assigned(timed, agent)
        await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0))
        await timed.until(assignment.kernel.session, "TERMINATED")
        await beat(agent, clock, 5)
    await beat(agent, clock, 35)
    assert len((await timed.call("GET", "/v1/sessions?all=1"))["items"]) == 3
    assert len(agent.forgotten) == 2
    await beat(agent, clock, 3700)
    assert (await timed.call("GET", "/v1/sessions?all=1"))["items"] == []
    await agent.until(lambda: len(agent.forgotten) == 5)


async def test_what_was_told_leaves_no_row_and_is_told_again_when_it_is_still_there(
    timed: ManagerBox, clock: FakeClock
) -> None:
    """An agent that missed the word, for whatever reason, goes on reporting."""
    agent = await timed.add_agent()
    assignment = await assigned(timed, agent)
    await timed.call("DELETE", f"/v1/sessions/{assignment.kernel.session}?force=1", status=204)
    await agent.until(lambda: assignment.kernel in agent.forgotten)
    await beat(agent, clock, 30)
    async with timed.manager.database.read() as tx:
        assert await ledger.list_forgotten(tx, agent.node, -1) == []

    await agent.ended(assignment)

    await agent.until(lambda: agent.forgotten.count(assignment.kernel) == 2)


async def test_one_that_waited_long_gets_its_turn(sqlite_url: str, clock: FakeClock) -> None:
    limits = replace(SETTINGS, reserve_after_s=30)
    async with manager_box(ManagerSettings(database_url=sqlite_url, sessions=limits), clock) as box:
        agent = await box.add_agent()
        first = await assigned(box, agent)
        large = await box.call("POST", "/v1/sessions", {"argv": ["x"], "size": {"cpu": 4}})
        await beat(agent, clock, 40)
        small = await box.call("POST", "/v1/sessions", {"argv": ["x"], "size": {"cpu": 1}})
        found = await box.call("GET", f"/v1/sessions/{small['id']}?wait=5&version=1")
        assert found["pending"]["code"] == "capacity.reserved"
        await agent.ended(first)
        await agent.assigned(large["id"])
