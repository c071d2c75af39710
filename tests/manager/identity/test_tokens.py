"""Tokens, key pairs and signed requests over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from madang.client import people
from madang.client.aio import AsyncClient
from madang.client.proof import KeyPair
from madang.client.sync import Client
from madang.kit.secret import Secret
from madang.manager.app import ManagerSettings
from madang.manager.identity.service.vault import Vault
from madang.testing.clock import FakeClock
from madang.testing.manager import ManagerBox, manager_box
from madang.testing.patience import PATIENCE_S
from madang.testing.people import OWNER, PROJECT, World, make_world
from madang.wire import signing
from madang.wire.errors import ConfigInvalid, SignatureInvalid

ENDED = {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.ERROR}


@pytest.fixture
async def world(box: ManagerBox) -> World:
    return await make_world(box)


async def add(world: World, who: str, **draft: Any) -> Any:
    status, text = await world.ask(who, "POST", "/v1/tokens", {"name": "made", **draft})
    assert status == 201, text
    return json.loads(text)


def bearer(made: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {made['secret']}"}


async def test_a_token_does_what_its_scopes_say(world: World) -> None:
    made = await add(world, OWNER, scopes=["sessions"])
    world.headers["made"] = bearer(made)
    run = {"argv": ["true"]}
    assert (await world.ask("made", "POST", "/v1/sessions", run))[0] == 201
    assert (await world.ask("made", "GET", "/v1/sessions"))[0] == 200
    status, text = await world.ask("made", "POST", "/v1/images", {"name": "i"})
    assert (status, json.loads(text)["code"]) == (403, "auth.scope")
    assert (await world.ask("made", "POST", "/v1/tokens", {"name": "more"}))[0] == 403


async def test_no_token_gives_what_it_lacks_nor_outlives_its_maker(world: World) -> None:
    made = await add(world, OWNER, scopes=["account", "images"], expires_s=1000)
    world.headers["made"] = bearer(made)
    for scopes in (["*"], ["sessions"], ["admin", "images"]):
        status, _ = await world.ask(
            "made", "POST", "/v1/tokens", {"name": "n", "scopes": scopes, "expires_s": 10}
        )
        assert status == 403
    body = {"name": "n", "scopes": ["images"], "expires_s": 2000}
    assert (await world.ask("made", "POST", "/v1/tokens", body))[0] == 403
    child = await add(world, "made", scopes=["images"])
    assert child["token"]["expires_at"] == made["token"]["expires_at"]


async def test_a_monitor_s_tokens_change_nothing(world: World) -> None:
    world.headers["made"] = bearer(await add(world, "monitor", scopes=["read"]))
    status, _ = await world.ask("monitor", "POST", "/v1/tokens", {"name": "n", "scopes": ["*"]})
    assert status == 403
    assert (await world.ask("made", "POST", "/v1/sessions", {"argv": ["true"]}))[0] == 403


async def test_a_revoked_token_is_refused_at_once(world: World) -> None:
    made = await add(world, OWNER)
    world.headers["made"] = bearer(made)
    assert (await world.ask("made", "GET", "/v1/whoami"))[0] == 200
    assert (await world.ask(OWNER, "DELETE", f"/v1/tokens/{made['token']['id']}"))[0] == 204
    assert (await world.ask("made", "GET", "/v1/whoami"))[0] == 401
    listed = json.loads((await world.ask(OWNER, "GET", "/v1/tokens"))[1])["items"]
    assert made["token"]["id"] not in {token["id"] for token in listed}


async def test_a_revocation_reaches_other_servers_and_open_streams(either_box: ManagerBox) -> None:
    box = either_box
    world = await make_world(box)
    made = await add(world, OWNER)
    settings = ManagerSettings(database_url=box.manager._settings.database_url)
    async with manager_box(settings) as other:
        headers = bearer(made)
        assert (await other.call("GET", "/v1/whoami", headers=headers))["user"] == OWNER
        async with other.http.get("/v1/events", headers=headers) as stream:
            await stream.content.readline()
            await world.ask(OWNER, "DELETE", f"/v1/tokens/{made['token']['id']}")
            other.manager.feed.wake()
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(aiohttp.ClientError):
                    while await stream.content.readany():
                        pass
        await other.call("GET", "/v1/whoami", headers=headers, status=401)


async def test_a_disabled_user_s_streams_end_and_requests_are_refused(world: World) -> None:
    http = world.box.http
    created = await world.ask(OWNER, "POST", "/v1/sessions", {"argv": ["true"], "name": "mine"})
    assert created[0] == 201
    async with http.ws_connect(
        "/v1/sessions/mine/attach", headers=world.headers[OWNER]
    ) as attached:
        await attached.send_json({"op": "attach"})
        await attached.receive_json()
        path = f"/v1/users/{OWNER}"
        assert (await world.ask("domain_admin", "PATCH", path, {"disabled": True}))[0] == 200
        async with asyncio.timeout(PATIENCE_S):
            assert (await attached.receive()).type in ENDED
    assert (await world.ask(OWNER, "GET", "/v1/whoami"))[0] == 401
    assert (await world.ask("domain_admin", "PATCH", path, {"disabled": False}))[0] == 200
    assert (await world.ask(OWNER, "GET", "/v1/whoami"))[0] == 200


async def test_who_leaves_a_project_follows_nothing_in_it_any_more(world: World) -> None:
    await world.ask(OWNER, "POST", "/v1/sessions", {"argv": ["true"], "name": "mine"})
    path = f"/v1/sessions/{OWNER}%2Fmine/attach"
    headers = world.headers["project_admin"]
    async with world.box.http.ws_connect(URL(path, encoded=True), headers=headers) as attached:
        await attached.send_json({"op": "attach"})
        await attached.receive_json()
        member = f"/v1/projects/{PROJECT}/members/project_admin"
        assert (await world.ask("project_admin", "DELETE", member))[0] == 204
        async with asyncio.timeout(PATIENCE_S):
            assert (await attached.receive()).type in ENDED
    assert (await world.ask("project_admin", "GET", "/v1/sessions/mine"))[0] == 404


async def test_a_token_that_expires_ends_its_stream(sqlite_url: str) -> None:
    clock = FakeClock()
    async with manager_box(ManagerSettings(database_url=sqlite_url), clock) as box:
        made = await box.call("POST", "/v1/tokens", {"name": "n", "expires_s": 60})
        async with box.http.get("/v1/events", headers=bearer(made)) as stream:
            await stream.content.readline()
            await clock.advance(75)
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(aiohttp.ClientError):
                    while await stream.content.readany():
                        pass


async def test_tokens_come_in_the_header_alone(world: World) -> None:
    token = world.headers[OWNER]["Authorization"].removeprefix("Bearer ")
    for path in (f"/v1/whoami?token={token}", f"/v1/whoami?access_token={token}"):
        assert (await world.ask("anonymous", "GET", path))[0] in {400, 401}
    cookie = {"Cookie": f"madang={token}"}
    assert (await world.ask("anonymous", "GET", "/v1/whoami", **cookie))[0] == 401


async def raw(box: ManagerBox, request: str) -> str:
    host, port = box.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request.encode())
    answer = await reader.readuntil(b"\r\n")
    writer.close()
    return answer.decode()


async def test_two_authorization_headers_are_none(world: World) -> None:
    mine = f"Authorization: {world.headers[OWNER]['Authorization']}"
    root = f"Authorization: {world.headers['root']['Authorization']}"
    head = "GET /v1/whoami HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert " 200 " in await raw(world.box, f"{head}{mine}\r\n\r\n")
    assert " 401 " in await raw(world.box, f"{head}{mine}\r\n{root}\r\n\r\n")
    folded = f"{head}X: y\r\n {root}\r\n\r\n"
    assert " 200 " not in await raw(world.box, folded)


# Key pairs


async def pair(world: World, **draft: Any) -> KeyPair:
    made = await add(world, OWNER, kind="key", **draft)
    return KeyPair(made["access_key"], Secret(made["secret"]))


def signed(pair: KeyPair, box: ManagerBox, **changes: Any) -> dict[str, str]:
    """Headers of a signed GET /v1/whoami; *changes*: of what is signed."""
    what: dict[str, Any] = {
        "method": "GET",
        "host": box.url.removeprefix("http://"),
        "target": "/v1/whoami",
        "body": signing.body_hash(b""),
        "date": int(time.time()),
        "nonce": os.urandom(12).hex(),
    }
    secret = changes.pop("secret", pair.secret_key.reveal())
    header = signing.signed_header(pair.access_key, secret, **{**what, **changes})
    return {"Authorization": header}


async def test_both_clients_sign(world: World) -> None:
    key = await pair(world, scopes=["sessions"])
    box = world.box

    def use() -> None:
        with Client(box.url, key) as client:
            assert client.whoami().kind == "key"
            with client.run(["true"], name="by-key") as run:
                assert run.session.name == "by-key"
            client.call(people.tokens())
            assert client.get_session("by-key").owner == OWNER

    await asyncio.to_thread(use)
    async with AsyncClient(box.url, key) as client:
        assert (await client.whoami()).scopes == ("sessions",)
        assert (await client.get_session("by-key")).owner == OWNER
        run = await client.run(["true"], name="by-key-too")
        await run.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "POST"},
        {"host": "other.example.org"},
        {"target": "/v1/whoami?x=1"},
        {"target": "/v1/info"},
        {"date": int(time.time()) - 3000},
        {"date": int(time.time()) + 3000},
        {"secret": "wrong"},
        {"secret": ""},
        {"nonce": "short"},
        {"body": "UNSIGNED-BODY"},
    ],
)
async def test_a_signature_over_anything_else_is_refused(
    world: World, changes: dict[str, Any]
) -> None:
    key = await pair(world)
    headers = signed(key, world.box, **changes)
    problem = await world.box.call("GET", "/v1/whoami", headers=headers, status=401)
    assert problem["code"] == "auth.signature"


async def test_a_signed_request_is_taken_once(either_box: ManagerBox) -> None:
    world = await make_world(either_box)
    key = await pair(world)
    headers = signed(key, either_box)
    await either_box.call("GET", "/v1/whoami", headers=headers)
    answers = await asyncio.gather(
        *(either_box.call("GET", "/v1/whoami", headers=headers, status=401) for _ in range(3))
    )
    assert {answer["code"] for answer in answers} == {"auth.signature"}
    fresh = signed(key, either_box)
    answers = await asyncio.gather(
        *(world.ask("anonymous", "GET", "/v1/whoami", **fresh) for _ in range(4))
    )
    assert sorted(status for status, _ in answers) == [200, 401, 401, 401]


async def test_another_body_than_the_signed_one_is_refused(world: World) -> None:
    key, box = await pair(world), world.box
    body = b'{"argv": ["true"], "name": "signed"}'
    for path, query in (("/v1/sessions", ""), ("/v1/workspaces/blobs", "")):
        method = "PUT" if "blobs" in path else "POST"
        headers = signed(
            key, box, method=method, target=path + query, body=signing.body_hash(b"{}")
        )
        async with box.http.request(method, path, data=body, headers=headers) as response:
            assert response.status in {400, 401}
    headers = signed(key, box, method="POST", target="/v1/sessions", body=signing.body_hash(body))
    async with box.http.post("/v1/sessions", data=body, headers=headers) as response:
        assert response.status == 201


async def test_a_streamed_body_is_checked_at_its_end(world: World) -> None:
    key, box = await pair(world), world.box
    data = b"content"
    blob = hashlib.sha256(data).digest() + len(data).to_bytes(8, "little") + data
    target = "/v1/workspaces/blobs"
    for said, status in (
        (signing.body_hash(blob), 204),
        (signing.UNSIGNED_BODY, 204),
        (signing.body_hash(b"other"), 401),
    ):
        headers = signed(key, box, method="PUT", target=target, body=said)
        async with box.http.put(target, data=blob, headers=headers) as response:
            assert response.status == status


async def test_a_secret_key_is_neither_sent_nor_stored_in_clear(
    world: World, sqlite_url: str
) -> None:
    key = await pair(world)
    headers = {"Authorization": f"Bearer {key.secret_key.reveal()}"}
    await world.box.call("GET", "/v1/whoami", headers=headers, status=401)
    await world.box.call(
        "GET", "/v1/whoami", headers={"Authorization": f"Bearer {key.access_key}"}, status=401
    )
    path = sqlite_url.removeprefix("sqlite:///")
    data = Path(path).read_bytes() + Path(f"{path}-wal").read_bytes()
    assert key.secret_key.reveal().encode() not in data
    assert key.access_key[4:].encode() in data


def test_a_secret_opens_in_its_place_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "secret.key")
    sealed = Vault(path).seal(b"secret", "key a")
    assert b"secret" not in sealed.encode()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert Vault(path).open(sealed, "key a") == b"secret"
    with pytest.raises(ConfigInvalid):
        Vault(path).open(sealed, "key b")
    with pytest.raises(ConfigInvalid):
        Vault("").open(sealed, "key a")
    (tmp_path / "secret.key").write_bytes(b"short")
    with pytest.raises(ConfigInvalid, match="32 bytes"):
        Vault(path).seal(b"x", "key a")


def test_the_form_of_the_header_is_exact() -> None:
    good = signing.signed_header(
        "mdk_" + "a" * 26,
        "s",
        method="GET",
        host="x",
        target="/",
        body=signing.UNSIGNED_BODY,
        date=1,
        nonce="n" * 16,
    )
    assert signing.parse(good) is not None
    for bad in (good + " ", good.replace("nonce", "Nonce"), good.replace(", ", ","), good[:-1]):
        assert signing.parse(bad) is None
    assert issubclass(SignatureInvalid, Exception)
