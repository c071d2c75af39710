"""The face of the executor, and how to open one."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from madang.manager.db.statement import Statement
from madang.wire.errors import ConfigInvalid


class Reader(Protocol):
    async def one(self, statement: Statement, /, **params: Any) -> Any | None:
        """The first row, with its columns as attributes, or None."""
        ...

    async def all(self, statement: Statement, /, **params: Any) -> list[Any]: ...


class Transaction(Reader, Protocol):
    async def execute(self, statement: Statement, /, **params: Any) -> int:
        """How many rows it changed."""
        ...

    async def many(self, statement: Statement, rows: list[dict[str, Any]], /) -> None:
        """The same INSERT, UPDATE or DELETE for each of *rows*."""
        ...


class Database(Protocol):
    """All failures come as StorageFull, DatabaseUnavailable or, for a bug, as they are."""

    name: str
    """``sqlite`` or ``postgresql``"""

    async def open(self) -> None:
        """Connect and bring the schema up to date. Raises StateVersion if it is newer than us."""
        ...

    async def close(self) -> None: ...

    def begin(self) -> AbstractAsyncContextManager[Transaction]:
        """A write transaction."""
        ...

    def read(self) -> AbstractAsyncContextManager[Reader]:
        """For reading; each statement sees what was committed when it began."""
        ...

    async def maintain(self) -> None:
        """Whatever must be done now and then, off the event loop."""
        ...


def open_database(url: str, *, durable: bool = False) -> Database:
    """``sqlite:///relative``, ``sqlite:////absolute`` or ``postgresql://…``; not yet opened.

    *durable*: a commit also survives a power cut (SQLite; PostgreSQL's own setting decides there).
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "sqlite" and separator and len(rest) > 1 and rest.startswith("/"):
        from madang.manager.db.sqlite import SqliteDatabase

        return SqliteDatabase(rest[1:], durable=durable)
    if scheme in {"postgresql", "postgres"} and rest:
        from madang.manager.db.postgres import PostgresDatabase

        return PostgresDatabase(url)
    text = f"database: scheme {scheme!r} is unknown; give sqlite:///PATH or postgresql://…"
    raise ConfigInvalid(text, setting="database")
