"""REST of the queue: who waits, why, until when, what would help."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from madang.manager.http import Call, endpoint
from madang.manager.session.api.sessions import CREATE_LIMIT
from madang.manager.session.service.queueing import QueueService
from madang.wire.queue import Queue, Why
from madang.wire.session import SessionSpec


class QueueQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    group: Annotated[str, Meta(max_length=40)] | None = None
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    after: Annotated[int, Meta(ge=0)] = 0
    """Place after which the list begins."""


class QueueApi:
    def __init__(self, queue: QueueService) -> None:
        self._queue: Final = queue

    @endpoint("GET", "/v1/queue", query=QueueQuery, returns=Queue)
    async def get_queue(self, call: Call[QueueQuery, Any]) -> Queue:
        """Waiting sessions in the order of priority and age, each with its reason."""
        query = call.query
        return await self._queue.queue(
            call.caller, group=query.group, after=query.after, limit=query.limit
        )

    @endpoint("POST", "/v1/queue/preview", body=SessionSpec, returns=Why, body_limit=CREATE_LIMIT)
    async def preview_session(self, call: Call[Any, SessionSpec]) -> Why:
        """Where a session would run now; or why it would wait, until when, what would help."""
        return await self._queue.preview(call.caller, call.body)

    @endpoint("GET", "/v1/sessions/{ref}/why", returns=Why)
    async def get_why(self, call: Call[Any, Any]) -> Why:
        """Why a session waits, until when it probably does, and what would let it start."""
        return await self._queue.why(call.caller, call.path("ref"))
