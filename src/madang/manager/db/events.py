"""The outbox: each change writes its event in its own transaction; a feed wakes who waits for it.

Numbers grow in the order in which events become visible (see the package's docstring), so that «all
after the last one that I saw» misses none. The feed reads the rows themselves: a wake-up may
come from this process (``wake``) or, with several servers, from its own slow period.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy as sa

from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.kit.loop import Loop
from madang.manager.db.database import Database, Reader, Transaction
from madang.manager.db.schema import Serial, metadata, seconds
from madang.wire.api import Event

PAGE: Final = 500

events: Final = sa.Table(
    "events",
    metadata,
    sa.Column("id", Serial, sa.Identity(), primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("object", sa.Text, nullable=False),
    sa.Column("owner_id", sa.Text, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text, nullable=False, server_default=""),
    sqlite_autoincrement=True,
)
sa.Index("ix_events_at", events.c.at)

_ADD: Final = sa.insert(events)


def events_after(*visible: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """A statement for ``list_events``: the next ``PAGE`` after ``b_after``."""
    return (
        sa.select(events)
        .where(events.c.id > sa.bindparam("b_after"), *visible)
        .order_by(events.c.id)
        .limit(PAGE)
    )


_AFTER: Final = events_after()
_LAST: Final = sa.select(sa.func.max(events.c.id).label("id"))
_PRUNE: Final = sa.delete(events).where(events.c.at < sa.bindparam("b_before"))


def event_row(
    *,
    at: int,
    kind: str,
    subject: str,
    owner_id: str,
    payload: dict[str, Any],
    project_id: str = "",
) -> dict[str, Any]:
    """For ``add_events``."""
    text = to_json(payload).decode()
    return {
        "at": at,
        "kind": kind,
        "object": subject,
        "owner_id": owner_id,
        "payload": text,
        "project_id": project_id,
    }


async def add_event(
    tx: Transaction,
    *,
    at: int,
    kind: str,
    subject: str,
    owner_id: str,
    payload: dict[str, Any],
    project_id: str = "",
) -> None:
    """Call it in the transaction of the change itself; owner and project say who may see it."""
    row = event_row(
        at=at,
        kind=kind,
        subject=subject,
        owner_id=owner_id,
        payload=payload,
        project_id=project_id,
    )
    await tx.execute(_ADD, **row)


async def add_events(tx: Transaction, rows: list[dict[str, Any]]) -> None:
    """Several at once, in this order."""
    await tx.many(_ADD, rows)


async def list_events(
    tx: Reader, *, after: int, statement: sa.Select[Any] = _AFTER, **params: Any
) -> list[Event]:
    """The next ``PAGE`` at most; *statement* and its *params*: of ``events_after``."""
    return [
        Event(
            id=row.id,
            at=seconds(row.at),
            kind=row.kind,
            object=row.object,
            payload=from_json(dict, row.payload),
        )
        for row in await tx.all(statement, b_after=after, **params)
    ]


async def last_event(tx: Reader) -> int:
    row = await tx.one(_LAST)
    return 0 if row is None or row.id is None else int(row.id)


async def prune_events(tx: Transaction, *, before: int) -> int:
    return await tx.execute(_PRUNE, b_before=before)


class Watch:
    """Set whenever something happened to what it watches; ``wait`` clears it."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()

    async def wait_for(self, clock: Clock, timeout_s: float) -> bool:
        """False after *timeout_s* without a change."""
        changed = await clock.wait(self._event, timeout_s)
        self._event.clear()
        return changed


class EventFeed(Loop):
    """Wakes watchers of objects, of everything, and the loops that asked for a kind of event."""

    period_s = 2.0

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__(clock)
        self._database: Final = database
        self._last = -1
        self._objects: Final[defaultdict[str, set[Watch]]] = defaultdict(set)
        self._all: Final[set[Watch]] = set()
        self._listeners: Final[list[Callable[[Event], None]]] = []
        self.closing = False

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call *listener* for each event, in order; it must be quick and may not fail."""
        self._listeners.append(listener)

    @contextmanager
    def watch(self, object_id: str | None = None) -> Iterator[Watch]:
        """A watch of one object, or of everything."""
        watch = Watch()
        group = self._all if object_id is None else self._objects[object_id]
        group.add(watch)
        try:
            yield watch
        finally:
            group.discard(watch)
            if object_id is not None and not group:
                self._objects.pop(object_id, None)

    async def tick(self, now: float) -> None:
        if self._last < 0:
            async with self._database.read() as tx:
                self._last = await last_event(tx)
        page = PAGE
        while page == PAGE:
            async with self._database.read() as tx:
                found = await list_events(tx, after=self._last)
            page = len(found)
            for event in found:
                self._last = event.id
                self._publish(event)

    def _publish(self, event: Event) -> None:
        for watch in (*self._objects.get(event.object, ()), *self._all):
            watch.set()
        for listener in self._listeners:
            listener(event)

    def release(self) -> None:
        """The server stops: wake everybody; who waits looks at ``closing``."""
        self.closing = True
        for group in (*self._objects.values(), self._all):
            for watch in group:
                watch.set()
