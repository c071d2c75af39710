"""Idle sessions: warned, protected, stopped; with a scripted agent."""

from __future__ import annotations

import asyncio
from typing import Any

from madang.testing.manager import ManagerBox, ScriptedAgent
from madang.testing.patience import PATIENCE_S
from madang.wire.kernel import Activity, Assignment, Wanted
from madang.wire.session import Usage

IDLE = """
version = 1
idle_grace = "GRACE"
protect = "1h"
[[idle]]
kind = "output"
after = "1s"
"""
BUSY = Usage(at=0.0, cpu_s=1.0)


async def start(box: ManagerBox, agent: ScriptedAgent, grace: str = "1s") -> Assignment:
    await box.call("PUT", "/v1/limits/rest", {"text": IDLE.replace("GRACE", grace)})
    await box.call("PUT", "/v1/limits-of/user:*", {"name": "rest"})
    made = await box.call("POST", "/v1/sessions", {"argv": ["sleep", "9"]})
    assignment = await agent.assigned(made["id"])
    await agent.running(assignment, activity=Activity(), usage=BUSY, log_end=0)
    await box.until(made["id"], "RUNNING")
    return assignment


async def heartbeat(agent: ScriptedAgent, assignment: Assignment, **report: Any) -> None:
    """Until cancelled; ten a second."""
    fields = {"activity": Activity(), "usage": BUSY, "log_end": 0} | report
    while True:
        await agent.running(assignment, **fields)
        await asyncio.sleep(0.1)


async def until(box: ManagerBox, assignment: Assignment, key: str, *, there: bool) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        path = f"/v1/sessions/{assignment.kernel.session}"
        found = await box.call("GET", path)
        while (found[key] is not None) is not there:
            found = await box.call("GET", f"{path}?wait=5&version={found['version']}")
        return found


async def test_it_is_warned_then_stopped_with_the_reason(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent, grace="3s")
    beat = asyncio.create_task(heartbeat(agent, assignment))
    warned = await until(box, assignment, "idle", there=True)
    assert warned["idle"]["text"].startswith("no output or input for ")
    assert warned["status"] == "RUNNING"
    told = await agent.assigned(assignment.kernel.session, Wanted.STOP)
    beat.cancel()
    assert told.stop_reason == "idle"
    assert told.stop_text.startswith("idle: no output or input for ")
    assert "(limits rest of user admin)" in told.stop_text
    caller = await box.manager.identity.authenticate(f"Bearer {box.token}")
    newest = (await box.manager.audit.list(caller))[0]
    assert (newest.action, newest.actor) == ("session.stopped", "idle watch")


async def test_new_output_withdraws_the_warning(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent, grace="1h")
    beat = asyncio.create_task(heartbeat(agent, assignment))
    await until(box, assignment, "idle", there=True)
    beat.cancel()
    await agent.running(assignment, activity=Activity(), usage=BUSY, log_end=5)
    found = await until(box, assignment, "idle", there=False)
    assert found["status"] == "RUNNING"


async def test_a_protected_session_is_left_alone_as_long_as_limits_allow(
    either_box: ManagerBox,
) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent, grace="1h")
    path = f"/v1/sessions/{assignment.kernel.session}/protect"
    beat = asyncio.create_task(heartbeat(agent, assignment))
    await until(box, assignment, "idle", there=True)
    problem = await box.call("POST", path, {"for_s": 3601}, status=409)
    assert problem["code"] == "limit.refused"
    assert "protected for at most 1h at once, asked 1h1s" in problem["detail"]
    found = await box.call("POST", path, {"for_s": 1800})
    assert found["idle"] is None
    now = box.manager.identity._clock.now()
    assert 1700 < found["protected_until"] - now <= 1800
    assert 3500 < (await box.call("POST", path, {}))["protected_until"] - now <= 3605
    for wrong in (-1, "x"):
        await box.call("POST", path, {"for_s": wrong}, status=400)
    off = await box.call("POST", path, {"for_s": 0})
    assert off["protected_until"] is None
    await until(box, assignment, "idle", there=True)
    beat.cancel()
    ben = await box.new_user("ben")
    await box.call("POST", path, {}, status=404, headers=ben)


async def test_without_idle_checks_there_is_nothing_to_protect_from(box: ManagerBox) -> None:
    made = await box.call("POST", "/v1/sessions", {"argv": ["sleep", "9"]})
    problem = await box.call("POST", f"/v1/sessions/{made['id']}/protect", {}, status=409)
    assert problem["code"] == "object.conflict"
    assert "nothing stops" in problem["detail"]


async def test_an_agent_that_tells_nothing_of_use_loses_no_session(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)
    beat = asyncio.create_task(heartbeat(agent, assignment, activity=None))
    await asyncio.sleep(4)
    beat.cancel()
    found = await box.call("GET", f"/v1/sessions/{assignment.kernel.session}")
    assert (found["status"], found["idle"]) == ("RUNNING", None)
