"""Limits through the API, against both databases."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any
from urllib.parse import quote

import pytest

from madang.manager.app import ManagerSettings
from madang.manager.session import store as session_store
from madang.testing.manager import ManagerBox, ScriptedAgent, manager_box
from madang.testing.patience import PATIENCE_S
from madang.wire.kernel import Capacity, Wanted

SMALL = {"cpu": 1, "mem_bytes": 64 << 20, "disk_bytes": 64 << 20, "pids": 32}


async def apply(box: ManagerBox, name: str, text: str, *targets: str) -> None:
    await box.call("PUT", f"/v1/limits/{name}", {"text": f"version = 1\n{text}"})
    for target in targets:
        await box.call("PUT", f"/v1/limits-of/{target}", {"name": name})


async def create(box: ManagerBox, size: dict[str, Any] | None = None, **kw: Any) -> Any:
    body = {"argv": ["sleep", "9"], "size": SMALL | (size or {})}
    return await box.call("POST", "/v1/sessions", body, **kw)


async def test_the_texts_have_versions_and_are_read_by_those_they_concern(
    either_box: ManagerBox,
) -> None:
    box = either_box
    ann, ben = await box.new_user("ann"), await box.new_user("ben")
    made = await box.call("PUT", "/v1/limits/lab", {"text": "version = 1\nsessions = 3"})
    assert (made["version"], made["author"], made["targets"]) == (1, "admin", [])
    again = await box.call("PUT", "/v1/limits/lab", {"text": "version = 1\nsessions = 3"})
    assert again["version"] == 1
    stale = {"If-Match": '"7"'}
    body = {"text": "version = 1\nsessions = 4", "note": "more"}
    await box.call("PUT", "/v1/limits/lab", body, status=412, headers=stale)
    changed = await box.call("PUT", "/v1/limits/lab", body, headers={"If-Match": '"1"'})
    assert changed["version"] == 2
    found = await box.call("GET", "/v1/limits/lab/history")
    assert [(each["version"], each["note"]) for each in found] == [(2, "more"), (1, "")]
    bad = await box.call("PUT", "/v1/limits/lab", {"text": "version = 1\nx = 1"}, status=400)
    assert bad["code"] == "limits.invalid"

    await box.call("GET", "/v1/limits/lab", status=404, headers=ann)
    await box.call("PUT", "/v1/limits-of/user:ann", {"name": "lab"})
    assert (await box.call("GET", "/v1/limits/lab"))["targets"] == ["user:ann"]
    assert (await box.call("GET", "/v1/limits/lab", headers=ann))["targets"] == ["user:ann"]
    assert [e["name"] for e in (await box.call("GET", "/v1/limits", headers=ann))["items"]] == [
        "lab"
    ]
    for path in ("/v1/limits/lab", "/v1/limits/lab/history", "/v1/limits-of/user:ann"):
        assert (await box.call("GET", path, status=404, headers=ben))["code"] == "object.not_found"
    assert (await box.call("GET", "/v1/limits", headers=ben))["items"] == []
    await box.call("PUT", "/v1/limits/lab", body, status=403, headers=ann)
    await box.call("PUT", "/v1/limits-of/user:ann", {"name": None}, status=403, headers=ann)
    await box.call("DELETE", "/v1/limits/lab", status=403, headers=ann)

    refused = await box.call("DELETE", "/v1/limits/lab", status=409)
    assert "assigned to 1" in refused["detail"]
    await box.call("PUT", "/v1/limits-of/user:ann", {"name": None})
    await box.call("PUT", "/v1/limits-of/user:ann", {"name": None}, status=404)
    await box.call("DELETE", "/v1/limits/lab")
    await box.call("GET", "/v1/limits/lab", status=404)
    await box.call("PUT", "/v1/limits-of/user:ann", {"name": "lab"}, status=404)
    assert (await box.call("GET", "/v1/limits/lab/history"))[0]["removed"] is True
    assert (await box.call("PUT", "/v1/limits/lab", body))["version"] == 4


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("mood:ann", 400), ("user:", 400), ("user", 400), ("user:nobody", 404),
        ("project:no/default", 404), ("user:a/b/c", 404), ("user:x'; DROP TABLE users", 404),
        ("token:ann/none", 404), ("user:*x", 404), ("domain:default/default", 404),
    ],
)  # fmt: skip
async def test_whoever_is_not_there_gets_nothing(box: ManagerBox, target: str, status: int) -> None:
    await apply(box, "lab", "sessions = 1")
    path = f"/v1/limits-of/{quote(target, safe='')}"
    await box.call("PUT", path, {"name": "lab"}, status=status)
    await box.call("GET", path, status=status)


async def test_an_own_assignment_counts_in_place_of_the_default(either_box: ManagerBox) -> None:
    box = either_box
    ann, ben = await box.new_user("ann"), await box.new_user("ben")
    await apply(box, "basic", "sessions = 1", "user:*")
    await apply(box, "more", "sessions = 2", "user:ann")
    await create(box, headers=ann)
    await create(box, headers=ann)
    await create(box, headers=ben)
    for who, count in ((ann, 2), (ben, 1)):
        problem = await create(box, headers=who, status=409)
        assert problem["code"] == "limit.exceeded"
        assert f": sessions {count} at once, {count} used → 0 left" in problem["detail"]
    found = (await box.call("GET", "/v1/limits-of/me", headers=ben))["accounts"]
    assert [(e["shown"], e["name"], e["default"]) for e in found] == [("user ben", "basic", True)]
    assert found[0]["counted"] == [{"what": "sessions", "limit": 1, "used": 1, "left": 0}]
    own = (await box.call("GET", "/v1/limits-of/user:ann", headers=ann))["accounts"][0]
    assert (own["name"], own["default"]) == ("more", False)


async def test_the_tightest_of_token_user_project_and_domain_is_named(
    either_box: ManagerBox,
) -> None:
    box = either_box
    ann = await box.new_user("ann")
    for number, target in enumerate(("domain:default", "project:default", "user:ann", "token:ann")):
        await apply(box, f"l{number}", f"[session]\ncpu = {4 - number}", target)
        problem = await create(box, {"cpu": 4.5}, headers=ann, status=409)
        assert problem["code"] == "limit.refused"
        assert problem["details"]["limits"] == f"l{number}"
        assert problem["details"]["account"].startswith(target.partition(":")[0])
        assert f"cpu {4 - number} a session, asked 4.5" in problem["detail"]


async def test_a_session_without_a_time_limit_gets_the_shortest(either_box: ManagerBox) -> None:
    box = either_box
    ann = await box.new_user("ann")
    await apply(box, "day", 'time = "24h"', "domain:default")
    await apply(box, "hour", 'time = "1h"', "user:ann")
    assert (await create(box, headers=ann))["size"]["time_s"] == 3600
    assert (await create(box, {"time_s": 60}, headers=ann))["size"]["time_s"] == 60
    assert (await create(box))["size"]["time_s"] == 86400
    problem = await create(box, {"time_s": 4000}, headers=ann, status=409)
    assert problem["detail"].startswith("user ann: a session runs at most 1h, asked 1h6m40s.")
    dry = await box.call(
        "POST", "/v1/sessions?dry_run=true", {"argv": ["true"], "size": {"time_s": 4000}},
        status=409, headers=ann,
    )  # fmt: skip
    assert dry["code"] == "limit.refused"


async def test_many_creates_at_once_never_pass_a_limit(either_box: ManagerBox) -> None:
    box = either_box
    ann = await box.new_user("ann")
    await apply(box, "few", "sessions = 5\npending = 3", "user:ann")

    async def one() -> int:
        body = {"argv": ["sleep", "9"], "size": SMALL}
        async with box.http.post("/v1/sessions", json=body, headers=ann) as response:
            return response.status

    statuses = Counter(await asyncio.gather(*(one() for _ in range(20))))
    assert statuses == {201: 3, 409: 17}


async def test_slots_at_once_make_a_session_wait_and_say_for_whom(either_box: ManagerBox) -> None:
    box = either_box
    ann = await box.new_user("ann")
    agent = await box.add_agent()
    await apply(box, "two", "[at_once]\ncpu = 2", "project:default")
    first = await create(box, {"cpu": 1.5}, headers=ann)
    assignment = await agent.assigned(first["id"])
    second = await create(box, {"cpu": 1}, headers=ann)
    async with asyncio.timeout(PATIENCE_S):
        while second["pending"] is None:
            path = f"/v1/sessions/{second['id']}?wait=5&version={second['version']}"
            second = await box.call("GET", path)
    assert second["pending"]["code"] == "limit.project.cpu"
    assert "project default: asks 1, 0.5 of 2 left" in second["pending"]["text"]
    await agent.running(assignment)
    await agent.ended(assignment)
    await agent.assigned(second["id"])


async def test_the_month_is_counted_by_the_ledger(either_box: ManagerBox) -> None:
    box = either_box
    ann = await box.new_user("ann")
    agent = await box.add_agent()
    await apply(box, "none", "cpu_hours = 0", "user:ann")
    problem = await create(box, headers=ann, status=409)
    assert "0 CPU-hours a month, 0 used" in problem["detail"]
    await apply(box, "none", "cpu_hours = 1", "user:ann")
    made = await create(box, {"cpu": 2}, headers=ann)
    assignment = await agent.assigned(made["id"])
    now = box.manager.identity._clock.now()
    await agent.running(assignment, started_at=now - 3600)
    await box.until(made["id"], "RUNNING")
    problem = await create(box, headers=ann, status=409)
    assert problem["details"]["what"] == "cpu_hours"
    assert problem["details"]["used"] >= 2
    found = (await box.call("GET", "/v1/limits-of/me", headers=ann))["accounts"][0]
    assert found["counted"][0]["left"] == 0


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_that_happens_in_any_order_passes_a_limit(sqlite_url: str, seed: int) -> None:
    """Creates, ends, stops and changed limits of several accounts, at random and at once."""
    draw = random.Random(seed)
    async with manager_box(ManagerSettings(database_url=sqlite_url)) as box:
        big = Capacity(cpu=64, mem_bytes=64 << 30, disk_bytes=1 << 40, pids=10_000)
        agent = await box.add_agent(ScriptedAgent(capacity=big))
        people = [await box.new_user(name) for name in ("ann", "ben")]
        most = {"user:ann": (3, 4), "user:ben": (6, 9), "project:default": (7, 11)}
        for number, (target, (cpu, sessions)) in enumerate(most.items()):
            await apply(box, f"l{number}", f"sessions = {sessions}\n[at_once]\ncpu = {cpu}", target)

        async def some_create() -> None:
            body = {"argv": ["sleep", "9"], "size": SMALL | {"cpu": draw.choice([0.5, 1, 2])}}
            async with box.http.post("/v1/sessions", json=body, headers=draw.choice(people)) as got:
                assert got.status in {201, 409}, await got.text()

        async def some_end() -> None:
            running = [a for a in agent.wanted.values() if a.wanted is Wanted.RUN]
            if running:
                assignment = draw.choice(running)
                await agent.running(assignment)
                await agent.ended(assignment)

        async def some_stop() -> None:
            for each in (await box.call("GET", "/v1/sessions"))["items"][:1]:
                await box.call("POST", f"/v1/sessions/{each['id']}/stop", {})

        for _ in range(12):
            doings = draw.choices([some_create, some_end, some_stop], [6, 3, 1], k=6)
            await asyncio.gather(*(do() for do in doings))
            async with box.manager.database.read() as tx:
                for account, (cpu, sessions) in most.items():
                    held = await session_store.sum_of(tx, account)
                    assert held["cpu_milli"] <= cpu * 1000, (account, held)
                    counts = await session_store.count_of(tx, account)
                    assert sum(counts.values()) <= sessions, (account, counts)
        await box.stop_links()


async def test_presets_fill_what_the_request_leaves_open(either_box: ManagerBox) -> None:
    box = either_box
    ann = await box.new_user("ann")
    names = [each["name"] for each in await box.call("GET", "/v1/presets", headers=ann)]
    assert names == ["large", "medium", "small"]
    body: dict[str, Any] = {"argv": ["true"], "preset": "small", "size": {"cpu": 1.5}}
    made = await box.call("POST", "/v1/sessions", body, headers=ann)
    assert (made["size"]["cpu"], made["size"]["mem_bytes"]) == (1.5, 512 << 20)
    problem = await box.call("POST", "/v1/sessions", body | {"preset": "huge"}, status=404)
    assert problem["code"] == "preset.unknown"
    assert "there are: large, medium, small" in problem["detail"]

    tiny = {"size": {"cpu": 0.1, "time_s": 60}, "about": "for tests"}
    await box.call("PUT", "/v1/presets/tiny", tiny, status=403, headers=ann)
    await box.call("PUT", "/v1/presets/tiny", tiny, status=412, headers={"If-Match": '"1"'})
    assert (await box.call("PUT", "/v1/presets/tiny", tiny))["version"] == 1
    assert (await box.call("PUT", "/v1/presets/tiny", tiny))["version"] == 2
    made = await box.call("POST", "/v1/sessions", {"argv": ["true"], "preset": "tiny"})
    assert (made["size"]["cpu"], made["size"]["time_s"]) == (0.1, 60)
    wrong: Any
    for wrong in ({"size": {}}, {"size": {"cpu": -1}}, {"size": {"cpu": 1}, "about": "a\nb"}):
        await box.call("PUT", "/v1/presets/tiny", wrong, status=400)
    await box.call("PUT", "/v1/presets/NO", tiny, status=400)
    await box.call("DELETE", "/v1/presets/tiny", status=403, headers=ann)
    await box.call("DELETE", "/v1/presets/tiny")
    await box.call("DELETE", "/v1/presets/tiny", status=404)


async def test_changes_stand_in_the_audit_log(either_box: ManagerBox) -> None:
    box = either_box
    await apply(box, "lab", "sessions = 1", "user:*")
    await box.call("PUT", "/v1/limits-of/user:*", {"name": None})
    await box.call("DELETE", "/v1/limits/lab")
    await box.call("PUT", "/v1/presets/tiny", {"size": {"cpu": 1}})
    await box.call("DELETE", "/v1/presets/tiny")
    async with box.manager.database.read() as tx:
        caller = await box.manager.identity.authenticate(f"Bearer {box.token}")
        del tx
    found = [r for r in await box.manager.audit.list(caller) if r.kind != "token"]
    assert [(r.action, r.id) for r in reversed(found)][-6:] == [
        ("limits.applied", "lab"),
        ("limits.assigned", "user:*"),
        ("limits.assigned", "user:*"),
        ("limits.removed", "lab"),
        ("preset.set", "tiny"),
        ("preset.removed", "tiny"),
    ]
