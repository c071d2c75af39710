"""Freezing through API, rows and a scripted agent, on both databases."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from madang.testing.manager import ManagerBox, ScriptedAgent
from madang.testing.patience import PATIENCE_S
from madang.wire.kernel import Assignment, KernelReport, KernelState, Wanted


async def create(box: ManagerBox) -> str:
    found = await box.call("POST", "/v1/sessions", {"argv": ["sleep", "9"]})
    return str(found["id"])


async def start(box: ManagerBox, agent: ScriptedAgent) -> Assignment:
    ref = await create(box)
    assignment = await agent.assigned(ref)
    await agent.running(assignment)
    await box.until(ref, "RUNNING")
    return assignment


async def order(
    box: ManagerBox, agent: ScriptedAgent, assignment: Assignment, act: str, **report: Any
) -> dict[str, Any]:
    """POST, and the agent's word once it has heard of it."""
    before = agent.wanted[assignment.kernel].freeze_revision
    path = f"/v1/sessions/{assignment.kernel.session}/{act}"
    call = asyncio.create_task(box.call("POST", path, **report.pop("call", {})))
    await agent.until(lambda: agent.wanted[assignment.kernel].freeze_revision > before)
    told = agent.wanted[assignment.kernel]
    assert told.frozen is (act == "freeze")
    assert told.wanted is Wanted.RUN
    await agent.running(told, freeze_revision=told.freeze_revision, **report)
    found: dict[str, Any] = await call
    return found


async def frozen_since(box: ManagerBox, assignment: Assignment) -> float | None:
    found = await box.call("GET", f"/v1/sessions/{assignment.kernel.session}")
    since: float | None = found["frozen_since"]
    return since


async def until_frozen(box: ManagerBox, assignment: Assignment, since: float | None) -> None:
    async with asyncio.timeout(PATIENCE_S):
        ref = assignment.kernel.session
        found = await box.call("GET", f"/v1/sessions/{ref}")
        while found["frozen_since"] != since:
            found = await box.call("GET", f"/v1/sessions/{ref}?wait=5&version={found['version']}")


async def test_a_session_is_frozen_and_thawed_by_order(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    since = round(time.time(), 3)

    frozen = await order(box, agent, assignment, "freeze", frozen_since=since)
    again = await order(box, agent, assignment, "freeze", frozen_since=since)
    thawed = await order(box, agent, assignment, "thaw")

    assert (frozen["status"], frozen["frozen_since"]) == ("RUNNING", since)
    assert again["frozen_since"] == since
    assert thawed["frozen_since"] is None
    assert (await order(box, agent, assignment, "thaw"))["frozen_since"] is None


async def test_only_a_running_session_can_be_frozen(either_box: ManagerBox) -> None:
    box, ref = either_box, await create(either_box)
    for act in ("freeze", "thaw"):
        problem = await box.call("POST", f"/v1/sessions/{ref}/{act}", status=409)
        assert problem["code"] == "session.not_running"
        assert "has not started" in problem["detail"]
        await box.call("POST", f"/v1/sessions/nobody/{act}", status=404)


async def test_the_row_follows_what_the_agent_does_by_itself(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    await order(box, agent, assignment, "freeze", frozen_since=5.0)
    told = agent.wanted[assignment.kernel]

    await agent.running(told, freeze_revision=told.freeze_revision)
    await until_frozen(box, assignment, None)
    await agent.running(told, freeze_revision=told.freeze_revision, frozen_since=9.0)
    await until_frozen(box, assignment, 9.0)


async def test_a_late_report_does_not_undo_an_order(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    await order(box, agent, assignment, "freeze", frozen_since=5.0)
    old = agent.wanted[assignment.kernel].freeze_revision
    await order(box, agent, assignment, "thaw")

    await agent.running(assignment, freeze_revision=old, frozen_since=5.0)
    told = agent.wanted[assignment.kernel]
    await agent.running(told, freeze_revision=told.freeze_revision, log_end=77)  # comes after it
    async with asyncio.timeout(PATIENCE_S):
        while (await box.call("GET", f"/v1/sessions/{told.kernel.session}"))["log_end"] != 77:
            await asyncio.sleep(0)

    assert await frozen_since(box, assignment) is None


async def test_a_machine_that_can_not_freeze_says_so(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)

    problem = await order(
        box, agent, assignment, "freeze", freeze_error="no freezer here", call={"status": 500}
    )

    assert problem["code"] == "host.lacks"
    assert "no freezer here" in problem["detail"]
    assert await frozen_since(box, assignment) is None


async def test_an_order_outlives_an_agent_that_is_away(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    await agent.disconnect()
    async with asyncio.timeout(PATIENCE_S):
        while (await box.call("GET", "/v1/nodes"))[0]["status"] != "offline":
            await asyncio.sleep(0)

    found = await box.call("POST", f"/v1/sessions/{assignment.kernel.session}/freeze")
    assert found["frozen_since"] is not None

    report = KernelReport(
        kernel=assignment.kernel, nonce=assignment.nonce, state=KernelState.RUNNING
    )
    agent.wanted.clear()
    box.connect(agent, (report,))
    told = await agent.assigned(assignment.kernel.session)
    assert told.frozen
    assert told.freeze_revision > report.freeze_revision
    assert await frozen_since(box, assignment) == found["frozen_since"]


async def test_a_stopped_session_is_not_shown_as_frozen(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    await order(box, agent, assignment, "freeze", frozen_since=5.0)

    found = await box.call("POST", f"/v1/sessions/{assignment.kernel.session}/stop", {})

    assert (found["status"], found["frozen_since"]) == ("TERMINATING", None)
    await agent.assigned(assignment.kernel.session, Wanted.STOP)
    await box.call("POST", f"/v1/sessions/{assignment.kernel.session}/thaw", status=409)
