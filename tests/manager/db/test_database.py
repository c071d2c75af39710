"""The executor, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa

from madang.manager.db import Database, metadata, one_of, open_database
from madang.manager.db.events import add_event, events, list_events
from madang.manager.db.sqlite import SqliteDatabase
from madang.manager.identity.tables import users
from madang.testing.database import PostgresCluster, postgres_cluster
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import ConfigInvalid, DatabaseUnavailable, StateVersion, StorageFull

ADD: Final = sa.insert(users)
NAMED: Final = sa.select(users).where(users.c.name == sa.bindparam("b_name"))
ROLES: Final = (
    sa.select(users.c.name).where(one_of(users.c.role, ("a", "b"))).order_by(users.c.name)
)
COUNT: Final = (
    sa.update(users)
    .where(users.c.name == sa.bindparam("b_name"))
    .values(created_at=users.c.created_at + 1)
    .returning(users.c.created_at)
)


def user(name: str, **columns: Any) -> dict[str, Any]:
    return {
        "id": name, "name": name, "role": "user", "project_id": "p", "created_at": 0, **columns,
    }  # fmt: skip


async def test_rows_come_back_as_they_went_in(database: Database) -> None:
    async with database.begin() as tx:
        assert await tx.execute(ADD, **user("안녕 'x' \\", created_at=2**60)) == 1
    async with database.read() as tx:
        row = await tx.one(NAMED, b_name="안녕 'x' \\")
        assert row is not None
        assert row.created_at == 2**60
        assert row.disabled_at is None
        assert await tx.one(NAMED, b_name="other") is None


async def test_an_error_undoes_the_whole_transaction(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.begin() as tx:
            await tx.execute(ADD, **user("one"))
            raise ZeroDivisionError
    async with database.begin() as tx:
        assert await tx.one(NAMED, b_name="one") is None


async def test_readers_do_not_see_what_is_not_committed(database: Database) -> None:
    async with database.begin() as tx:
        await tx.execute(ADD, **user("one"))
        async with database.read() as reader:
            assert await reader.one(NAMED, b_name="one") is None
    async with database.read() as reader:
        assert await reader.one(NAMED, b_name="one") is not None


async def test_writers_take_turns(database: Database) -> None:
    async with database.begin() as tx:
        await tx.execute(ADD, **user("n"))

    async def bump() -> int:
        async with database.begin() as tx:
            row = await tx.one(NAMED, b_name="n")
            assert row is not None
            await asyncio.sleep(0)
            changed = await tx.one(COUNT, b_name="n")
            assert changed is not None
            assert changed.created_at == row.created_at + 1
            return int(changed.created_at)

    assert sorted(await asyncio.gather(*(bump() for _ in range(20)))) == list(range(1, 21))


async def test_one_of_is_an_in_list_also_an_empty_one(database: Database) -> None:
    async with database.begin() as tx:
        await tx.many(ADD, [user(name, role=name) for name in "abc"])
        assert [row.name for row in await tx.all(ROLES)] == ["a", "b"]
        none = sa.select(users.c.name).where(one_of(users.c.role, ()))
        assert await tx.all(none) == []


async def test_a_cancelled_writer_leaves_nothing_and_blocks_nobody(database: Database) -> None:
    inside = asyncio.Event()

    async def hang() -> None:
        async with database.begin() as tx:
            await tx.execute(ADD, **user("one"))
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with database.begin() as tx:
        assert await tx.one(NAMED, b_name="one") is None


async def test_events_are_numbered_in_the_order_of_their_commits(database: Database) -> None:
    async def add(number: int) -> None:
        async with database.begin() as tx:
            await asyncio.sleep(0)
            await add_event(
                tx, at=number, kind="k", subject=str(number), owner_id="", payload={"n": number}
            )

    seen: list[int] = []

    async def read() -> None:
        while len(seen) < 30:
            async with database.read() as tx:
                found = await list_events(tx, after=seen[-1] if seen else 0)
            seen.extend(event.id for event in found)
            await asyncio.sleep(0)

    await asyncio.gather(read(), *(add(number) for number in range(30)))
    assert seen == sorted(set(seen))
    assert len(seen) == 30


async def test_a_database_of_a_newer_version_is_refused(database_url: str) -> None:
    database = open_database(database_url)
    await database.open()
    table = sa.table("alembic_version", sa.column("version_num"))
    async with database.begin() as tx:
        await tx.execute(sa.update(table), version_num="9999")
    await database.close()
    again = open_database(database_url)
    with pytest.raises(StateVersion, match="9999"):
        await again.open()
    await again.close()


async def test_a_closed_database_says_so(database_url: str) -> None:
    database = open_database(database_url)
    with pytest.raises(DatabaseUnavailable):
        async with database.read():
            pass
    await database.open()
    await database.close()
    await database.close()
    with pytest.raises(DatabaseUnavailable):
        async with database.begin():
            pass


@pytest.mark.parametrize("url", ["mysql://x", "sqlite://", "nonsense", "sqlite:///", ""])
def test_other_urls_are_refused_in_words(url: str) -> None:
    with pytest.raises(ConfigInvalid, match="sqlite:///PATH"):
        open_database(url)


async def _described(url: str, cluster: PostgresCluster | None) -> list[tuple[Any, ...]]:
    if cluster is None:
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        found: list[tuple[Any, ...]] = []
        names = [r[0] for r in connection.execute("SELECT name FROM sqlite_master ORDER BY name")]
        for name in (n for n in names if "alembic" not in n):
            found += [
                (name, "column", *r[1:]) for r in connection.execute(f"PRAGMA table_info({name})")
            ]
            found += [
                (name, "key", *r[2:])
                for r in connection.execute(f"PRAGMA foreign_key_list({name})")
            ]
            found += [
                (name, "index", *r) for r in connection.execute(f"PRAGMA index_xinfo({name})")
            ]
        connection.close()
        return sorted(found, key=repr)
    database = (
        url.rpartition("/")[2].partition("?")[0]
        if "?" not in url
        else url.split("@/")[1].split("?", maxsplit=1)[0]
    )
    columns = await cluster.query(
        "SELECT table_name, column_name, data_type, is_nullable, is_identity "
        "FROM information_schema.columns WHERE table_schema = 'public' "
        "AND table_name <> 'alembic_version' ORDER BY 1, 2",
        database,
    )
    constraints = await cluster.query(
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = "
        "'public'::regnamespace AND conname NOT LIKE 'alembic%' ORDER BY 1",
        database,
    )
    indexes = await cluster.query(
        "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' "
        "AND tablename <> 'alembic_version' ORDER BY 1",
        database,
    )
    return [tuple(row.values()) for row in (*columns, *constraints, *indexes)]


async def test_migrations_make_what_the_tables_say(
    database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script: list[str] = []

    def keep(statement: Any, *_: Any, **__: Any) -> None:
        script.append(str(statement.compile(dialect=engine.dialect)).strip() + ";")

    kind = "sqlite" if database_url.startswith("sqlite") else "postgresql"
    if kind == "sqlite":
        engine = sa.create_mock_engine("sqlite://", keep)
        metadata.create_all(engine, checkfirst=False)
        path = tmp_path / "made.db"
        connection = sqlite3.connect(path)
        connection.executescript("\n".join(script))
        connection.close()
        migrated = await _described(database_url, None)
        assert migrated == await _described(f"sqlite:///{path}", None)
        assert len(migrated) > 50
        return
    cluster: PostgresCluster = request.getfixturevalue("postgres")
    engine = sa.create_mock_engine("postgresql+asyncpg://", keep)
    metadata.create_all(engine, checkfirst=False)
    name = await cluster.fresh()
    for statement in script:
        await cluster.query(statement, name)
    migrated = await _described(database_url, cluster)
    assert migrated == await _described(cluster.url(name), cluster)
    assert len(migrated) > 50


async def test_two_that_migrate_at_once_do_it_once(postgres: PostgresCluster) -> None:
    url = postgres.url(await postgres.fresh())
    databases = [open_database(url) for _ in range(3)]
    await asyncio.gather(*(database.open() for database in databases))
    for database in databases:
        await database.close()


async def test_a_full_disk_is_said_and_survived(sqlite_url: str) -> None:
    database = SqliteDatabase(sqlite_url.removeprefix("sqlite:///"))
    await database.open()
    assert database._writer is not None
    pages = database._writer.execute("PRAGMA page_count").fetchone()[0]
    database._writer.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageFull, match=r"test\.db"):
        for number in range(10_000):
            async with database.begin() as tx:
                await tx.execute(ADD, **user(f"u{number}" + "x" * 3000))
    async with database.read() as tx:
        assert await tx.one(NAMED, b_name="none") is None
    database._writer.execute("PRAGMA max_page_count=1000000")
    async with database.begin() as tx:
        await tx.execute(ADD, **user("later"))
    await database.close()


async def test_checkpoints_keep_the_log_from_growing(sqlite_url: str) -> None:
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    database = SqliteDatabase(str(path))
    await database.open()
    sizes = []
    for turn in range(4):
        for number in range(200):
            async with database.begin() as tx:
                await tx.execute(ADD, **user(f"{turn}-{number}"))
        await database.maintain()
        sizes.append(path.with_name("test.db-wal").stat().st_size)
    await database.close()
    assert sizes[-1] <= 2 * sizes[0]


async def test_garbage_in_place_of_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.db"
    path.write_bytes(b"this is no database" * 1000)
    database = open_database(f"sqlite:///{path}")
    with pytest.raises(DatabaseUnavailable):
        await database.open()
    await database.close()


async def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/missing/test.db")
    with pytest.raises(StorageFull, match="can't be"):
        await database.open()


async def test_postgres_may_crash_and_come_back(tmp_path: Path) -> None:
    with postgres_cluster() as cluster:
        if cluster is None:
            pytest.skip("PostgreSQL is not installed (Debian: postgresql-15)")
        database = open_database(cluster.url(await cluster.fresh()))
        await database.open()
        async with database.begin() as tx:
            await tx.execute(ADD, **user("kept"))
        await cluster.query("CHECKPOINT")  # tests run without synchronous commits
        cluster.stop(how="immediate")
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable):
                async with database.begin() as tx:
                    await tx.execute(ADD, **user("lost"))
        cluster.start()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    async with database.read() as reader:
                        assert await reader.one(NAMED, b_name="lost") is None
                    break
                except DatabaseUnavailable:
                    await asyncio.sleep(0.1)
        async with database.begin() as tx:
            await tx.execute(ADD, **user("again"))
        await database.close()


async def test_an_old_copy_of_the_file_opens(sqlite_url: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(sqlite_url.removeprefix("sqlite:///"), copy)
    database = open_database(f"sqlite:///{copy}", durable=True)
    await database.open()
    async with database.begin() as tx:
        assert await tx.all(sa.select(events)) == []
    await database.close()
