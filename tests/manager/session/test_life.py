"""A session's life through API, rows and a scripted agent, on both databases."""

from __future__ import annotations

import asyncio
from typing import Any

from madang.testing.manager import ManagerBox, ScriptedAgent
from madang.wire.kernel import Assignment, KernelId, KernelReport, KernelState, Wanted
from madang.wire.session import Ended, Reason

TRUE = {"argv": ["true"]}


async def create(box: ManagerBox, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = await box.call("POST", "/v1/sessions", {**TRUE, **fields})
    return found


async def start(box: ManagerBox, agent: ScriptedAgent, **fields: Any) -> Assignment:
    session = await create(box, **fields)
    assignment = await agent.assigned(session["id"])
    await agent.running(assignment)
    await box.until(session["id"], "RUNNING")
    return assignment


async def allocated(box: ManagerBox) -> dict[str, Any]:
    nodes = await box.call("GET", "/v1/nodes")
    found: dict[str, Any] = nodes[0]["allocated"]
    return found


NOTHING = {"cpu": 0, "mem_bytes": 0, "disk_bytes": 0, "pids": 0}


async def test_a_session_goes_its_whole_way(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    session = await create(box, name="first", size={"cpu": 0.5}, env={"A": "b"})
    assert session["status"] == "PENDING"
    assignment = await agent.assigned(session["id"])
    assert assignment.spec.argv == ("true",)
    assert assignment.spec.size.cpu == 0.5
    assert assignment.spec.env == {"A": "b"}
    assert assignment.spec.hostname == "first"
    assert (await allocated(box))["cpu"] == 0.5
    await agent.preparing(assignment)
    await box.until("first", "PREPARING")
    await agent.running(assignment, enforced={"mem": "cgroup"}, warnings=("careful",))
    found = await box.until("first", "RUNNING")
    assert found["started_at"] is not None
    assert found["enforced"] == {"mem": "cgroup"}
    assert found["warnings"] == ["careful"]
    await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=3), log_end=99)
    found = await box.until("first", "TERMINATED")
    assert found["result"] == "failure"
    assert found["ended"]["exit_code"] == 3
    assert found["log_end"] == 99
    assert [phase["name"] for phase in found["phases"]] == ["queue", "prepare", "run", "stop"]
    assert all(phase["ended_at"] is not None for phase in found["phases"])
    assert await allocated(box) == NOTHING
    await agent.assigned(session["id"], Wanted.KEEP)
    history = await box.call("GET", "/v1/sessions/first/history")
    assert [entry["target"] for entry in history] == [
        "PENDING", "SCHEDULED", "PREPARING", "RUNNING", "TERMINATING", "TERMINATED",
    ]  # fmt: skip


async def test_a_removed_session_is_forgotten_by_its_node(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    ref = assignment.kernel.session
    await box.call("DELETE", f"/v1/sessions/{ref}", status=409)
    await agent.ended(assignment)
    await box.until(ref, "TERMINATED")
    await box.call("DELETE", f"/v1/sessions/{ref}", status=204)
    await agent.until(lambda: assignment.kernel in agent.forgotten)
    await box.call("GET", f"/v1/sessions/{ref}", status=404)
    await box.call("DELETE", f"/v1/sessions/{ref}", status=404)


async def test_a_forced_removal_ends_a_running_session(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    await box.call("DELETE", f"/v1/sessions/{assignment.kernel.session}?force=1", status=204)
    await agent.until(lambda: assignment.kernel in agent.forgotten)
    assert await allocated(box) == NOTHING


async def test_a_report_after_removal_is_answered_with_forget(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    await box.call("DELETE", f"/v1/sessions/{assignment.kernel.session}?force=1", status=204)
    await agent.until(lambda: assignment.kernel in agent.forgotten)
    await agent.ended(assignment)
    await agent.ended(assignment)
    stranger = KernelId("0" * 26, 1)
    report = KernelReport(kernel=stranger, nonce="x", state=KernelState.RUNNING)
    await agent.send(report)
    await agent.until(lambda: stranger in agent.forgotten)
    assert agent.forgotten.count(assignment.kernel) == 1


async def test_two_stops_at_once_are_one(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    ref = assignment.kernel.session
    path = f"/v1/sessions/{ref}/stop"
    found = await asyncio.gather(*(box.call("POST", path, {}) for _ in range(5)))
    assert {session["status"] for session in found} == {"TERMINATING"}
    stopping = await agent.assigned(ref, Wanted.STOP)
    assert stopping.stop_reason == "user"
    await agent.ended(stopping, Ended(reason=Reason.USER, exit_code=143))
    ended = await box.until(ref, "TERMINATED")
    assert ended["result"] == "cancelled"
    again = await box.call("POST", path, {})
    assert again["version"] == ended["version"]
    history = await box.call("GET", f"/v1/sessions/{ref}/history")
    assert [entry["target"] for entry in history].count("TERMINATING") == 1


async def test_a_second_stop_can_only_hasten(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent, grace_s=30)
    path = f"/v1/sessions/{assignment.kernel.session}/stop"
    await box.call("POST", path, {})
    first = await agent.assigned(assignment.kernel.session, Wanted.STOP)
    assert first.spec.grace_s == 30
    await box.call("POST", path, {"grace_s": 0})
    await agent.until(lambda: agent.wanted[assignment.kernel].spec.grace_s == 0)
    later = await box.call("POST", path, {"grace_s": 60})
    assert later["status"] == "TERMINATING"
    assert agent.wanted[assignment.kernel].spec.grace_s == 0


async def test_a_pending_session_is_stopped_at_once(either_box: ManagerBox) -> None:
    session = await create(either_box)
    found = await either_box.call("POST", f"/v1/sessions/{session['id']}/stop", {})
    assert found["status"] == "TERMINATED"
    assert found["result"] == "cancelled"
    agent = await either_box.add_agent()
    assert not agent.wanted


async def test_stop_before_the_agent_says_anything(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    session = await create(box)
    assignment = await agent.assigned(session["id"])
    await box.call("POST", f"/v1/sessions/{session['id']}/stop", {})
    stopping = await agent.assigned(session["id"], Wanted.STOP)
    await agent.running(assignment)  # sent before the stop arrived
    await agent.ended(stopping, Ended(reason=Reason.USER, exit_code=143))
    found = await box.until(session["id"], "TERMINATED")
    assert found["result"] == "cancelled"


async def test_late_and_foreign_reports_change_nothing(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    kernel = assignment.kernel
    before = await box.call("GET", f"/v1/sessions/{kernel.session}")
    old = KernelReport(
        kernel=KernelId(kernel.session, kernel.attempt - 1),
        nonce=assignment.nonce,
        state=KernelState.ENDED,
        ended=Ended(reason=Reason.EXIT, exit_code=1),
    )
    await agent.send(old)
    await agent.until(lambda: old.kernel in agent.forgotten)
    wrong = KernelReport(
        kernel=kernel,
        nonce="wrong",
        state=KernelState.ENDED,
        ended=Ended(reason=Reason.EXIT, exit_code=1),
    )
    await agent.send(wrong)
    await agent.preparing(assignment)
    await agent.running(assignment)
    other = await create(box)  # comes after all of the above on the same link
    await agent.assigned(other["id"])
    after = await box.call("GET", f"/v1/sessions/{kernel.session}")
    assert after["version"] == before["version"]
    assert after["status"] == "RUNNING"


async def test_ended_twice_is_ended_once(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    await agent.ended(assignment, Ended(reason=Reason.OOM, exit_code=137))
    found = await box.until(assignment.kernel.session, "TERMINATED")
    await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0))
    other = await start(box, agent)
    again = await box.call("GET", f"/v1/sessions/{assignment.kernel.session}")
    assert again["version"] == found["version"]
    assert again["ended"]["reason"] == "oom"
    await agent.ended(other)
    await box.until(other.kernel.session, "TERMINATED")
    assert await allocated(box) == NOTHING


async def test_one_key_makes_one_session_also_at_once(either_box: ManagerBox) -> None:
    headers = {"Idempotency-Key": "k1"}

    async def post(body: dict[str, Any] = TRUE, status: int = 201) -> Any:
        return await either_box.call("POST", "/v1/sessions", body, headers=headers, status=status)

    found = await asyncio.gather(*(post() for _ in range(8)))
    assert len({session["id"] for session in found}) == 1
    problem = await post({"argv": ["false"]}, 422)
    assert problem["code"] == "request.key_reused"
    page = await either_box.call("GET", "/v1/sessions")
    assert len(page["items"]) == 1


async def test_a_link_that_breaks_is_made_good_by_a_full_list(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    gone = await start(box, agent)
    await agent.disconnect()
    await box.call("DELETE", f"/v1/sessions/{gone.kernel.session}?force=1", status=204)
    waiting = await create(box)
    inventory = tuple(
        KernelReport(kernel=a.kernel, nonce=a.nonce, state=KernelState.RUNNING)
        for a in (assignment, gone)
    )
    told = len(agent.messages)
    box.connect(agent, inventory)
    await agent.until(lambda: len(agent.messages) > told)
    assert agent.messages[told].full
    assert assignment.kernel in agent.wanted
    assert gone.kernel not in agent.wanted
    await agent.assigned(waiting["id"])


async def test_what_a_node_no_longer_knows_is_lost(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    assignment = await start(box, agent)
    told_only = await agent.assigned((await create(box))["id"])
    await agent.disconnect()
    await box.add_agent(agent)
    found = await box.until(assignment.kernel.session, "TERMINATED")
    assert found["result"] == "lost"
    assert assignment.kernel not in agent.wanted
    assert agent.wanted[told_only.kernel].wanted is Wanted.RUN  # nothing began there: start it


async def test_an_older_incarnation_is_sent_away(either_box: ManagerBox) -> None:
    agent = await either_box.add_agent()
    agent.incarnation = 5
    await either_box.add_agent(agent)
    stale = ScriptedAgent()
    stale.incarnation = 2
    either_box.connect(stale)
    await asyncio.sleep(0)
    session = await create(either_box)
    await agent.assigned(session["id"])
    assert not stale.messages


async def test_sessions_wait_for_room_and_say_for_what(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    big = await start(box, agent, name="big", size={"mem_bytes": 6 << 30})
    waiting = await create(box, size={"mem_bytes": 4 << 30})
    path = f"/v1/sessions/{waiting['id']}"
    found = await box.call("GET", path)
    while found["pending"] is None:
        found = await box.call("GET", f"{path}?wait=5&version={found['version']}")
    assert found["pending"]["code"] == "capacity.mem"
    assert found["pending"]["text"] == (
        "waits for mem: asks 4 GiB, 2 GiB of 8 GiB free on n1; big holds 6 GiB."
    )
    await agent.ended(big)
    await agent.assigned(waiting["id"])
    found = await box.call("GET", path)
    assert found["pending"] is None


async def test_each_of_a_long_queue_is_told_why_once(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    big = await start(box, agent, size={"mem_bytes": 6 << 30})
    queue = [(await create(box, size={"mem_bytes": 4 << 30}))["id"] for _ in range(70)]
    for session in queue:
        found = await box.call("GET", f"/v1/sessions/{session}?wait=5&version=1")
        assert found["version"] == 2
        assert found["pending"]["code"] == "capacity.mem"
        assert found["pending"]["since"] == found["created_at"]
    await agent.ended(big)
    await agent.assigned(queue[0])
    await agent.assigned(queue[1])


async def test_impossible_sizes_are_refused_at_once(either_box: ManagerBox) -> None:
    await either_box.add_agent()
    body = {**TRUE, "size": {"mem_bytes": 9 << 30}}
    problem = await either_box.call("POST", "/v1/sessions", body, status=409)
    assert problem["code"] == "size.impossible"
    assert "8 GiB" in problem["detail"]


async def test_many_at_once_all_end_and_leave_nothing_allocated(either_box: ManagerBox) -> None:
    agent = ScriptedAgent()
    agent.auto = True
    await either_box.add_agent(agent)
    made = await asyncio.gather(*(create(either_box, size={"cpu": 1.5}) for _ in range(30)))
    for session in made:
        found = await either_box.until(session["id"], "TERMINATED", 30)
        assert found["result"] == "success"
    assert await allocated(either_box) == NOTHING
