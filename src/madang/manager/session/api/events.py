"""Changes as server-sent events."""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from madang.kit.clock import Clock
from madang.kit.codec import to_json
from madang.manager.db import Database
from madang.manager.db.events import EventFeed, last_event
from madang.manager.http import Call, endpoint, start_stream
from madang.manager.session.store import list_events_for
from madang.wire.errors import InvalidRequest

QUIET_S: Final = 15.0
"""After so long without an event a comment is sent: proxies and dead clients are noticed."""


class EventQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    after: int | None = None
    """As ``Last-Event-ID``; 0: all that are kept."""


class EventApi:
    def __init__(self, database: Database, feed: EventFeed, clock: Clock) -> None:
        self._database: Final = database
        self._feed: Final = feed
        self._clock: Final = clock

    @endpoint(
        "GET",
        "/v1/events",
        query=EventQuery,
        streams="text/event-stream",
        headers=("Last-Event-ID",),
    )
    async def stream_events(self, call: Call[EventQuery, None]) -> web.StreamResponse:
        """Changes as they happen (server-sent events), from Last-Event-ID if given."""
        at = await self._start(call)
        response = await start_stream(call, "text/event-stream")
        await response.write(b": connected\n\n")
        with self._feed.watch() as watch:
            while not self._feed.closing:
                async with self._database.read() as tx:
                    found = await list_events_for(tx, call.caller, after=at)
                for event in found:
                    data = to_json(event)
                    at = event.id
                    await response.write(
                        b"id: %d\nevent: %s\ndata: %s\n\n" % (at, event.kind.encode(), data)
                    )
                if not found and not await watch.wait_for(self._clock, QUIET_S):
                    await response.write(b": quiet\n\n")
        await response.write_eof()
        return response

    async def _start(self, call: Call[EventQuery, None]) -> int:
        given = call.header("Last-Event-ID")
        if given is not None:
            if not (given.isascii() and given.isdecimal() and len(given) < 19):
                raise InvalidRequest(f"Last-Event-ID: {given[:40]!r} is no number.")
            return int(given)
        if call.query.after is not None:
            return call.query.after
        async with self._database.read() as tx:
            return await last_event(tx)
