"""Databases that an earlier version made, with data in them."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import sqlalchemy as sa

from madang.manager.app import ManagerSettings
from madang.manager.audit.store import read_head
from madang.manager.db import open_database
from madang.manager.db.migrate import head, script_to
from madang.manager.fleet import store as fleet
from madang.manager.identity.store import add_user
from madang.manager.identity.tables import memberships, projects, users
from madang.manager.limits import store as limits
from madang.manager.scheduling import store as scheduling
from madang.manager.session import store
from madang.manager.session.rules import accounts_of
from madang.manager.session.tables import sessions
from madang.testing.books import check_ledger, ledger_rows
from madang.testing.database import PostgresCluster
from madang.testing.manager import ScriptedAgent, manager_box
from madang.testing.patience import PATIENCE_S
from madang.wire.audit import GENESIS, AuditHead
from madang.wire.kernel import Guarded, KernelId, KernelReport, KernelState
from madang.wire.session import SessionStatus

SESSION: Final = "01jd0000000000000000000001"
DATA: Final = f"""
INSERT INTO users (id, name, role, project_id, created_at)
    VALUES ('u1', 'ann', 'user', 'p1', 5);
INSERT INTO tokens (id, user_id, name, digest, scopes, created_at)
    VALUES ('t1', 'u1', 'old', '{hashlib.sha256(b"mdg_old").hexdigest()}', '["*"]', 5);
INSERT INTO nodes (name, incarnation, revision, facts, created_at, seen_at,
        has_cpu_milli, cap_cpu_milli, used_cpu_milli, has_mem_bytes, cap_mem_bytes, used_mem_bytes,
        has_disk_bytes, cap_disk_bytes, used_disk_bytes, has_pids, cap_pids, used_pids)
    VALUES ('n1', 3, 17, '{{}}', 5, 5, 4000, 4000, 1000, 9000000000, 9000000000, 1000000,
        9000000000, 9000000000, 1000000, 9000, 9000, 64);
INSERT INTO sessions (id, name, kind, owner_id, owner, project_id, status, priority, spec, image,
        image_digest, image_mount, cpu_milli, mem_bytes, pids, disk_bytes, node, held_by, attempt,
        nonce, revision, created_at, started_at, status_since, stop_reason, stop_text, grace_us,
        phases, enforced, warnings, version)
    VALUES ('{SESSION}', 'old-owl', 'run', 'u1', 'ann', 'p1', 'RUNNING', 0,
        '{{"argv": ["sleep", "9"]}}', 'host', '',
        '{{"name": "host", "digest": "", "kind": "host"}}',
        1000, 1000000, 64, 1000000, 'n1', 'n1', 1, 'secret', 17, 5, 6, 6, '', '', 10000000,
        '[]', '{{}}', '[]', 4);
INSERT INTO images (id, name, owner_id, owner, project_id, kind, status, status_since, created_at,
        requirements, labels, size, digest, python, layers, size_bytes, build, build_name, reason)
    VALUES ('i1', 'digits', 'u1', 'ann', 'p1', 'layers', 'READY', 5, 5, '["numpy"]', '{{}}', '{{}}',
        '{"d" * 64}', '3.11', '[{{"digest": "{"a" * 64}", "name": "numpy", "version": "2.2.0",
        "size_bytes": 9}}]', 9, '', '', '');
INSERT INTO history (session_id, at, source, target, actor, cause)
    VALUES ('{SESSION}', 6, 'SCHEDULED', 'RUNNING', 'agent', 'started');
"""


@pytest.fixture(params=["sqlite", "postgresql"])
async def old_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of the first version with a running session."""
    script = script_to("0001", request.param) + DATA
    if request.param == "sqlite":
        connection = sqlite3.connect(tmp_path / "old.db")
        connection.executescript(script)
        connection.close()
        return f"sqlite:///{tmp_path / 'old.db'}"
    cluster: PostgresCluster = request.getfixturevalue("postgres")
    name = await cluster.fresh()
    for statement in filter(str.strip, script.split(";")):
        await cluster.query(statement, name)
    return cluster.url(name)


async def test_sessions_of_the_first_version_are_kept_and_not_frozen(old_url: str) -> None:
    assert head() > "0001"
    for _ in range(2):  # the second time there is nothing to do
        database = open_database(old_url)
        await database.open()
        async with database.read() as tx:
            row = await store.find(tx, SESSION)
            entries = await store.list_history(tx, SESSION)
        await database.close()
        assert row is not None
        assert (row.name, row.status, row.nonce, row.revision) == (
            "old-owl", SessionStatus.RUNNING, "secret", 17,
        )  # fmt: skip
        assert (row.frozen_at, row.freeze_revision, row.version) == (None, 0, 4)
        assert (row.refused, row.image_policy) == ("{}", "")
        assert [entry.cause for entry in entries] == ["started"]


async def test_people_and_machines_of_the_first_version_have_a_place(old_url: str) -> None:
    database = open_database(old_url)
    await database.open()
    async with database.read() as tx:
        members = await tx.all(
            sa.select(
                users.c.name,
                users.c.domain_id,
                projects.c.name.label("project"),
                memberships.c.role,
            )
            .join_from(memberships, users, memberships.c.user_id == users.c.id)
            .join(projects, memberships.c.project_id == projects.c.id)
        )
        known = await tx.all(sa.select(projects.c.domain_id, projects.c.id).order_by(projects.c.id))
        row = await store.find(tx, SESSION)
        nodes = await fleet.list_nodes(tx)
    await database.close()
    assert [tuple(member) for member in members] == [("ann", "default", "p1", "member")]
    assert [tuple(each) for each in known] == [("default", "default"), ("default", "p1")]
    assert row is not None
    assert (row.group_name, [node.group for node in nodes]) == ("default", ["default"])


async def test_names_of_the_first_version_s_sessions_become_their_owner_s(old_url: str) -> None:
    database = open_database(old_url)
    await database.open()
    async with database.begin() as tx:
        row = await store.find(tx, SESSION)
        assert row is not None
        assert await store.name_taken(tx, "u1", "old-owl")
        await add_user(
            tx, user_id="u2", name="bob", role="user", project_id="default", created_at=7
        )
        other = replace(row, id=f"{SESSION[:-1]}2", owner_id="u2", owner="bob")
        await store.add(tx, other, actor="bob")
    with pytest.raises(Exception, match=r"(?i)unique"):
        async with database.begin() as tx:
            await store.add(tx, replace(other, id=f"{SESSION[:-1]}3"), actor="bob")
    async with database.begin() as tx:
        await tx.execute(sa.delete(sessions).where(sessions.c.id == sa.bindparam("b_id")),
            b_id=SESSION,
        )  # fmt: skip
        assert await store.list_history(tx, SESSION) == []
        assert len(await store.list_history(tx, other.id)) == 1
    await database.close()


async def test_tokens_and_users_of_the_first_version_log_in_as_before(old_url: str) -> None:
    async with manager_box(ManagerSettings(database_url=old_url)) as box:
        headers = {"Authorization": "Bearer mdg_old"}
        who = await box.call("GET", "/v1/whoami", headers=headers)
        assert (who["user"], who["scopes"], who["kind"]) == ("ann", ["*"], "token")
        assert (who["domain"], who["project"]) == ("default", "p1")
        user = await box.call("GET", "/v1/users/ann", headers=headers)
        assert (user["has_password"], user["has_totp"], user["version"]) == (False, False, 1)
        body = {"new": "a first password"}
        await box.call("PUT", "/v1/account/password", body, headers=headers)


async def test_a_session_of_the_first_version_can_be_frozen(old_url: str) -> None:
    agent = ScriptedAgent()
    agent.incarnation = 3
    report = KernelReport(kernel=KernelId(SESSION, 1), nonce="secret", state=KernelState.RUNNING)
    async with manager_box(ManagerSettings(database_url=old_url)) as box:
        box.connect(agent, (report,))
        assert not (await agent.assigned(SESSION)).frozen
        call = asyncio.create_task(box.call("POST", f"/v1/sessions/{SESSION}/freeze"))
        await agent.until(lambda: agent.wanted[report.kernel].frozen)
        told = agent.wanted[report.kernel]
        assert told.freeze_revision > 17
        await agent.running(told, frozen_since=50.0, freeze_revision=told.freeze_revision)
        assert (await call)["frozen_since"] == 50.0


async def test_policies_of_the_first_version_s_sessions_can_change(old_url: str) -> None:
    agent = ScriptedAgent()
    agent.incarnation = 3
    report = KernelReport(kernel=KernelId(SESSION, 1), nonce="secret", state=KernelState.RUNNING)
    async with manager_box(ManagerSettings(database_url=old_url)) as box:
        box.connect(agent, (report,))
        assert (await agent.assigned(SESSION)).live == ""
        text = "version = 1\n[[connect]]\nonly = []\n"
        call = asyncio.create_task(box.call("PUT", "/v1/policies/site", {"text": text}))
        await agent.until(lambda: agent.wanted[report.kernel].live != "")
        told = agent.wanted[report.kernel]
        guarded = Guarded(live=told.live, label="site 1")
        await agent.running(told, guarded=guarded, refused={"site line 2": 3})
        assert (await call)["effect"]["changed"] == 1
        async with asyncio.timeout(PATIENCE_S):
            while not (await box.call("GET", "/v1/policies/site"))["refused"]:
                await asyncio.sleep(0.01)
        assert (await box.call("GET", "/v1/policies/site"))["refused"] == {"2": 3}


async def test_sessions_of_the_first_version_are_planned_around(old_url: str) -> None:
    """They have no wishes and were told nothing; when they end, they are remembered as others."""
    agent = ScriptedAgent()
    agent.incarnation = 3
    report = KernelReport(kernel=KernelId(SESSION, 1), nonce="secret", state=KernelState.RUNNING)
    async with manager_box(ManagerSettings(database_url=old_url)) as box:
        box.connect(agent, (report,))
        await agent.assigned(SESSION)
        body = {"argv": ["x"], "name": "large", "size": {"cpu": 4, "mem_bytes": 16 << 20}}
        session = await box.call("POST", "/v1/sessions", {**body, "after": ["old-owl"]})
        await agent.ended(agent.wanted[report.kernel])
        await agent.assigned(session["id"])
        async with box.manager.database.read() as tx:
            runs = await scheduling.list_runs(tx, after=0, since=0, limit=10)
        assert [(run.name, run.wishes, run.told, run.group_name) for run in runs] == [
            ("old-owl", "", "", "default")
        ]


async def test_a_session_that_runs_meanwhile_is_in_the_ledger_and_its_end_closes_it(
    old_url: str,
) -> None:
    agent = ScriptedAgent()
    agent.incarnation = 3
    report = KernelReport(kernel=KernelId(SESSION, 1), nonce="secret", state=KernelState.RUNNING)
    async with manager_box(ManagerSettings(database_url=old_url)) as box:
        (row,) = await ledger_rows(box.manager.database)
        assert (row.id, row.user, row.project_id, row.domain_id) == (
            f"{SESSION}.1", "ann", "p1", "default",
        )  # fmt: skip
        assert (row.cpu_milli, row.started_at, row.ended_at) == (1000, 6, None)
        box.connect(agent, (report,))
        await agent.ended(await agent.assigned(SESSION))
        await box.until(SESSION, "TERMINATED")
        await check_ledger(box.manager.database)
        (row,) = await ledger_rows(box.manager.database)
        assert (row.ended_at, row.closed_by) == (500_006, "agent")


async def test_the_audit_log_of_an_old_database_begins_empty(old_url: str) -> None:
    database = open_database(old_url)
    await database.open()
    async with database.read() as tx:
        head = await read_head(tx)
    await database.close()
    assert head == AuditHead(count=0, digest=GENESIS)


async def test_limits_come_with_presets_and_count_what_there_was(old_url: str) -> None:
    database = open_database(old_url)
    await database.open()
    async with database.read() as tx:
        row = await store.find(tx, SESSION)
        presets = await limits.list_presets(tx)
        counts = {a: await store.count_of(tx, a) for a in ("user:u1", "project:p1", "token:")}
        slots = await store.sum_of(tx, "domain:default")
        assert await limits.list_assigned(tx) == []
    await database.close()
    assert row is not None
    assert (row.token_id, row.idle_text, row.protected_by) == ("", "", "")
    assert (row.idle_stop_at, row.protected_until) == (None, None)
    assert accounts_of(row) == ("user:u1", "project:p1")
    assert [each.name for each in presets] == ["large", "medium", "small"]
    assert counts == {"user:u1": {"RUNNING": 1}, "project:p1": {"RUNNING": 1},
                      "token:": {"RUNNING": 1}}  # fmt: skip
    assert slots["cpu_milli"] == 1000


async def test_an_image_of_the_first_version_is_its_only_one_and_sessions_have_no_cells(
    old_url: str,
) -> None:
    headers = {"Authorization": "Bearer mdg_old"}
    async with manager_box(ManagerSettings(database_url=old_url)) as box:
        (image,) = await box.call("GET", "/v1/images/digits/versions", headers=headers)
        size = {"disk_bytes": 1 << 30, "mem_bytes": 1 << 30}
        body = {"argv": ["a"], "image": "digits", "size": size}
        session = await box.call("POST", "/v1/sessions", body, headers=headers)
        found = await box.call("GET", f"/v1/sessions/{SESSION}/interpreters", headers=headers)
        lock = await box.call("GET", "/v1/images/digits/lock", headers=headers, status=409)
        await box.call("POST", "/v1/images/digits/tag", {"target": "mine"}, headers=headers)
        names = [each["name"] for each in await box.call("GET", "/v1/images", headers=headers)]
    assert (image["status"], image["digest"], image["kind"]) == ("READY", "d" * 64, "layers")
    assert session["image_digest"] == "d" * 64
    assert found == []
    assert "recipe" in lock["detail"]
    assert sorted(names) == ["digits", "host", "mine"]
