"""PostgreSQL by asyncpg's pool."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final

import asyncpg
from sqlalchemy.dialects import registry
from sqlalchemy.engine import Dialect

from madang.manager.db.database import Reader, Transaction
from madang.manager.db.migrate import migrate_postgres
from madang.manager.db.statement import Preparer, Statement
from madang.wire.errors import DatabaseUnavailable, PlatformError, StorageFull

POOL_MAX: Final = 8
COMMAND_TIMEOUT_S: Final = 30.0
WRITER_LOCK: Final = 0x6D6164616E67
"""Key of the advisory lock that makes writers take turns: ``madang``."""

_GONE: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that breaks between two steps of a command
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.QueryCanceledError,
)
_FULL: Final = (asyncpg.DiskFullError, asyncpg.OutOfMemoryError)


def _dialect() -> Dialect:
    kind: type[Dialect] = registry.load("postgresql.asyncpg")
    return kind()


def _translate(error: Exception) -> PlatformError:
    if isinstance(error, _FULL):
        return StorageFull(f"the database is out of space: {error}.")
    text = f"the database does not answer as it should: {type(error).__name__}: {error}."
    return DatabaseUnavailable(text)


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except (*_GONE, *_FULL) as exc:
        raise _translate(exc) from exc


def _changed(tag: str) -> int:
    count = tag.rpartition(" ")[2]
    return int(count) if count.isdecimal() else 0


class _Session:
    __slots__ = ("_connection", "_prepare")

    def __init__(self, connection: Any, prepare: Preparer) -> None:
        self._connection = connection
        self._prepare = prepare

    async def one(self, statement: Statement, /, **params: Any) -> Any | None:
        prepared = self._prepare(statement, params)
        with _our_errors():
            record = await self._connection.fetchrow(prepared.text, *prepared.arguments(params))
        return None if record is None else prepared.rows([record.values()])[0]

    async def all(self, statement: Statement, /, **params: Any) -> list[Any]:
        prepared = self._prepare(statement, params)
        with _our_errors():
            records = await self._connection.fetch(prepared.text, *prepared.arguments(params))
        return prepared.rows([record.values() for record in records])

    async def execute(self, statement: Statement, /, **params: Any) -> int:
        prepared = self._prepare(statement, params)
        with _our_errors():
            tag = await self._connection.execute(prepared.text, *prepared.arguments(params))
        return _changed(tag)

    async def many(self, statement: Statement, rows: list[dict[str, Any]], /) -> None:
        if rows:
            prepared = self._prepare(statement, rows[0])
            with _our_errors():
                await self._connection.executemany(prepared.text, map(prepared.arguments, rows))


class PostgresDatabase:
    """See ``Database``."""

    name = "postgresql"

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool: Any = None
        self._prepare: Final = Preparer(_dialect())

    async def open(self) -> None:
        with _our_errors():
            self._pool = await asyncpg.create_pool(
                self._url, min_size=1, max_size=POOL_MAX, command_timeout=COMMAND_TIMEOUT_S
            )
            async with self._pool.acquire() as connection:
                await migrate_postgres(connection, WRITER_LOCK)

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        pool = self._pool
        if pool is None:
            raise DatabaseUnavailable("the database is closed: the server is stopping.")
        with _our_errors():
            connection = await pool.acquire(timeout=COMMAND_TIMEOUT_S)
        try:
            yield connection
        finally:
            await pool.release(connection)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Transaction]:
        async with self._connection() as connection:
            with _our_errors():
                transaction = connection.transaction()
                await transaction.start()
            try:
                with _our_errors():
                    await connection.execute(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
                yield _Session(connection, self._prepare)
            except BaseException:
                if not connection.is_closed():
                    with suppress(*_GONE):  # what went wrong before is what counts
                        await transaction.rollback()
                raise
            with _our_errors():
                await transaction.commit()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Reader]:
        async with self._connection() as connection:
            yield _Session(connection, self._prepare)

    async def maintain(self) -> None:
        """PostgreSQL looks after itself."""
