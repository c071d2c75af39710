"""Brings a database to this version's schema; Alembic is imported only when there is work.

Revisions are linear and numbered: ``migrations/versions/0001_first.py`` has revision ``0001``.
SQLite runs them on a SQLAlchemy connection, PostgreSQL as one SQL script on the driver's own.
"""

from __future__ import annotations

import io
import os
import sqlite3
from pathlib import Path
from typing import Any, Final

from madang.wire.errors import StateVersion

_FOLDER: Final = Path(__file__).with_name("migrations")


def head() -> str:
    """Number of the newest revision that this code knows."""
    return max(name[:4] for name in os.listdir(_FOLDER / "versions") if name[:4].isdecimal())


def _check(current: str | None) -> bool:
    """Whether there is something to do; raises StateVersion for what a newer version wrote."""
    newest = head()
    if current is not None and (not current.isdecimal() or int(current) > int(newest)):
        text = (
            f"the database has schema {current}, this version knows up to {newest}. "
            "Start the newer version that wrote it."
        )
        raise StateVersion(text, found=current, known=newest)
    return current != newest


async def migrate_sqlite(connection: sqlite3.Connection, path: str) -> None:
    """Idempotent; each run is one transaction."""
    table = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
    current = None
    if connection.execute(table).fetchone():
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        current = row[0] if row else None
    if _check(current):
        _upgrade_sqlite(path)


def _upgrade_sqlite(path: str) -> None:
    import sqlalchemy as sa
    from sqlalchemy.pool import NullPool

    url = sa.URL.create("sqlite+pysqlite", database=path)
    engine = sa.create_engine(url, poolclass=NullPool)

    with engine.begin() as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, sqlite3.Connection)
        raw.isolation_level = None
        raw.execute("BEGIN IMMEDIATE")  # the driver alone would leave DDL outside
        _run_alembic(connection=connection, render_as_batch=True)
    engine.dispose()


def script_to(revision: str, dialect: str) -> str:
    """What makes an empty database one of that *revision*, as SQL."""
    text = io.StringIO()
    _run_alembic(dialect_name=dialect, as_sql=True, target=revision, output_buffer=text)
    return text.getvalue()


async def migrate_postgres(connection: Any, lock: int) -> None:
    """Idempotent; safe when several servers start at once."""
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({lock})")
        current = None
        if await connection.fetchval("SELECT to_regclass('alembic_version')"):
            current = await connection.fetchval("SELECT version_num FROM alembic_version")
        if _check(current):
            script = io.StringIO()
            _run_alembic(
                dialect_name="postgresql",
                as_sql=True,
                starting_rev=current,
                output_buffer=script,
            )
            await connection.execute(script.getvalue())


def _run_alembic(
    *,
    as_sql: bool = False,
    starting_rev: str | None = None,
    target: str = "head",
    **configure: Any,
) -> None:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(_FOLDER))
    config = Config()

    def upgrade(revision: Any, _context: Any) -> Any:
        return script._upgrade_revs(target, revision or starting_rev or "base")

    with EnvironmentContext(config, script, fn=upgrade, as_sql=as_sql) as environment:
        environment.configure(starting_rev=starting_rev, **configure)
        environment.run_migrations()
