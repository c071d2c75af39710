"""Every endpoint, as every role, on own and foreign objects: no leak even of existence.

The endpoints are those that the server describes: a new one fails here until it has its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa

from madang.manager.identity.store import logins, people, tokens
from madang.manager.identity.tables import invitations
from madang.manager.identity.types import ProjectRole
from madang.testing.manager import ManagerBox
from madang.testing.people import MARK, OWNER, PROJECT, World, make_world

ALL = frozenset({
    OWNER, "fellow", "project_admin", "neighbour", "domain_admin", "foreigner", "foreign_admin",
    "monitor", "root",
})  # fmt: skip
ABROAD = frozenset({"foreigner", "foreign_admin"})
SEES = {
    "session": frozenset({OWNER, "project_admin", "domain_admin", "monitor", "root"}),
    "image": frozenset({OWNER, "fellow", "project_admin", "domain_admin", "monitor", "root"}),
    "project": frozenset({OWNER, "fellow", "project_admin", "domain_admin", "monitor", "root"}),
    "user": frozenset({OWNER, "fellow", "project_admin", "domain_admin", "monitor", "root"}),
    "domain": ALL - ABROAD,
    "token": frozenset({OWNER, "domain_admin", "root"}),
    "account": frozenset({OWNER, "domain_admin", "monitor", "root"}),
    "invitation": frozenset({"domain_admin", "root", "monitor"}),
}
"""Who may know that zoe's exists; everybody else is told what they are told of nothing."""
NAMES = {
    "session": f"{OWNER}/{MARK}-run",
    "image": f"{PROJECT}/{MARK}-image",
    "project": f"home/{PROJECT}",
    "user": OWNER,
    "domain": "home",
    "token": "t-zebra-other",
    "account": f"user:{OWNER}",
    "invitation": f"{MARK}-invitation",
}
NOTHING = {
    "session": f"{OWNER}/absent-run",
    "image": f"{PROJECT}/absent-image",
    "project": "home/absent-lab",
    "user": "absent-zoe",
    "domain": "absent",
    "token": "t-absent-other",
    "account": "user:absent-zoe",
    "invitation": "absent-invitation",
}


@dataclass(frozen=True)
class Line:
    kind: str = ""
    """Of the object in the path; empty: none of anybody's."""
    body: Any = None
    query: str = ""
    does: frozenset[str] = field(default_factory=frozenset)
    """Who may do it to zoe's object, of those that see it; empty: all of them that may change."""
    streams: bool = False
    lacks: bool = False
    """There is none of that name: whoever may is told so."""
    fill: dict[str, str] = field(default_factory=dict)


NAMING = tuple(f"POST /v1/images{each}" for each in ("", "/pull", "/import", "/recipes"))
OWNERS = frozenset({OWNER, "project_admin", "domain_admin", "root"})
ADMINS = frozenset({"domain_admin", "root"})
S, P, U = "/v1/sessions/{ref}", "/v1/projects/{project}", "/v1/users/{user}"
ONE, CELL = S + "/interpreters/{interpreter}", {"interpreter": "python", "cell": "c"}
DRAFT = {"text": "version = 1\n"}
LINES = {
    "GET /v1/health": Line(),
    "GET /v1/errors": Line(),
    "GET /v1/errors/{code}": Line(fill={"code": "internal"}),
    "POST /v1/login": Line(body={"user": "absent", "password": "x"}),
    "POST /v1/invitations/accept": Line(body={"code": "x", "password": "y"}),
    "POST /v1/logout": Line(),
    "GET /v1/whoami": Line(),
    "GET /v1/info": Line(),
    "GET /metrics": Line(),
    "GET /v1/nodes": Line(),
    "GET /v1/events": Line(streams=True),
    "GET /v1/run": Line(),
    "POST /v1/workspaces": Line(body={"files": []}),
    "PUT /v1/workspaces/blobs": Line(),
    "GET /v1/sessions": Line(query="?all=true"),
    "POST /v1/sessions": Line(body={"argv": ["true"]}),
    f"GET {S}": Line("session"),
    f"GET {S}/history": Line("session"),
    f"GET {S}/logs": Line("session"),
    f"GET {S}/refusals": Line("session"),
    f"GET {S}/policy": Line("session"),
    f"GET {S}/files": Line("session"),
    f"GET {S}/file": Line("session", query="?path=/work/a"),
    f"GET {S}/archive": Line("session", query="?path=/work/a"),
    f"PUT {S}/file": Line("session", query="?path=/work/a", does=OWNERS),
    f"PUT {S}/archive": Line("session", query="?path=/work/a", does=OWNERS),
    f"PUT {S}/policy": Line("session", body=DRAFT, does=OWNERS),
    f"GET {S}/attach": Line("session", does=OWNERS),
    f"GET {S}/exec": Line("session", does=OWNERS),
    "GET /v1/interpreters": Line(),
    f"GET {S}/interpreters": Line("session"),
    f"POST {S}/interpreters": Line("session", body={}, does=OWNERS),
    f"GET {ONE}": Line("session", lacks=True, fill=CELL),
    f"DELETE {ONE}": Line("session", lacks=True, fill=CELL, does=OWNERS),
    f"POST {ONE}/restart": Line("session", lacks=True, fill=CELL, does=OWNERS),
    f"POST {ONE}/interrupt": Line("session", lacks=True, fill=CELL, does=OWNERS),
    f"GET {ONE}/cells": Line("session", lacks=True, fill=CELL),
    f"POST {ONE}/cells": Line("session", body={"code": "1"}, lacks=True, fill=CELL, does=OWNERS),
    f"GET {ONE}/cells/{{cell}}": Line("session", lacks=True, fill=CELL),
    f"POST {ONE}/input": Line("session", body={"text": "a"}, lacks=True, fill=CELL, does=OWNERS),
    f"POST {ONE}/complete": Line("session", body={"code": "a"}, lacks=True, fill=CELL, does=OWNERS),
    f"POST {ONE}/inspect": Line("session", body={"code": "a"}, lacks=True, fill=CELL, does=OWNERS),
    f"GET {ONE}/channel": Line("session", lacks=True, fill=CELL, does=OWNERS),
    f"POST {S}/stop": Line("session", body={}, does=OWNERS),
    f"POST {S}/freeze": Line("session", does=OWNERS),
    f"POST {S}/thaw": Line("session", does=OWNERS),
    f"POST {S}/signal": Line("session", body={"signal": 15}, does=OWNERS),
    f"DELETE {S}": Line("session", does=OWNERS),
    "GET /v1/languages": Line(),
    "GET /v1/languages/{name}": Line(fill={"name": "python"}),
    "GET /v1/images": Line(),
    "POST /v1/images": Line(body={"name": "mine", "requirements": ["numpy"]}),
    "GET /v1/images/{name}": Line("image"),
    "DELETE /v1/images/{name}": Line("image", does=OWNERS),
    "GET /v1/images/{name}/versions": Line("image", lacks=True),
    "POST /v1/images/pull": Line(body={"name": "mine", "reference": "tool"}),
    "POST /v1/images/import": Line(body={"name": "mine"}),
    "POST /v1/images/recipes": Line(body={"name": "mine", "recipe": 'base = "debian:bookworm"'}),
    "GET /v1/images/{name}/lock": Line("image", lacks=True),
    f"POST {S}/commit": Line("session", body={"name": "mine"}),
    "POST /v1/images/check": Line(),
    "POST /v1/images/prune": Line(),
    "POST /v1/images/{name}/push": Line("image", body={"reference": "tool"}, lacks=True),
    "POST /v1/images/{name}/export": Line("image", lacks=True),
    "POST /v1/images/{name}/tag": Line("image", body={"target": "other"}, lacks=True),
    "POST /v1/images/{name}/rollback": Line("image", body={}, lacks=True, does=OWNERS),
    "POST /v1/images/{name}/follow": Line("image", body={"refresh_s": 0}, lacks=True, does=OWNERS),
    "GET /v1/policies": Line(),
    "GET /v1/policies/{target}": Line(fill={"target": "site"}),
    "GET /v1/policies/{target}/history": Line(fill={"target": "site"}),
    "PUT /v1/policies/{target}": Line(fill={"target": "site"}, body=DRAFT),
    "GET /v1/policy-log": Line(),
    "POST /v1/policies/review": Line(body=DRAFT),
    "POST /v1/policies/test": Line(body={"call": "ptrace"}),
    "POST /v1/policies/replay": Line(body={"draft": DRAFT, "events": []}),
    "GET /v1/audit": Line(),
    "GET /v1/audit/head": Line(),
    "GET /v1/audit/export": Line(),
    "GET /v1/usage": Line(),
    "GET /v1/usage/bill": Line(query="?month=2026-01"),
    "GET /v1/usage/intervals": Line(),
    "GET /v1/usage/prices": Line(),
    "POST /v1/usage/prices": Line(
        body={"group": "default", "slot": "cpu", "price": "1", "currency": "EUR"}
    ),
    "POST /v1/usage/intervals/{id}/correct": Line(
        fill={"id": "1"}, body={"reason": "x"}, lacks=True
    ),
    "GET /v1/limits": Line(),
    "GET /v1/limits/{name}": Line(fill={"name": "none"}, lacks=True),
    "GET /v1/limits/{name}/history": Line(fill={"name": "none"}, lacks=True),
    "PUT /v1/limits/{name}": Line(fill={"name": "small"}, body={"text": "version = 1\n"}),
    "DELETE /v1/limits/{name}": Line(fill={"name": "none"}, lacks=True),
    "GET /v1/limits-of/{target}": Line("account"),
    "PUT /v1/limits-of/{target}": Line(
        "account", body={"name": None}, does=frozenset({"root"}), lacks=True
    ),
    "GET /v1/presets": Line(),
    "GET /v1/presets/{name}": Line(fill={"name": "none"}, lacks=True),
    "PUT /v1/presets/{name}": Line(fill={"name": "tiny"}, body={"size": {}}),
    "DELETE /v1/presets/{name}": Line(fill={"name": "none"}, lacks=True),
    "GET /v1/queue": Line(),
    "POST /v1/queue/preview": Line(body={"argv": ["true"]}),
    "POST /v1/queue/replay": Line(body={"since": 0.0, "until": 1.0}),
    f"GET {S}/why": Line("session"),
    f"POST {S}/protect": Line("session", body={"for_s": 60}, does=OWNERS),
    "GET /v1/groups": Line(),
    "GET /v1/groups/{name}": Line(fill={"name": "default"}),
    "PUT /v1/groups/{name}": Line(fill={"name": "spare"}, body={"text": ""}),
    "DELETE /v1/groups/{name}": Line(fill={"name": "none"}, lacks=True),
    "PATCH /v1/nodes/{name}": Line(fill={"name": "none"}, body={"group": "default"}, lacks=True),
    "GET /v1/reservations": Line(),
    "POST /v1/reservations": Line(body={"name": "r", "starts_at": 1.0, "ends_at": 2.0}),
    "DELETE /v1/reservations/{name}": Line(fill={"name": "none"}, lacks=True),
    "GET /v1/tokens": Line(),
    "POST /v1/tokens": Line(body={"name": "new", "scopes": ["read"]}),
    "DELETE /v1/tokens/{token}": Line("token", does=frozenset({OWNER}) | ADMINS),
    "PUT /v1/account/password": Line(body={"new": "a new password"}),
    "POST /v1/account/totp": Line(body={"password": ""}),
    "PUT /v1/account/totp": Line(body={"otp": "000000"}),
    "POST /v1/account/totp/off": Line(body={"password": ""}),
    "GET /v1/domains": Line(),
    "POST /v1/domains": Line(body={"name": "third"}),
    "GET /v1/domains/{domain}": Line("domain"),
    "PATCH /v1/domains/{domain}": Line(
        "domain", body={"disabled": False}, does=frozenset({"root"})
    ),
    "GET /v1/projects": Line(),
    "POST /v1/projects": Line(body={"name": "another"}),
    f"GET {P}": Line("project"),
    f"PATCH {P}": Line("project", body={"disabled": False}, does=ADMINS),
    f"GET {P}/members": Line("project"),
    f"PUT {P}/members/{{user}}": Line(
        "project", body={}, fill={"user": OWNER}, does=ADMINS | {"project_admin"}
    ),
    f"DELETE {P}/members/{{user}}": Line(
        "project", fill={"user": "fellow"}, does=ADMINS | {"project_admin", "fellow"}
    ),
    "GET /v1/users": Line(),
    "POST /v1/users": Line(body={"name": "newcomer"}),
    f"GET {U}": Line("user"),
    f"PATCH {U}": Line("user", body={"disabled": False}, does=ADMINS),
    "GET /v1/invitations": Line(),
    "POST /v1/invitations": Line(body={}),
    "DELETE /v1/invitations/{invitation}": Line("invitation", does=ADMINS),
}
ADMIN_ONLY = {
    "PUT /v1/policies/{target}": frozenset({"root"}),
    "GET /v1/policy-log": frozenset({"root", "monitor"}),
    "GET /v1/audit": frozenset({"root", "monitor", "domain_admin", "foreign_admin"}),
    "GET /v1/audit/head": frozenset({"root", "monitor"}),
    "GET /v1/audit/export": frozenset({"root", "monitor"}),
    "POST /v1/usage/prices": frozenset({"root"}),
    "POST /v1/usage/intervals/{id}/correct": frozenset({"root"}),
    "PUT /v1/limits/{name}": frozenset({"root"}),
    "DELETE /v1/limits/{name}": frozenset({"root"}),
    "PUT /v1/presets/{name}": frozenset({"root"}),
    "DELETE /v1/presets/{name}": frozenset({"root"}),
    "POST /v1/queue/replay": frozenset({"root"}),
    "PUT /v1/groups/{name}": frozenset({"root"}),
    "DELETE /v1/groups/{name}": frozenset({"root"}),
    "PATCH /v1/nodes/{name}": frozenset({"root"}),
    "POST /v1/reservations": frozenset({"root"}),
    "DELETE /v1/reservations/{name}": frozenset({"root"}),
    "POST /v1/domains": frozenset({"root"}),
    "POST /v1/projects": frozenset({"root", "domain_admin", "foreign_admin"}),
    "POST /v1/users": frozenset({"root", "domain_admin", "foreign_admin"}),
    "POST /v1/invitations": frozenset({"root", "domain_admin", "foreign_admin"}),
    "GET /v1/invitations": frozenset({"root", "monitor", "domain_admin", "foreign_admin"}),
}
"""Without an object in the path; all others are for everybody whose token has the scope."""


_REOPEN = sa.update(invitations).where(invitations.c.id == sa.bindparam("b_id"))


@pytest.fixture
async def world(box: ManagerBox) -> AsyncIterator[World]:
    world = await make_world(box)
    await things(world)
    yield world


async def things(world: World) -> None:
    """What zoe has; made again where a call removed it."""
    body = {"argv": ["true"], "name": f"{MARK}-run"}
    await world.ask(OWNER, "POST", "/v1/sessions", body)
    body = {"name": f"{MARK}-image", "requirements": ["numpy"]}
    await world.ask(OWNER, "POST", "/v1/images", body)
    async with world.box.manager.database.begin() as tx:
        if await tokens.find_token_by_id(tx, "t-zebra-other") is None:
            await tokens.add_token(
                tx,
                token_id="t-zebra-other",
                user_id=f"u-{OWNER}",
                name=f"{MARK} other",
                digest="f" * 64,
                created_at=1,
            )
        if await logins.find_invitation_by_id(tx, NAMES["invitation"], 1) is None:
            await tx.execute(_REOPEN, b_id=NAMES["invitation"], used_at=None)
        await people.join(
            tx, user_id="u-fellow", project_id=f"p-{PROJECT}", role=ProjectRole.MEMBER, at=1
        )


async def described(world: World) -> dict[str, Any]:
    found = await world.box.call("GET", "/v1/openapi.json")
    return {
        f"{method.upper()} {path}": operation
        for path, methods in found["paths"].items()
        for method, operation in methods.items()
    }


def path_of(key: str, line: Line, names: dict[str, str]) -> str:
    path = key.partition(" ")[2]
    first = re.search(r"\{(\w+)\}", path)
    if line.kind and first is not None:
        path = path.replace(first[0], names[line.kind].replace("/", "%2F"), 1)
    for name, value in line.fill.items():
        path = path.replace(f"{{{name}}}", value)
    return path + line.query


def plain(status: int, text: str, name: str) -> tuple[int, str]:
    """An answer without what differs between any two, *name* above all."""
    try:
        found = json.loads(text)
    except ValueError:
        return status, text
    if isinstance(found, dict):
        found.pop("request_id", None)
    bare = name.rpartition(":")[2]
    return status, json.dumps(found, sort_keys=True).replace(name, "NAME").replace(bare, "NAME")


async def test_every_endpoint_has_its_line(world: World) -> None:
    assert set(await described(world)) <= set(LINES)


async def test_nobody_gets_in_without_a_valid_token(world: World) -> None:
    for key, operation in (await described(world)).items():
        line = LINES[key]
        if not operation["security"]:
            continue
        for who in ("anonymous", "expired", "revoked"):
            method = key.partition(" ")[0]
            status, text = await world.ask(who, method, path_of(key, line, NAMES), line.body)
            assert (status, json.loads(text)["code"]) == (401, "auth.missing"), (key, who)


async def test_who_may_only_read_changes_nothing(world: World) -> None:
    for key, operation in (await described(world)).items():
        if operation.get("x-scope", "read") == "read":
            continue
        line, method = LINES[key], key.partition(" ")[0]
        for who in ("read_only", "monitor"):
            if who == "monitor" and operation["x-scope"] == "account":
                continue
            status, text = await world.ask(who, method, path_of(key, line, NAMES), line.body)
            assert (status, json.loads(text)["code"]) == (403, "auth.scope"), (key, who)


async def test_what_one_may_not_know_of_is_not_there(world: World) -> None:
    for key in await described(world):
        line, method = LINES[key], key.partition(" ")[0]
        if not line.kind:
            continue
        for who in sorted(ALL - SEES[line.kind] - {"monitor"}):
            asked = [
                plain(
                    *await world.ask(who, method, path_of(key, line, names), line.body),
                    names[line.kind],
                )
                for names in (NAMES, NOTHING)
            ]
            assert asked[0] == asked[1], (key, who)
            assert asked[0][0] in {403, 404}, (key, who, asked[0])


async def test_who_may_gets_an_answer_and_who_only_sees_is_refused(world: World) -> None:
    for key, operation in (await described(world)).items():
        line, method = LINES[key], key.partition(" ")[0]
        if not line.kind:
            continue
        for who in sorted(SEES[line.kind]):
            await things(world)
            changes = operation.get("x-scope") != "read"
            may = who in line.does if line.does else not (changes and who == "monitor")
            status, text = await world.ask(who, method, path_of(key, line, NAMES), line.body)
            if may:
                assert status not in {401, 403, 405, 500}, (key, who, text)
                assert status != 404 or line.lacks, (key, who, text)
            else:
                assert status == 403, (key, who, text)


async def test_lists_show_nothing_that_one_may_not_know_of(world: World) -> None:
    for key in await described(world):
        line, method = LINES[key], key.partition(" ")[0]
        if line.kind or line.streams or method != "GET":
            continue
        for who in ("foreigner", "foreign_admin", "neighbour"):
            _, text = await world.ask(who, method, path_of(key, line, NAMES), line.body)
            assert MARK not in text, (key, who)
    _, text = await world.ask("fellow", "GET", "/v1/sessions?all=true")
    assert f"{MARK}-run" not in text
    for who in ("project_admin", "domain_admin", "monitor", "root"):
        _, text = await world.ask(who, "GET", "/v1/sessions?all=true")
        assert f"{MARK}-run" in text


async def test_what_concerns_everybody_is_for_its_role(world: World) -> None:
    for key, operation in (await described(world)).items():
        line, method = LINES[key], key.partition(" ")[0]
        if line.kind or line.streams or not operation["security"] or key == "POST /v1/logout":
            continue
        allowed = ADMIN_ONLY.get(key, ALL)
        if operation["x-scope"] not in {"read", "account"}:
            allowed -= {"monitor"}
        for who in sorted(ALL):
            body = line.body
            if key in NAMING:  # names are a project's own
                body = {**body, "name": f"{who.replace('_', '-')}{len(key)}"}
            status, text = await world.ask(who, method, path_of(key, line, NAMES), body)
            if who in allowed:
                assert status not in {403, 500} and (status != 404 or line.lacks), (key, who, text)
            else:
                assert status == 403, (key, who, text)


async def test_events_are_of_what_one_may_know_of(world: World) -> None:
    seen = {}
    for who in ("foreigner", "fellow", "neighbour", OWNER, "project_admin", "domain_admin", "root"):
        headers = world.headers[who]
        async with world.box.http.get("/v1/events?after=0", headers=headers) as response:
            assert response.status == 200
            await response.content.readline()
            await response.content.readline()
            text = b""
            while b": quiet" not in text and len(text) < 200 and who in SEES["session"]:
                text += await response.content.readany()
            if who not in SEES["session"]:
                await world.box.call("POST", "/v1/sessions", {"argv": ["true"]}, headers=headers)
                text = await response.content.readuntil(b"\n\n")
            seen[who] = text.decode()
    for who, told in seen.items():
        assert (f"{MARK}-" in told) == (who in SEES["session"]), who
