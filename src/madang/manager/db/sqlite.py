"""SQLite: one writing and one reading connection, inline; checkpoints in a thread."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect

from madang.manager.db.database import Reader, Transaction
from madang.manager.db.migrate import migrate_sqlite
from madang.manager.db.statement import Preparer, Statement
from madang.wire.errors import DatabaseUnavailable, PlatformError, StorageFull

CACHE_KIB: Final = 2048
BUSY_MS: Final = 5000
_PRAGMAS: Final = (
    "journal_mode=WAL",
    "foreign_keys=ON",
    f"busy_timeout={BUSY_MS}",
    f"cache_size=-{CACHE_KIB}",
    "temp_store=MEMORY",
    "wal_autocheckpoint=0",
    "journal_size_limit=16777216",
)
_FULL: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_GONE: Final = frozenset({
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT,
})  # fmt: skip


def _translate(error: sqlite3.Error, path: str) -> PlatformError | None:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return None
    primary = code & 0xFF
    if primary in _FULL:
        text = f"the database {path} can't be written: {error}. Free space below the state folder."
        return StorageFull(text, database=path)
    if primary in _GONE:
        return DatabaseUnavailable(f"the database {path} can't be used: {error}.", database=path)
    return None


@contextmanager
def _our_errors(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        if (ours := _translate(exc, path)) is not None:
            raise ours from exc
        raise


class _Session:
    """Statements on one connection."""

    __slots__ = ("_connection", "_path", "_prepare")

    def __init__(self, connection: sqlite3.Connection, prepare: Preparer, path: str) -> None:
        self._connection = connection
        self._prepare = prepare
        self._path = path

    async def one(self, statement: Statement, /, **params: Any) -> Any | None:
        prepared = self._prepare(statement, params)
        with _our_errors(self._path):
            # All rows, so that no open cursor holds a snapshot or an unfinished UPDATE.
            records = self._connection.execute(prepared.text, prepared.arguments(params)).fetchall()
        return prepared.rows(records[:1])[0] if records else None

    async def all(self, statement: Statement, /, **params: Any) -> list[Any]:
        prepared = self._prepare(statement, params)
        with _our_errors(self._path):
            records = self._connection.execute(prepared.text, prepared.arguments(params)).fetchall()
        return prepared.rows(records)

    async def execute(self, statement: Statement, /, **params: Any) -> int:
        prepared = self._prepare(statement, params)
        with _our_errors(self._path):
            return self._connection.execute(prepared.text, prepared.arguments(params)).rowcount

    async def many(self, statement: Statement, rows: list[dict[str, Any]], /) -> None:
        if rows:
            prepared = self._prepare(statement, rows[0])
            with _our_errors(self._path):
                self._connection.executemany(prepared.text, map(prepared.arguments, rows))


class SqliteDatabase:
    """See ``Database``."""

    name = "sqlite"

    def __init__(self, path: str, *, durable: bool = False) -> None:
        self.path: Final = path
        self._durable = durable
        self._prepare: Final = Preparer(sqlite_dialect(paramstyle="qmark"))
        self._lock: Final = asyncio.Lock()
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._dirty = False

    async def open(self) -> None:
        with _our_errors(self.path):
            self._writer = self._connect()
            await migrate_sqlite(self._writer, self.path)
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only=ON")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'NORMAL'}")
        except BaseException:
            connection.close()
            raise
        return connection

    async def close(self) -> None:
        async with self._lock:
            reader, writer, self._reader, self._writer = self._reader, self._writer, None, None
            for connection in (reader, writer):
                if connection is not None:
                    connection.close()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Transaction]:
        async with self._lock:
            writer = self._open(self._writer)
            with _our_errors(self.path):
                writer.execute("BEGIN IMMEDIATE")
            try:
                yield _Session(writer, self._prepare, self.path)
                with _our_errors(self.path):
                    writer.execute("COMMIT")
            except BaseException:
                if writer.in_transaction:  # a full disk rolls back by itself
                    writer.execute("ROLLBACK")
                raise
            self._dirty = True

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Reader]:
        yield _Session(self._open(self._reader), self._prepare, self.path)

    def _open(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            raise DatabaseUnavailable("the database is closed: the server is stopping.")
        return connection

    async def maintain(self) -> None:
        """Move the write-ahead log into the database file; PASSIVE holds nobody up."""
        if self._dirty and self._writer is not None:
            self._dirty = False
            await asyncio.to_thread(self._checkpoint)

    def _checkpoint(self) -> None:
        with _our_errors(self.path):
            connection = sqlite3.connect(self.path, isolation_level=None)
            try:
                connection.execute("PRAGMA wal_autocheckpoint=0")
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            finally:
                connection.close()
