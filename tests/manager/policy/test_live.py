"""Policies that change while sessions run: who is told, what is answered, what is recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from madang.testing.manager import ManagerBox, ScriptedAgent
from madang.testing.patience import PATIENCE_S
from madang.wire.kernel import Assignment, Guarded, KernelReport, KernelState
from madang.wire.policy import Refusal

STATIC = "version = 1\n\n[[deny]]\ncalls = ['ptrace']\n"
LIVE = "version = 1\n\n[[connect]]\ndeny = ['10.0.0.0/8']\nwhy = 'no databases'\n"
OTHER = "version = 1\n\n[[connect]]\ndeny = ['10.0.0.0/8:5432']\n"
BOTH = LIVE + "\n[[deny]]\ncalls = ['ptrace']\n"
NOTHING = "version = 1\n"


async def running(
    box: ManagerBox, agent: ScriptedAgent, name: str, **spec: Any
) -> tuple[str, Assignment]:
    """The session's id and what the agent was told; it runs with the rules it began with."""
    session = await box.call("POST", "/v1/sessions", {"argv": ["sleep"], "name": name, **spec})
    told = await agent.assigned(session["id"])
    await agent.running(told, guarded=Guarded(live=told.live), enforced=_enforced(told))
    await box.until(session["id"], "RUNNING")
    return session["id"], told


def _enforced(told: Assignment) -> dict[str, str]:
    label = told.spec.sandbox.label
    return {"policy": label} if label else {}


async def guard(agent: ScriptedAgent, told: Assignment, **more: Any) -> Assignment:
    """Follow the next change of *told* as a real agent does; returns what was told then."""
    await agent.until(lambda: agent.wanted[told.kernel].live != told.live)
    now = agent.wanted[told.kernel]
    guarded = Guarded(live=now.live, label=now.spec.sandbox.label, **more)
    await agent.running(now, guarded=guarded, enforced=_enforced(told))
    return now


def apply(box: ManagerBox, text: str, target: str = "site", **more: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(box.call("PUT", f"/v1/policies/{target}", {"text": text}, **more))


async def test_a_change_reaches_running_sessions_before_it_is_answered(
    either_box: ManagerBox,
) -> None:
    box = either_box
    agent = await box.add_agent()
    _, told = await running(box, agent, "one")
    assert told.live == ""

    done = apply(box, BOTH)
    now = await guard(agent, told)

    assert [rule.targets for rule in now.spec.sandbox.nets] == [("10.0.0.0/8",)]
    effect = (await done)["effect"]
    assert (effect["running"], effect["changed"]) == (1, 1)
    assert effect["later"] == ["site line 7"]
    assert effect["waiting"] == []
    assert (await box.call("GET", "/v1/sessions/one"))["enforced"]["live"] == "site 1"


async def test_rules_that_differ_in_nothing_live_change_no_running_session(box: ManagerBox) -> None:
    agent = await box.add_agent()
    _, told = await running(box, agent, "one")
    effect = (await apply(box, STATIC))["effect"]
    assert (effect["running"], effect["changed"], effect["later"]) == (1, 0, ["site line 3"])
    effect = (await apply(box, NOTHING))["effect"]
    assert effect["later"] == ["former site line 3"]
    await agent.until(lambda: agent.wanted[told.kernel].spec.sandbox.label == "")
    assert agent.wanted[told.kernel].live == ""


async def test_taking_rules_back_reaches_them_too(box: ManagerBox) -> None:
    agent = await box.add_agent()
    await apply(box, LIVE)
    _, told = await running(box, agent, "one")
    assert told.live
    done = apply(box, NOTHING)
    assert (await guard(agent, told)).live == ""
    assert (await done)["effect"]["changed"] == 1


async def test_a_machine_that_can_t_hold_it_says_so(box: ManagerBox) -> None:
    agent = await box.add_agent()
    _, told = await running(box, agent, "one")
    done = apply(box, LIVE)
    await guard(agent, told, error="no cgroup v2 here")
    effect = (await done)["effect"]
    assert effect["failed"] == {"one": "no cgroup v2 here"}
    assert effect["changed"] == 0
    warnings = (await box.call("GET", "/v1/sessions/one"))["warnings"]
    assert warnings == ["a changed policy is not in force here: no cgroup v2 here"]


async def test_a_machine_that_is_away_is_named_and_told_when_it_comes(box: ManagerBox) -> None:
    agent = await box.add_agent()
    session, told = await running(box, agent, "one")
    await agent.disconnect()
    while "n1" in box.manager.fleet.online():
        await asyncio.sleep(0)

    effect = (await apply(box, LIVE))["effect"]
    assert effect["waiting"] == ["one"]

    report = KernelReport(kernel=told.kernel, nonce=told.nonce, state=KernelState.RUNNING)
    box.connect(agent, (report,))
    await agent.until(lambda: agent.wanted.get(told.kernel, told).live != "")
    now = await agent.assigned(session)
    assert now.spec.sandbox.nets[0].why == "no databases"


async def test_only_sessions_of_the_machine_are_told_of_its_layer(box: ManagerBox) -> None:
    one, two = await box.add_agent(ScriptedAgent("n1")), await box.add_agent(ScriptedAgent("n2"))
    session = await box.call("POST", "/v1/sessions", {"argv": ["sleep"], "name": "one"})
    row = await box.until(session["id"], "SCHEDULED")
    here, other = (one, two) if row["node"] == "n1" else (two, one)
    told = await here.assigned(session["id"])
    await here.running(told)
    await box.until(session["id"], "RUNNING")

    assert (await apply(box, LIVE, f"node:{other.node}"))["effect"]["running"] == 0
    done = apply(box, LIVE, f"node:{here.node}")
    now = await guard(here, told)
    assert now.spec.sandbox.nets[0].layer == "node"
    assert (await done)["effect"]["changed"] == 1


async def test_an_owner_adds_rules_to_a_session_and_can_t_take_them_back(box: ManagerBox) -> None:
    owner = await box.new_user("ada")
    agent = await box.add_agent()
    path = "/v1/sessions/one/policy"
    spec = {"argv": ["sleep"], "name": "one", "policy": STATIC}
    session = await box.call("POST", "/v1/sessions", spec, headers=owner)
    told = await agent.assigned(session["id"])
    await agent.running(told)
    await box.until(session["id"], "RUNNING")

    body = {"text": STATIC + LIVE.removeprefix("version = 1\n"), "note": "paper"}
    done = asyncio.create_task(box.call("PUT", path, body, headers=owner))
    now = await guard(agent, told)
    answer = await done

    assert (answer["target"], answer["version"]) == ("session:one", 2)
    assert answer["effect"]["changed"] == 1
    assert now.spec.sandbox.nets[0].layer == "session"
    problem = await box.call("PUT", path, {"text": LIVE}, headers=owner, status=403)
    assert "the rule of line 3 is gone" in problem["detail"]
    assert (await box.call("GET", path, headers=owner))["text"] == body["text"]
    stale = {**owner, "If-Match": '"1"'}
    await box.call("PUT", path, body, headers=stale, status=412)

    replaced = asyncio.create_task(box.call("PUT", path, {"text": STATIC}))
    assert (await guard(agent, now)).live == ""
    assert (await replaced)["effect"]["changed"] == 1


async def test_nobody_else_s_session_is_touched(box: ManagerBox) -> None:
    agent = await box.add_agent()
    await running(box, agent, "one")
    stranger = await box.new_user("eve")
    path = "/v1/sessions/one/policy"
    await box.call("GET", path, headers=stranger, status=404)
    await box.call("PUT", path, {"text": LIVE}, headers=stranger, status=404)
    await box.call("GET", "/v1/sessions/one/refusals", headers=stranger, status=404)
    await box.call("GET", "/v1/policy-log", headers=stranger, status=403)


async def test_every_change_is_in_the_log_with_what_was_before(either_box: ManagerBox) -> None:
    box = either_box
    agent = await box.add_agent()
    session, told = await running(box, agent, "one", policy=STATIC)
    await apply(box, STATIC)
    done = asyncio.create_task(
        box.call("PUT", "/v1/sessions/one/policy", {"text": LIVE, "note": "now"})
    )
    await guard(agent, told)
    await done

    found = await box.call("GET", "/v1/policy-log")
    seen = [(e["policy"]["target"], e["policy"]["version"], e["policy"]["note"]) for e in found]
    assert seen == [
        (f"session:{session}", 2, "now"),
        (f"session:{session}", 1, "as it was started"),
        ("site", 1, ""),
    ]
    assert [e["former"] for e in found] == [STATIC, "", ""]
    assert found[0]["policy"]["author"] == "admin"
    of_site = await box.call("GET", "/v1/policy-log?target=site&limit=5")
    assert [e["policy"]["text"] for e in of_site] == [STATIC]
    listed = await box.call("GET", "/v1/policies")
    assert [p["target"] for p in listed] == ["base", "site"]


async def test_what_rules_refuse_is_counted_once(either_box: ManagerBox) -> None:
    box = either_box
    await apply(box, LIVE)
    agent = await box.add_agent()
    session, told = await running(box, agent, "one")

    async def refused(**counts: int) -> None:
        by_place = {place.replace("_", " "): count for place, count in counts.items()}
        guarded = Guarded(live=told.live)
        await agent.running(told, guarded=guarded, enforced=_enforced(told), refused=by_place)

    async def seen(total: int) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            while (found := await box.call("GET", f"/v1/sessions/{session}"))["refusals"] != total:
                await asyncio.sleep(0)
        return dict(found)

    await refused(site_line_3=5, session_line_9=2)
    await seen(7)
    await refused(site_line_3=5, session_line_9=2)
    await refused(site_line_3=6, session_line_9=2, garbage=7)
    await seen(15)

    assert (await box.call("GET", "/v1/policies/site"))["refused"] == {"3": 6}
    assert (await box.call("GET", "/v1/policies"))[1]["refused"] == {"3": 6}
    line = 'madang_policy_refusals{line="3",policy="site",version="1"} 6.0'
    assert line in (await box.call("GET", "/metrics")).decode()


async def test_refusals_come_from_the_machine(box: ManagerBox) -> None:
    await box.call("POST", "/v1/sessions", {"argv": ["x"], "name": "waits"})
    assert await box.call("GET", "/v1/sessions/waits/refusals") == []
    agent = await box.add_agent()
    session, told = await running(box, agent, "one")
    found = [
        Refusal(at=5.0, layer="site", line=3, what="connect", object="10.0.0.5:5432", count=2),
        Refusal(at=6.0, layer="session", line=9, what="open", object="/etc/shadow"),
    ]
    agent.refusals[told.kernel] = found
    answer = await box.call("GET", f"/v1/sessions/{session}/refusals")
    assert [(each["object"], each["count"]) for each in answer] == [
        ("10.0.0.5:5432", 2),
        ("/etc/shadow", 1),
    ]


async def test_refusals_are_replayed_against_a_draft(box: ManagerBox) -> None:
    await apply(box, LIVE)
    refusals = [
        {"at": 1.0, "layer": "site", "line": 3, "what": "connect", "object": thing}
        for thing in ("10.0.0.5:5432", "10.0.0.5:80", "[::ffff:10.0.0.5]:5432")
    ]
    refusals.append({"at": 1.0, "layer": "site", "line": 9, "what": "execve", "object": ""})
    question = {"draft": {"text": OTHER}, "refusals": refusals}
    found = await box.call("POST", "/v1/policies/replay", question)
    assert [(each["judged"], each["passes"], each["place"]) for each in found] == [
        (True, False, "site line 3"),
        (True, True, ""),
        (True, False, "site line 3"),
        (False, True, ""),
    ]


@pytest.mark.parametrize("text", ["version = 1\n[[connect]]\ndeny = ['x y']\n", "[[connect]]\n"])
async def test_a_session_s_own_layer_is_checked(box: ManagerBox, text: str) -> None:
    agent = await box.add_agent()
    await running(box, agent, "one")
    problem = await box.call("PUT", "/v1/sessions/one/policy", {"text": text}, status=400)
    assert problem["code"] == "policy.invalid"


async def test_an_own_layer_leaves_no_less_room_than_there_is(box: ManagerBox) -> None:
    agent = await box.add_agent()
    await apply(box, NOTHING + "[[connect]]\ndeny = ['10.0.0.1']\n" * 200)
    await running(box, agent, "one")
    text = NOTHING + "[[bind]]\nonly = []\n" * 57
    problem = await box.call("PUT", "/v1/sessions/one/policy", {"text": text}, status=400)
    assert "would have 257 rules" in problem["detail"]


async def test_one_that_has_ended_keeps_its_layer(box: ManagerBox) -> None:
    agent = await box.add_agent()
    _, told = await running(box, agent, "one")
    await agent.ended(told)
    await box.until("one", "TERMINATED")
    problem = await box.call("PUT", "/v1/sessions/one/policy", {"text": LIVE}, status=409)
    assert problem["code"] == "session.not_running"
