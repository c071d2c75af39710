"""Users, projects and domains over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from madang.testing.manager import ManagerBox
from madang.testing.people import OWNER, PROJECT, World, make_world

RUN = {"argv": ["true"]}


@pytest.fixture
async def world(box: ManagerBox) -> World:
    return await make_world(box)


async def change(world: World, who: str, user: str, status: int = 200, **body: Any) -> Any:
    found, text = await world.ask(who, "PATCH", f"/v1/users/{user}", body)
    assert found == status, text
    return json.loads(text)


async def test_the_last_administrator_stays(either_box: ManagerBox) -> None:
    world = await make_world(either_box)
    await change(world, "root", "admin", disabled=True)
    problem = await change(world, "root", "root", 409, role="user")
    assert "last administrator" in problem["detail"]
    await change(world, "root", "root", 409, disabled=True)
    status, _ = await world.ask("root", "PATCH", "/v1/domains/abroad", {"disabled": True})
    assert status == 409
    await change(world, "root", "admin", disabled=False)
    await change(world, "root", "root", role="user")


async def test_roles_are_given_by_whoever_has_more(world: World) -> None:
    await change(world, "domain_admin", OWNER, role="domain_admin")
    await change(world, "domain_admin", OWNER, 403, role="admin")
    await change(world, "domain_admin", OWNER, 403, role="monitor")
    await change(world, OWNER, OWNER, role="user")
    await change(world, OWNER, OWNER, 403, role="admin")
    await change(world, "project_admin", OWNER, 403, disabled=True)
    await change(world, "foreign_admin", OWNER, 404, disabled=True)
    await change(world, "domain_admin", "root", 404, disabled=True)
    await change(world, "root", OWNER, 400, role="king")


async def test_a_demoted_caller_loses_the_right_at_once(world: World) -> None:
    assert (await world.ask("domain_admin", "GET", "/v1/invitations"))[0] == 200
    await change(world, "root", "domain_admin", role="user")
    assert (await world.ask("domain_admin", "GET", "/v1/invitations"))[0] == 403


async def test_changes_go_by_versions(world: World) -> None:
    path = f"/v1/users/{OWNER}"
    body = {"role": "user", "disabled": True}
    assert (await world.ask("root", "PATCH", path, body, **{"If-Match": '"7"'}))[0] == 412
    assert (await world.ask("root", "PATCH", path, body, **{"If-Match": '"1"'}))[0] == 200
    assert (await world.ask("root", "PATCH", path, body, **{"If-Match": '"1"'}))[0] == 412


async def test_members_join_and_leave(world: World) -> None:
    members = f"/v1/projects/{PROJECT}/members"
    path = f"{members}/neighbour"
    assert (await world.ask("neighbour", "GET", members))[0] == 404
    assert (await world.ask("fellow", "PUT", path, {}))[0] == 403
    assert (await world.ask("project_admin", "PUT", path, {"role": "king"}))[0] == 400
    assert (await world.ask("project_admin", "PUT", path, {}))[0] == 200
    assert (await world.ask("neighbour", "GET", members))[0] == 200
    assert (await world.ask("project_admin", "PUT", f"{members}/foreigner", {}))[0] == 404
    listed = json.loads((await world.ask("fellow", "GET", f"{members}?limit=2"))[1])
    assert (len(listed["items"]), listed["next"]) == (2, listed["items"][-1]["user"])
    await change(world, "neighbour", "neighbour", project=PROJECT)
    assert (await world.ask("neighbour", "POST", "/v1/sessions", RUN))[0] == 201
    assert (await world.ask("neighbour", "DELETE", path))[0] == 204
    assert (await world.ask("neighbour", "GET", members))[0] == 404
    status, text = await world.ask("neighbour", "POST", "/v1/sessions", RUN)
    assert (status, json.loads(text)["code"]) == (403, "auth.forbidden")
    assert (await world.ask("neighbour", "DELETE", path))[0] == 404


async def test_a_session_belongs_to_the_project_that_it_names(world: World) -> None:
    status, text = await world.ask("fellow", "POST", "/v1/sessions", {**RUN, "project": PROJECT})
    assert status == 201
    session = json.loads(text)["name"]
    for who, seen in (("project_admin", 200), ("neighbour", 404)):
        assert (await world.ask(who, "GET", f"/v1/sessions/fellow%2F{session}"))[0] == seen
    for project in ("next-door", "home/next-door", "absent", "abroad/far"):
        body = {**RUN, "project": project}
        assert (await world.ask("fellow", "POST", "/v1/sessions", body))[0] == 404


@pytest.mark.parametrize("what", [f"projects/home%2F{PROJECT}", "domains/home"])
async def test_nothing_new_starts_in_what_is_disabled(world: World, what: str) -> None:
    assert (await world.ask(OWNER, "POST", "/v1/sessions", {**RUN, "name": "before"}))[0] == 201
    assert (await world.ask("root", "PATCH", f"/v1/{what}", {"disabled": True}))[0] == 200
    assert (await world.ask(OWNER, "POST", "/v1/sessions", RUN))[0] in {401, 403}
    found = json.loads((await world.ask("root", "GET", f"/v1/sessions/{OWNER}%2Fbefore"))[1])
    assert found["status"] == "PENDING"
    assert (await world.ask("root", "PATCH", f"/v1/{what}", {"disabled": False}))[0] == 200
    assert (await world.ask(OWNER, "POST", "/v1/sessions", RUN))[0] == 201


async def test_names_are_unique_in_their_domain(world: World) -> None:
    assert (await world.ask("root", "POST", "/v1/domains", {"name": "home"}))[0] == 409
    for body, status in (
        ({"name": "far", "domain": "home"}, 201), ({"name": "far", "domain": "home"}, 409),
        ({"name": "Far"}, 400), ({"name": "a/b"}, 400), ({"name": "x", "domain": "absent"}, 404),
    ):  # fmt: skip
        assert (await world.ask("root", "POST", "/v1/projects", body))[0] == status


async def test_two_owners_sessions_may_have_one_name(either_box: ManagerBox) -> None:
    world = await make_world(either_box)
    for who in (OWNER, "fellow"):
        assert (await world.ask(who, "POST", "/v1/sessions", {**RUN, "name": "train"}))[0] == 201
    status, text = await world.ask(OWNER, "POST", "/v1/sessions", {**RUN, "name": "train"})
    assert (status, json.loads(text)["code"]) == (409, "object.conflict")
    for ref in ("train", "tr"):
        status, text = await world.ask("project_admin", "GET", f"/v1/sessions/{ref}")
        assert status == 409
        assert f"fellow/train, {OWNER}/train" in json.loads(text)["detail"]
    for who, ref, owner in (
        (OWNER, "train", OWNER), ("fellow", "tr", "fellow"),
        ("project_admin", "fellow%2Ftrain", "fellow"), ("root", f"{OWNER}%2Ftr", OWNER),
    ):  # fmt: skip
        status, text = await world.ask(who, "GET", f"/v1/sessions/{ref}")
        assert (status, json.loads(text)["owner"]) == (200, owner)
    assert (await world.ask("root", "POST", "/v1/sessions", {**RUN, "name": "train"}))[0] == 201
    assert json.loads((await world.ask("root", "GET", "/v1/sessions/train"))[1])["owner"] == "root"


async def test_every_change_is_in_the_audit_log(world: World) -> None:
    await change(world, "root", OWNER, role="domain_admin", disabled=True)
    async with world.box.manager.database.read() as tx:
        import sqlalchemy as sa

        from madang.manager.audit.tables import audit

        rows = await tx.all(sa.select(audit).where(audit.c.action == "user.changed"))
    assert [(row.actor, row.object) for row in rows] == [("root", OWNER)]
    assert json.loads(rows[0].before) == {"disabled": False, "role": "user"}
    assert json.loads(rows[0].after) == {"disabled": True, "role": "domain_admin"}
    assert rows[0].source == "127.0.0.1"
