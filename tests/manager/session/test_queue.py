"""Groups, wishes and reasons in a running manager."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from madang.manager.app import ManagerSettings
from madang.manager.scheduling import store as scheduling
from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.service.journal import digest_of, read
from madang.testing.clock import FakeClock
from madang.testing.manager import SUCCESS, ManagerBox, ScriptedAgent, manager_box
from madang.testing.patience import PATIENCE_S
from madang.wire.kernel import Wanted
from madang.wire.session import Ended, Reason

FAILURE = Ended(reason=Reason.EXIT, exit_code=3, duration_s=0.5)


class LabelledAgent(ScriptedAgent):
    """A machine that says more about itself."""

    def __init__(self, node: str = "n1", **facts: str) -> None:
        super().__init__(node)
        self.facts |= facts


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def timed(sqlite_url: str, clock: FakeClock) -> AsyncIterator[ManagerBox]:
    async with manager_box(ManagerSettings(database_url=sqlite_url), clock) as box:
        yield box


async def create(box: ManagerBox, name: str, cpu: float = 1, **more: Any) -> dict[str, Any]:
    body = {"argv": ["train.py"], "name": name, "size": {"cpu": cpu, "mem_bytes": 16 << 20}}
    found: dict[str, Any] = await box.call("POST", "/v1/sessions", {**body, **more})
    return found


async def started(
    box: ManagerBox, agent: ScriptedAgent, name: str, cpu: float, at: float = 0.0, **more: Any
) -> str:
    session = await create(box, name, cpu, **more)
    assignment = await agent.assigned(session["id"])
    await agent.running(assignment, started_at=at or time.time())
    await box.until(name, "RUNNING")
    return str(session["id"])


async def waits(box: ManagerBox, name: str, code: str) -> dict[str, Any]:
    """The session once it waits for this reason."""
    async with asyncio.timeout(PATIENCE_S):
        found: dict[str, Any] = await box.call("GET", f"/v1/sessions/{name}")
        while (found["pending"] or {}).get("code") != code:
            query = f"?wait=5&version={found['version']}"
            found = await box.call("GET", f"/v1/sessions/{name}{query}")
    return found


async def put_group(box: ManagerBox, name: str, text: str, version: int = 0) -> None:
    headers = {"If-Match": f'"{version}"'} if version else {}
    await box.call("PUT", f"/v1/groups/{name}", {"text": text}, headers=headers)


# Groups


async def test_a_session_runs_on_a_machine_of_its_group(either_box: ManagerBox) -> None:
    box = either_box
    await put_group(box, "big", 'order = "fair"')
    here = await box.add_agent(ScriptedAgent("n1"))
    there = await box.add_agent(LabelledAgent("n2", group="big"))
    await there.assigned((await create(box, "in-big", group="big"))["id"])
    await here.assigned((await create(box, "in-default"))["id"])
    groups = await box.call("GET", "/v1/groups")
    assert [(group["name"], group["nodes"]) for group in groups] == [
        ("big", ["n2"]),
        ("default", ["n1"]),
    ]
    await box.call("DELETE", "/v1/groups/big", status=409)


async def test_a_machine_moves_and_a_waiting_session_follows(box: ManagerBox) -> None:
    await put_group(box, "big", "")
    agent = await box.add_agent()
    session = await create(box, "in-big", group="big")
    assert (await waits(box, "in-big", "node.none"))["group"] == "big"
    await box.call("PATCH", "/v1/nodes/n1", {"group": "big"}, status=204)
    await agent.assigned(session["id"])
    await box.call("PATCH", "/v1/nodes/n1", {"group": "nowhere"}, status=404)


async def test_unknown_and_forbidden_groups_are_refused_alike(box: ManagerBox) -> None:
    ann = await box.new_user("ann")
    await put_group(box, "secret", 'projects = ["lab"]')
    texts = []
    for group in ("secret", "nowhere"):
        body = {"group": group}
        answer = await box.call("POST", "/v1/sessions", body, status=403, headers=ann)
        assert answer["code"] == "group.refused"
        texts.append(answer["detail"].replace(group, "…"))
    assert texts[0] == texts[1]
    assert texts[0].endswith("there are default.")
    assert [g["name"] for g in await box.call("GET", "/v1/groups", headers=ann)] == ["default"]
    await box.call("GET", "/v1/groups/secret", status=404, headers=ann)
    await box.call("PUT", "/v1/groups/mine", {"text": ""}, status=403, headers=ann)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('order = "luck"', "order"),
        ("colour = 1", "colour"),
        ("[weights]\nann = 2", "weights"),
        ("[weights]\n'user:ann' = 0", "weights"),
        ("[weights]\n'user:ann' = inf", "weights"),
        ('half_life = "soon"', "half_life"),
        ("priority = 5\npriority_max = 1", "priority_max"),
        ("[preempt]\ngrace = 5", "preempt.grace"),
        ("priority = 1001", "priority"),
        ("= nonsense", "TOML"),
    ],
)
async def test_wrong_settings_are_named(box: ManagerBox, text: str, key: str) -> None:
    answer = await box.call("PUT", "/v1/groups/g", {"text": text}, status=400)
    assert answer["code"] == "group.invalid"
    assert key in answer["detail"]


async def test_settings_change_by_version_only(box: ManagerBox) -> None:
    await put_group(box, "default", 'order = "fair"', version=1)
    headers = {"If-Match": '"1"'}
    await box.call("PUT", "/v1/groups/default", {"text": ""}, status=412, headers=headers)
    await box.call("PUT", "/v1/groups/default", {"text": ""}, status=409)
    assert (await box.call("GET", "/v1/groups/default"))["text"] == 'order = "fair"'
    await box.call("DELETE", "/v1/groups/default", status=409)


# Wishes


async def test_priorities_are_held_to_what_the_group_allows(box: ManagerBox) -> None:
    ann = await box.new_user("ann")
    await put_group(box, "default", "priority = 1\npriority_max = 5", version=1)
    assert (await create(box, "as-usual"))["priority"] == 1
    for priority, status in ((5, 201), (6, 403), (-1000, 201)):
        body = {"priority": priority}
        answer = await box.call("POST", "/v1/sessions", body, status=status, headers=ann)
        assert answer.get("priority", priority) == priority
    assert (await create(box, "of-an-administrator", priority=1000))["priority"] == 1000


async def test_a_session_comes_after_another(box: ManagerBox) -> None:
    agent = await box.add_agent()
    first = await agent.assigned((await create(box, "first"))["id"])
    second = await create(box, "second", after=["first"])
    third = await create(box, "third", after=["second"], after_any=True)
    found = await waits(box, "second", "dependency.waits")
    assert found["pending"]["text"] == "waits for first to end."
    await agent.ended(first, SUCCESS)
    await agent.ended(await agent.assigned(second["id"]), FAILURE)
    await agent.assigned(third["id"])
    await create(box, "fourth", after=["second"])
    ended = (await box.until("fourth", "TERMINATED"))["ended"]
    assert (ended["reason"], ended["exit_code"]) == ("given_up", None)
    assert "did not end well" in ended["text"]


async def test_one_comes_after_nobody_that_it_may_not_see(box: ManagerBox) -> None:
    ann = await box.new_user("ann")
    await create(box, "foreign")
    await box.call("POST", "/v1/sessions", {"after": ["foreign"]}, status=404, headers=ann)


async def test_start_times_and_patience(timed: ManagerBox, clock: FakeClock) -> None:
    agent = await timed.add_agent()
    later = await create(timed, "later", not_before=clock.now() + 60)
    await waits(timed, "later", "time.later")
    await create(timed, "too-large-now", 4, give_up_after_s=30)
    await agent.running(
        await agent.assigned((await timed.call("GET", "/v1/sessions/too-large-now"))["id"])
    )
    await create(timed, "patient", 4, give_up_after_s=30)
    await waits(timed, "patient", "capacity.cpu")
    for _ in range(8):
        await agent.send()
        await clock.advance(5)
    ended = (await timed.until("patient", "TERMINATED"))["ended"]
    assert ended["text"].startswith("given up after waiting")
    await timed.call("POST", "/v1/sessions/too-large-now/stop", {"grace_s": 0})
    await agent.ended(
        await agent.assigned(
            (await timed.call("GET", "/v1/sessions/too-large-now"))["id"], Wanted.STOP
        )
    )
    for _ in range(6):
        await agent.send()
        await clock.advance(5)
    await agent.assigned(later["id"])


async def test_labels_architecture_and_offers_choose_the_machine(box: ManagerBox) -> None:
    plain = await box.add_agent(LabelledAgent("n1", arch="x86_64", networks="none"))
    ssd = await box.add_agent(LabelledAgent("n2", labels="disk=ssd, rack=7", networks="none, full"))
    await ssd.assigned((await create(box, "on-ssd", node_labels=["disk=ssd"]))["id"])
    await ssd.assigned((await create(box, "online", network={"mode": "full"}))["id"])
    await plain.assigned((await create(box, "on-x86", arch="x86_64"))["id"])
    for body, code in (
        ({"node_labels": ["disk=tape"]}, "group.refused"),
        ({"network": {"mode": "allow", "allow": ["example.org"]}}, "network.refused"),
        ({"runtime": "runc"}, "runtime.not_offered"),
        ({"size": {"cpu": 5}}, "size.impossible"),
    ):
        async with box.http.post("/v1/sessions", json=body) as response:
            assert (await response.json())["code"] == code


async def test_sessions_apart_share_no_machine(box: ManagerBox) -> None:
    one, two = await box.add_agent(ScriptedAgent("n1")), await box.add_agent(ScriptedAgent("n2"))
    await create(box, "apart-a", apart="shards")
    await create(box, "apart-b", apart="shards")
    await box.until("apart-a", "SCHEDULED")
    await box.until("apart-b", "SCHEDULED")
    assert (len(one.wanted), len(two.wanted)) == (1, 1)
    await create(box, "apart-c", apart="shards")
    assert (
        "apart from shards" in (await waits(box, "apart-c", "constraint.none"))["pending"]["text"]
    )


@pytest.mark.parametrize(
    "body",
    [
        {"group": "No Name"},
        {"after": ["a"] * 17},
        {"node_labels": ["novalue"]},
        {"apart": "two words"},
        {"not_before": 1e300},
        {"give_up_after_s": 0},
        {"arch": "x" * 64},
    ],
)
async def test_senseless_wishes_are_refused(box: ManagerBox, body: dict[str, Any]) -> None:
    await box.call("POST", "/v1/sessions", body, status=400)


async def test_one_of_higher_priority_has_a_preemptible_one_end(
    timed: ManagerBox, clock: FakeClock
) -> None:
    text = 'reserve_after = "10s"\npriority_max = 9\n[preempt]\nfrom_priority = 5\ngrace = "3s"\n'
    await put_group(timed, "default", f'{text}min_run = "20s"', version=1)
    agent = await timed.add_agent()
    low = await started(timed, agent, "low", 4, clock.now(), preemptible=True)
    await started_waiting(timed, "firm-but-low", 4, priority=4)
    high = await create(timed, "high", 4, priority=5)
    await waits(timed, "high", "capacity.cpu")
    for _ in range(3):
        await agent.send()
        await clock.advance(5)
    assert (await timed.call("GET", "/v1/sessions/low"))["status"] == "RUNNING", "not 20 s yet"
    for _ in range(3):
        await agent.send()
        await clock.advance(5)
    told = await agent.assigned(low, Wanted.STOP)
    assert (told.stop_reason, told.spec.grace_s) == ("preempted", 3)
    assert told.stop_text == "gave way to high: its priority is 5."
    await agent.ended(told, Ended(reason=Reason.PREEMPTED, exit_code=143))
    await agent.assigned(high["id"])
    assert (await timed.until("low", "TERMINATED"))["result"] == "cancelled"


async def started_waiting(box: ManagerBox, name: str, cpu: float, **more: Any) -> None:
    await create(box, name, cpu, **more)
    await waits(box, name, "capacity.cpu")


# Fair shares


async def test_who_had_less_comes_first_under_fair_share(box: ManagerBox) -> None:
    ann, bob = await box.new_user("ann"), await box.new_user("bob")
    await put_group(box, "default", 'order = "fair"', version=1)
    agent = await box.add_agent()

    async def make(name: str, who: dict[str, str]) -> str:
        body = {"argv": ["x"], "name": name, "size": {"cpu": 4, "mem_bytes": 16 << 20}}
        return str((await box.call("POST", "/v1/sessions", body, headers=who))["id"])

    first = await agent.assigned(await make("ann-1", ann))
    await agent.running(first)
    later = await make("ann-2", ann)
    next_one = await make("bob-1", bob)
    await waits(box, "bob-1", "capacity.cpu")
    await agent.ended(first)
    second = await agent.assigned(next_one)
    assert (
        later not in {kernel.session for kernel in agent.wanted if kernel.session != next_one}
        or (await box.call("GET", "/v1/sessions/ann-2"))["status"] == "PENDING"
    )
    await agent.ended(second)
    await agent.assigned(later)


# Why


async def test_why_names_reason_place_estimate_and_what_helps(box: ManagerBox) -> None:
    agent = await box.add_agent()
    await started(box, agent, "holder", 3, size={"cpu": 3, "mem_bytes": 16 << 20, "time_s": 600})
    await create(box, "one", 2)
    await waits(box, "one", "capacity.cpu")
    await create(box, "two", 2)
    await waits(box, "two", "capacity.cpu")
    why = await box.call("GET", "/v1/sessions/two/why")
    assert (why["place"], why["waiting"], why["group"]) == (2, 2, "default")
    assert "holder holds 3" in why["pending"]["text"]
    assert time.time() < why["pending"]["start_p50"] < why["pending"]["start_p90"]
    texts = [option["text"] for option in why["options"]]
    assert "starts now with cpu 1" in texts
    assert "starts after holder ends" in texts
    queue = await box.call("GET", "/v1/queue")
    assert [(e["name"], e["place"]) for e in queue["items"]] == [("one", 1), ("two", 2)]
    running = await box.call("GET", "/v1/sessions/holder/why")
    assert (running["node"], running.get("pending")) == ("n1", None)


async def test_others_in_the_queue_are_counted_but_not_shown(box: ManagerBox) -> None:
    ann = await box.new_user("ann")
    await create(box, "foreign")
    await waits(box, "foreign", "node.none")
    await box.call("POST", "/v1/sessions", {"name": "of-ann"}, headers=ann)
    queue = await box.call("GET", "/v1/queue", headers=ann)
    assert [(entry["name"], entry["place"]) for entry in queue["items"]] == [("of-ann", 2)]
    assert queue["waiting"] == 2
    await box.call("GET", "/v1/sessions/foreign/why", status=404, headers=ann)


async def test_a_preview_tells_where_or_why_and_stores_nothing(box: ManagerBox) -> None:
    agent = await box.add_agent()
    body = {"argv": ["x"], "size": {"cpu": 2, "mem_bytes": 16 << 20}}
    assert (await box.call("POST", "/v1/queue/preview", body))["node"] == "n1"
    await started(box, agent, "holder", 3)
    why = await box.call("POST", "/v1/queue/preview", body)
    assert why["pending"]["code"] == "capacity.cpu"
    assert {"text": "starts now with cpu 1", "after": ""} in why["options"]
    assert [s["name"] for s in (await box.call("GET", "/v1/sessions"))["items"]] == ["holder"]


async def test_forecasts_are_compared_with_what_came(box: ManagerBox) -> None:
    agent = await box.add_agent()
    holder = await started(box, agent, "holder", 4)
    waiting = await create(box, "waiting", 4)
    assert (await waits(box, "waiting", "capacity.cpu"))["pending"]["start_p90"] is not None
    await agent.ended(agent.wanted[next(k for k in agent.wanted if k.session == holder)])
    await agent.assigned(waiting["id"])
    await create(box, "another", 4)
    await waits(box, "another", "capacity.cpu")
    forecast = (await box.call("GET", "/v1/queue"))["forecasts"]["default"]
    assert (forecast["told"], forecast["coverage"]) == (1, 1.0)


# The log of decisions


async def test_decisions_are_written_down_and_come_out_again(either_box: ManagerBox) -> None:
    box = either_box
    agent = await box.add_agent()
    agent.auto = True
    for number in range(12):
        await create(box, f"s-{number}", 1 + number % 4)
    for number in range(12):
        await box.until(f"s-{number}", "TERMINATED")
    async with box.manager.database.read() as tx:
        rows = await scheduling.list_decisions(tx, start=0, until=1 << 62, limit=1000)
        runs = await scheduling.list_runs(tx, after=0, since=0, limit=100)
    assert [bool(row.whole) for row in rows] == [True] + [False] * (len(rows) - 1)
    placed = 0
    for snapshot, policies, now, digest in read(rows):
        again = plan(snapshot, policies, now)
        assert digest_of(again) == digest
        placed += len(again.places)
    assert placed == 12
    assert sorted(run.name for run in runs) == sorted(f"s-{n}" for n in range(12))
    assert all(run.scheduled_at and run.program == "train.py" for run in runs)


async def test_a_replay_tells_what_another_policy_would_have_done(box: ManagerBox) -> None:
    ann = await box.new_user("ann")
    began = time.time() - 1
    agent = await box.add_agent()
    agent.auto = True
    for number in range(8):
        await create(box, f"s-{number}", 4)
    for number in range(8):
        await box.until(f"s-{number}", "TERMINATED")
    question = {
        "since": began,
        "until": time.time(),
        "set": {"order": "drf", "weights.user:ann": "2"},
        "add_nodes": [{"cpu": 64, "mem_bytes": 64 << 30}],
    }
    found = await box.call("POST", "/v1/queue/replay", question)
    assert found["happened"]["started"] == found["unchanged"]["started"] == 8
    assert found["changed"]["mean_wait_s"] == 0.0
    assert found["unchanged"]["mean_wait_s"] >= 0.0
    assert (found["decisions"] > 0, found["different"]) == (True, 0)
    await box.call("POST", "/v1/queue/replay", question, status=403, headers=ann)
    for wrong in (
        {"set": {"order": "luck"}},
        {"until": 1.0},
        {"add_nodes": [{"cpu": 1, "mem_bytes": 0}]},
    ):
        await box.call("POST", "/v1/queue/replay", {**question, **wrong}, status=400)
    await box.call("POST", "/v1/queue/replay", {**question, "group": "x"}, status=404)


async def test_reserved_machines_are_for_their_project(box: ManagerBox) -> None:
    ann = await box.new_user("ann")
    agent = await box.add_agent()
    now = time.time()
    draft = {"name": "course", "starts_at": now - 1, "ends_at": now + 3600}
    await box.call("POST", "/v1/reservations", draft, status=403, headers=ann)
    made = await box.call("POST", "/v1/reservations", draft, status=201)
    assert (made["nodes"], made["project"]) == (["n1"], "default")
    for wrong, status in (
        ({}, 409),
        ({"name": "b2"}, 409),
        ({"name": "b2", "nodes": ["n9"]}, 404),
        ({"name": "b2", "ends_at": now - 5}, 400),
        ({"name": "b2", "project": "nobody"}, 404),
        ({"name": "b2", "group": "nowhere"}, 404),
    ):
        await box.call("POST", "/v1/reservations", {**draft, **wrong}, status=status)
    inside = await create(box, "inside", reservation="course")
    await agent.assigned(inside["id"])
    outside = await create(box, "outside")
    await waits(box, "outside", "constraint.none")
    await box.call("POST", "/v1/sessions", {"reservation": "other"}, status=404)
    assert [r["name"] for r in await box.call("GET", "/v1/reservations", headers=ann)] == ["course"]
    await box.call("DELETE", "/v1/reservations/course", status=403, headers=ann)
    await box.call("DELETE", "/v1/reservations/course", status=204)
    await agent.assigned(outside["id"])


async def test_the_log_has_an_end_and_can_be_read_from_there(either_box: ManagerBox) -> None:
    agent = await either_box.add_agent()
    for number in range(5):
        await started(either_box, agent, f"s-{number}", 0.5)
    async with either_box.manager.database.begin() as tx:
        await scheduling.add_decision(tx, at=1 << 50, whole=True, inputs=b"", digest="")
        rows = await scheduling.list_decisions(tx, start=0, until=1 << 62, limit=100)
        await scheduling.prune(tx, before=0, kept=len(rows) - 1)
        kept = await scheduling.list_decisions(tx, start=0, until=1 << 62, limit=100)
        assert len(kept) == len(rows), "the second is not whole: nothing could be read from it"
        await scheduling.prune(tx, before=1 << 51)
        kept = await scheduling.list_decisions(tx, start=0, until=1 << 62, limit=100)
        assert [row.at for row in kept] == [1 << 50]


async def test_a_session_has_a_reason_before_any_pass_has_looked_at_it(box: ManagerBox) -> None:
    await box.manager._scheduler.stop()
    session = await create(box, "new")
    why = await box.call("GET", "/v1/sessions/new/why")
    queue = await box.call("GET", "/v1/queue")

    for pending in (why["pending"], queue["items"][0]["pending"]):
        assert (pending["code"], pending["since"]) == ("queue.new", session["created_at"])
