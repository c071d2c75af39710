"""The API over real HTTP: refusals, reading, conditions, description."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import struct
import time
from dataclasses import asdict
from typing import Any

import aiohttp
import pytest

from madang.manager.identity.types import Principal, Role
from madang.manager.session.rules import check_spec
from madang.testing.manager import ManagerBox, ScriptedAgent
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import NotFound
from madang.wire.kernel import HostLoad, WarmLoad
from madang.wire.session import SessionSpec

TRUE = {"argv": ["true"]}


async def post(box: ManagerBox, body: dict[str, Any], status: int = 201) -> Any:
    return await box.call("POST", "/v1/sessions", body, status=status)


OPEN = ["/v1/health", "/v1/errors", "/v1/errors/internal", "/v1/openapi.json"]
CLOSED = [
    "/v1/info", "/v1/whoami", "/v1/sessions", "/v1/sessions/x", "/v1/sessions/x/history",
    "/v1/sessions/x/logs", "/v1/run", "/v1/sessions/x/attach", "/v1/sessions/x/exec",
    "/v1/sessions/x/files", "/v1/images", "/v1/nodes", "/v1/events", "/metrics",
]  # fmt: skip


async def test_everything_but_the_open_paths_needs_a_token(box: ManagerBox) -> None:
    async with aiohttp.ClientSession(box.url) as stranger:
        for path in OPEN:
            async with stranger.get(path) as response:
                assert response.status == 200, path
        for path in CLOSED:
            async with stranger.get(path) as response:
                assert response.status == 401, path
                assert response.headers["WWW-Authenticate"] == "Bearer"
    described = await box.call("GET", "/v1/openapi.json")
    unprotected = {
        path
        for path, methods in described["paths"].items()
        if any(not operation["security"] for operation in methods.values())
    }
    assert unprotected == {
        "/v1/health", "/v1/errors", "/v1/errors/{code}", "/v1/login", "/v1/invitations/accept",
    }  # fmt: skip


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer mdg_wrong", "Basic mdg_x", "Bearer x" * 500, "Bearer mdg_é"]
)
async def test_wrong_tokens_are_refused(box: ManagerBox, header: str) -> None:
    async with aiohttp.ClientSession(box.url) as stranger:
        async with stranger.get("/v1/whoami", headers={"Authorization": header}) as response:
            assert response.status in {400, 401}


async def test_a_revoked_token_is_refused(box: ManagerBox) -> None:
    identity = box.manager.identity
    secret = await identity.new_admin_token("second")
    principal = await identity.authenticate(f"Bearer {secret.reveal()}")
    assert principal.token == "second"
    assert await identity.revoke(principal.token_id)
    assert not await identity.revoke(principal.token_id)
    headers = {"Authorization": f"Bearer {secret.reveal()}"}
    async with box.http.get("/v1/whoami", headers=headers) as response:
        assert response.status == 401


async def test_no_token_is_stored_in_the_database(box: ManagerBox, sqlite_url: str) -> None:
    data = b""
    for suffix in ("", "-wal"):
        with open(sqlite_url.removeprefix("sqlite:///") + suffix, "rb") as file:
            data += file.read()
    assert box.token.encode() not in data
    assert hashlib.sha256(box.token.encode()).hexdigest().encode() in data


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"argv": ["a\0b"]}, "request.invalid"),
        ({"argv": [""]}, "request.invalid"),
        ({"argv": ["x" * (1 << 20)]}, "request.invalid"),
        ({"argv": "true"}, "request.invalid"),
        ({"argv": ["é"], "argv_encoding": "ascii"}, "request.invalid"),
        ({"argv": ["안"], "argv_encoding": "latin-1"}, "request.invalid"),
        ({**TRUE, "name": "../x"}, "request.invalid"),
        ({**TRUE, "name": "a"}, "request.invalid"),
        ({**TRUE, "name": "X" * 41}, "request.invalid"),
        ({**TRUE, "env": {"A=B": "c"}}, "request.invalid"),
        ({**TRUE, "env": {"A": "b\0"}}, "request.invalid"),
        ({**TRUE, "env": {"A": "b" * (1 << 20)}}, "request.invalid"),
        ({**TRUE, "labels": {"": ""}}, "request.invalid"),
        ({**TRUE, "labels": {str(n): "" for n in range(40)}}, "request.invalid"),
        ({**TRUE, "grace_s": -1}, "request.invalid"),
        ({**TRUE, "grace_s": 1e30}, "request.invalid"),
        ({**TRUE, "rows": 0}, "request.invalid"),
        ({**TRUE, "workspace": "../x"}, "request.invalid"),
        ({**TRUE, "size": {"cpu": 0}}, "size.invalid"),
        ({**TRUE, "size": {"cpu": -1}}, "size.invalid"),
        ({**TRUE, "size": {"cpu": 1e30}}, "size.invalid"),
        ({**TRUE, "size": {"mem_bytes": 1}}, "size.invalid"),
        ({**TRUE, "size": {"mem_bytes": 2**70}}, "size.invalid"),
        ({**TRUE, "size": {"pids": 0}}, "size.invalid"),
        ({**TRUE, "size": {"time_s": 0}}, "size.invalid"),
        ({**TRUE, "image": "missing"}, "image.unknown"),
        ({**TRUE, "workspace": "a" * 64}, "workspace.incomplete"),
    ],
)
async def test_bad_sessions_are_refused_in_words(
    box: ManagerBox, body: dict[str, Any], code: str
) -> None:
    data = io.BytesIO(json.dumps(body).encode())
    async with box.http.post("/v1/sessions", data=data) as response:
        problem = await response.json(content_type=None)
        assert 400 <= response.status < 500
        assert response.content_type == "application/problem+json"
        assert problem["code"] == code, problem
        assert problem["status"] == response.status
        assert len(problem["detail"]) < 400
    assert (await box.call("GET", "/v1/sessions?all=1"))["items"] == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b'{"argv":[1]}', b"[" * 9999])
async def test_bodies_that_are_no_session_are_refused(box: ManagerBox, body: bytes) -> None:
    async with box.http.post("/v1/sessions", data=body) as response:
        assert response.status == (201 if body == b"" else 400)


async def test_ten_megabytes_of_arguments_are_too_large(box: ManagerBox) -> None:
    body = io.BytesIO(json.dumps({"argv": ["x" * 10_000_000]}).encode())
    problem = await box.call("POST", "/v1/sessions", data=body, status=400)
    assert "10000001 bytes of arguments" in problem["detail"]
    body = io.BytesIO(b" " * 70_000)
    problem = await box.call("POST", "/v1/sessions/x/stop", data=body, status=413)
    assert problem["code"] == "request.too_large"


async def test_refs_are_ids_names_and_unique_prefixes(box: ManagerBox) -> None:
    one = await post(box, {**TRUE, "name": "calm-otter"})
    await post(box, {**TRUE, "name": "calm-owl"})
    for ref in (one["id"], "calm-otter", "calm-ot"):
        assert (await box.call("GET", f"/v1/sessions/{ref}"))["id"] == one["id"]
    problem = await box.call("GET", "/v1/sessions/calm", status=409)
    assert problem["code"] == "object.ambiguous"
    for ref in ("calm-x", "%25", "CALM", "a_b", "..%2Fx", "x" * 300, "%00"):
        await box.call("GET", f"/v1/sessions/{ref}", status=404)
    problem = await post(box, {**TRUE, "name": "calm-owl"}, 409)
    assert problem["code"] == "object.conflict"


async def test_pages_go_through_all_once_newest_first(box: ManagerBox) -> None:
    made = [(await post(box, TRUE))["id"] for _ in range(7)]
    found: list[str] = []
    cursor = ""
    while True:
        page = await box.call("GET", f"/v1/sessions?limit=3{cursor}")
        found += [session["id"] for session in page["items"]]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert sorted(found) == sorted(made)
    assert found == sorted(found, reverse=True)
    await box.call("POST", f"/v1/sessions/{made[0]}/stop", {})
    assert len((await box.call("GET", "/v1/sessions"))["items"]) == 6
    assert len((await box.call("GET", "/v1/sessions?all=1"))["items"]) == 7
    ended = await box.call("GET", "/v1/sessions?status=TERMINATED")
    assert [session["id"] for session in ended["items"]] == [made[0]]
    for query in ("limit=0", "limit=x", "cursor=../", "status=GONE", "unknown=1", "wait=-1"):
        await box.call("GET", f"/v1/sessions?{query}", status=400)


async def test_waiting_reads_return_with_the_change(box: ManagerBox) -> None:
    session = await post(box, TRUE)
    session = await box.call("GET", f"/v1/sessions/{session['id']}?wait=5&version=1")  # node.none
    path = f"/v1/sessions/{session['id']}"
    waiting = asyncio.create_task(box.call("GET", f"{path}?wait=30&version={session['version']}"))
    async with box.http.get("/v1/sessions") as response:
        since = response.headers["Madang-Event"]
    listing = asyncio.create_task(box.call("GET", f"/v1/sessions?wait=30&since={since}&all=1"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert not listing.done()
    await box.call("POST", f"{path}/stop", {})
    assert (await waiting)["status"] == "TERMINATED"
    assert (await listing)["items"][0]["status"] == "TERMINATED"
    began = time.monotonic()
    await box.call("GET", f"{path}?wait=0.1&version={(await waiting)['version']}")
    assert time.monotonic() - began < 20


async def test_conditions_hold(box: ManagerBox) -> None:
    session = await post(box, TRUE)
    path = f"/v1/sessions/{session['id']}"
    await box.call("POST", f"{path}/stop", {})
    async with box.http.get(path) as response:
        tag = response.headers["ETag"]
    await box.call("GET", path, headers={"If-None-Match": tag}, status=304)
    await box.call("DELETE", path, headers={"If-Match": '"1"'}, status=412)
    await box.call("DELETE", path, headers={"If-Match": "x"}, status=400)
    await box.call("DELETE", path, headers={"If-Match": tag}, status=204)


async def test_dry_run_says_where_it_would_go_and_stores_nothing(box: ManagerBox) -> None:
    found = await box.call("POST", "/v1/sessions?dry_run=1", TRUE, status=200)
    assert found["pending"]["code"] == "node.none"
    agent = ScriptedAgent()
    await box.add_agent(agent)
    found = await box.call("POST", "/v1/sessions?dry_run=1", TRUE, status=200)
    assert found["node"] == "n1"
    await box.call("POST", "/v1/sessions?dry_run=1", {**TRUE, "size": {"cpu": 99}}, status=409)
    assert (await box.call("GET", "/v1/sessions?all=1"))["items"] == []
    assert not agent.wanted


async def test_others_sessions_are_not_seen(box: ManagerBox) -> None:
    session = await post(box, TRUE)
    stranger = Principal(user_id="u2", user="bob", role=Role.USER, token_id="t", token="t")
    with pytest.raises(NotFound):
        await box.manager.sessions.get(stranger, session["id"])
    rows, _ = await box.manager.sessions.page(
        stranger, status=None, ended=True, after=None, limit=10
    )
    assert rows == []


async def test_unknown_paths_and_methods_are_problems(box: ManagerBox) -> None:
    problem = await box.call("GET", "/v1/nothing", status=404)
    assert problem["code"] == "object.not_found"
    async with box.http.put("/v1/sessions") as response:
        assert response.status == 405
        assert set(response.headers["Allow"].split(",")) >= {"GET", "POST"}
        assert response.content_type == "application/problem+json"


async def test_request_ids_are_taken_over_or_made(box: ManagerBox) -> None:
    async with box.http.get("/v1/whoami", headers={"X-Request-Id": "abc-1"}) as response:
        assert response.headers["X-Request-Id"] == "abc-1"
    async with box.http.get("/v1/whoami", headers={"X-Request-Id": "a b"}) as response:
        assert len(response.headers["X-Request-Id"]) == 16


async def test_working_directories_are_taken_in(box: ManagerBox) -> None:
    data = b"print(1)\n"
    digest = hashlib.sha256(data).hexdigest()
    manifest = {
        "files": [
            {"path": "src", "kind": "dir", "mode": 493},
            {"path": "src/a.py", "kind": "file", "size_bytes": len(data), "digest": digest},
        ]
    }
    state = await box.call("POST", "/v1/workspaces", manifest)
    assert state["missing"] == [digest]
    record = struct.pack("<32sQ", bytes.fromhex(digest), len(data)) + data
    await box.call("PUT", "/v1/workspaces/blobs", data=record * 2, status=204)
    assert box.blobs.stored == {digest: data}
    assert (await box.call("POST", "/v1/workspaces", manifest))["missing"] == []
    await post(box, {**TRUE, "workspace": state["digest"]})
    await box.call("PUT", "/v1/workspaces/blobs", data=record[:-1], status=400)
    huge = struct.pack("<32sQ", b"\0" * 32, 1 << 40)
    await box.call("PUT", "/v1/workspaces/blobs", data=huge, status=413)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ({"path": "../x", "kind": "dir"}, "path.invalid"),
        ({"path": "/x", "kind": "dir"}, "path.invalid"),
        ({"path": "a//b", "kind": "dir"}, "path.invalid"),
        ({"path": "a%00", "kind": "dir"}, "path.invalid"),
        ({"path": "a", "kind": "fifo"}, "request.invalid"),
        ({"path": "a", "kind": "file"}, "request.invalid"),
        ({"path": "a", "kind": "file", "digest": "0" * 64, "size_bytes": -1}, "request.invalid"),
        (
            {"path": "a", "kind": "file", "digest": "0" * 64, "size_bytes": 10 << 30},
            "workspace.too_large",
        ),
    ],
)
async def test_bad_working_directories_are_refused(
    box: ManagerBox, file: dict[str, Any], code: str
) -> None:
    async with box.http.post("/v1/workspaces", json={"files": [file]}) as response:
        assert (await response.json(content_type=None))["code"] == code


async def test_metrics_count(box: ManagerBox) -> None:
    await box.add_agent()
    await post(box, TRUE)
    text = (await box.call("GET", "/metrics")).decode()
    assert 'madang_node_capacity{node="n1",slot="cpu"} 4.0' in text
    assert "madang_sessions{" in text
    assert 'path="/v1/sessions"' in text


async def test_what_is_in_use_on_a_machine_is_shown_while_it_is_linked(box: ManagerBox) -> None:
    agent = await box.add_agent()
    warm = WarmLoad(
        budget_bytes=1 << 30, used_bytes=64 << 20, interpreters=2, ready=1, forks=3, starts=40
    )
    load = HostLoad(cpu=1.25, cpus=4, mem_bytes=3 << 30, mem_total_bytes=8 << 30, warm=warm)
    assert (await box.call("GET", "/v1/nodes"))[0]["load"] is None

    await agent.send(load=load)
    await agent.send()  # a report between two heartbeats changes nothing
    async with asyncio.timeout(PATIENCE_S):
        while box.manager.fleet.loads() != {"n1": load}:
            await asyncio.sleep(0)
    assert (await box.call("GET", "/v1/nodes"))[0]["load"] == asdict(load)
    text = (await box.call("GET", "/metrics")).decode()
    assert 'madang_node_in_use{node="n1",slot="cpu"} 1.25' in text
    assert 'madang_node_in_use{node="n1",slot="mem_bytes"} 3.221225472e+09' in text

    assert 'madang_warm_memory_bytes{node="n1"} 6.7108864e+07' in text
    assert 'madang_warm_budget_bytes{node="n1"} 1.073741824e+09' in text
    assert 'madang_warm_interpreters{node="n1"} 2.0' in text
    assert 'madang_warm_starts_total{node="n1"} 40.0' in text

    await agent.disconnect()
    async with asyncio.timeout(PATIENCE_S):
        while box.manager.fleet.loads():
            await asyncio.sleep(0)
    assert (await box.call("GET", "/v1/nodes"))[0]["load"] is None
    text = (await box.call("GET", "/metrics")).decode()
    assert "madang_node_in_use{" not in text
    assert "madang_warm_memory_bytes{" not in text


async def test_info_names_defaults(box: ManagerBox) -> None:
    info = await box.call("GET", "/v1/info")
    assert info["database"] == "sqlite"
    assert info["defaults"]["cpu"] == 1.0


def test_the_default_session_is_valid() -> None:
    assert check_spec(SessionSpec()) == SessionSpec()
