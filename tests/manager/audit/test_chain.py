"""The chain in a real database, and what verification finds."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from madang.manager.audit.service import Actor, AuditLog
from madang.manager.db import Database, open_database
from madang.manager.identity.types import Principal, Role
from madang.testing.clock import FakeClock
from madang.testing.database import PostgresCluster
from madang.wire.audit import AuditVerdict, verify

ANN = Actor(id="u1", name="ann", key="laptop", domain_id="d1", source="192.0.2.7", request_id="r")
ADMIN = Principal(user_id="u0", user="root", role=Role.ADMIN, token_id="t", token="t")


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'a.db'}"
    cluster: PostgresCluster = request.getfixturevalue("postgres")
    return cluster.url(await cluster.fresh())


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = open_database(url)
    await database.open()
    yield database
    await database.close()


async def write(log: AuditLog, database: Database, number: int, **more: Any) -> None:
    async with database.begin() as tx:
        await log.record(
            tx,
            actor=ANN,
            action="session.created",
            kind="session",
            id=f"s{number}",
            name=f"calm-otter-{number}",
            after={"image": "host", "cpu_milli": 1000 + number},
            **more,
        )


async def check(log: AuditLog, *heads: tuple[int, str]) -> AuditVerdict:
    data = b"".join([chunk async for chunk in log.export(ADMIN)])
    return verify(data.splitlines(keepends=True), heads)


async def test_records_are_chained_in_the_order_of_their_transactions(database: Database) -> None:
    log = AuditLog(database, FakeClock())
    for number in range(3):
        await write(log, database, number)

    found = await log.list(ADMIN)

    assert [record.seq for record in found] == [3, 2, 1]
    assert [record.id for record in found] == ["s2", "s1", "s0"]
    assert found[0].previous == found[1].digest
    assert found[0].after == {"cpu_milli": 1002, "image": "host"}
    assert (found[0].actor, found[0].key, found[0].source) == ("ann", "laptop", "192.0.2.7")
    head = await log.head(ADMIN)
    assert (head.count, head.digest) == (3, found[0].digest)
    assert await check(log) == AuditVerdict(records=3, count=3, digest=head.digest)


async def test_a_change_that_is_rolled_back_leaves_no_record(database: Database) -> None:
    log = AuditLog(database, FakeClock())
    await write(log, database, 1)
    with pytest.raises(RuntimeError, match="no"):
        async with database.begin() as tx:
            await log.record(tx, actor=ANN, action="x.y", kind="x", id="1", name="n")
            raise RuntimeError("no")
    await write(log, database, 2)

    assert [record.id for record in await log.list(ADMIN)] == ["s2", "s1"]
    assert (await check(log)).problem == ""


async def test_several_servers_that_write_at_once_make_one_chain(url: str) -> None:
    """Each with connections and a head in memory of its own."""
    servers = [open_database(url) for _ in range(3)]
    for server in servers:
        await server.open()
    logs = [AuditLog(server, FakeClock()) for server in servers]

    async def work(at: int) -> None:
        for number in range(20):
            await write(logs[at], servers[at], 100 * at + number)

    await asyncio.gather(*(work(at) for at in range(3)))
    verdict = await check(logs[0])
    for server in servers:
        await server.close()

    assert (verdict.records, verdict.problem) == (60, "")


async def test_values_that_nobody_allowed_are_hidden_and_long_ones_cut(database: Database) -> None:
    log = AuditLog(database, FakeClock())
    async with database.begin() as tx:
        await log.record(
            tx,
            actor=ANN,
            action="session.created",
            kind="session",
            id="s1",
            name="bad\0name\ud800",
            before={"env": {"SECRET": "swordfish"}},
            after={"program": "x" * 9999, "token": "swordfish"},
        )

    (record,) = await log.list(ADMIN)

    assert record.before == {"env": "hidden"}
    assert record.after is not None
    assert record.after["token"] == "hidden"
    assert len(record.after["program"]) < 600
    assert "swordfish" not in str(record)
    assert (await check(log)).problem == ""


async def test_the_oldest_records_can_be_removed_and_the_rest_still_verifies(
    database: Database,
) -> None:
    clock = FakeClock()
    log = AuditLog(database, clock)
    for number in range(4):
        await write(log, database, number)
    kept = await log.head(ADMIN)
    await clock.advance(3600)
    await write(log, database, 9)

    assert await log.cut(1800) == 4
    assert await log.cut(1800) == 0

    head = await log.head(ADMIN)
    assert (head.count, head.cut, head.cut_digest) == (6, 4, kept.digest)
    assert [record.action for record in await log.list(ADMIN)] == ["audit.cut", "session.created"]
    assert await check(log, (4, kept.digest)) == AuditVerdict(
        records=2, count=6, digest=head.digest
    )
    assert "can't be checked" in (await check(log, (3, "0" * 64))).problem


async def test_a_cut_that_no_record_tells_of_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = open_database(f"sqlite:///{path}")
    await database.open()
    log = AuditLog(database, FakeClock())
    for number in range(4):
        await write(log, database, number)
    with sqlite3.connect(path) as raw:
        raw.execute(
            "UPDATE audit_head SET cut = 2, cut_digest = (SELECT digest FROM audit WHERE seq = 2)"
        )
        raw.execute("DELETE FROM audit WHERE seq <= 2")
    raw.close()

    verdict = await check(log)
    await database.close()

    assert verdict.problem == "records up to 2 are gone, and no record tells of it."


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE audit SET actor = 'eve' WHERE seq = 2", "record 2 was changed"),
        ("UPDATE audit SET after = '{}' WHERE seq = 2", "record 2 was changed"),
        ("UPDATE audit SET before = '{\"a\": 1}' WHERE seq = 2", "record 2 was changed"),
        ("DELETE FROM audit WHERE seq = 2", "record 2 is missing"),
        ("DELETE FROM audit WHERE seq = 4", "ends with 3"),
        ("UPDATE audit SET seq = 9 WHERE seq = 4", "ends with 3"),
        (
            (
                "UPDATE audit SET seq = -2 WHERE seq = 2; UPDATE audit SET seq = 2 WHERE seq = 3;"
                "UPDATE audit SET seq = 3 WHERE seq = -2"
            ),
            "record 2 does not continue record 1",
        ),
        (
            (
                "UPDATE audit_head SET count = 3,"
                " digest = (SELECT digest FROM audit WHERE seq = 3);"
                "DELETE FROM audit WHERE seq = 4"
            ),
            "head 4 was kept, but the log ends with record 3",
        ),
    ],
)
async def test_what_is_done_to_the_rows_is_found(tmp_path: Path, change: str, problem: str) -> None:
    path = tmp_path / "a.db"
    database = open_database(f"sqlite:///{path}")
    await database.open()
    log = AuditLog(database, FakeClock())
    for number in range(4):
        await write(log, database, number)
    head = await log.head(ADMIN)
    with sqlite3.connect(path) as raw:
        raw.executescript(change)
    raw.close()

    verdict = await check(log, (head.count, head.digest))
    await database.close()

    assert problem in verdict.problem
