"""REST of the audit log."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from aiohttp import web
from msgspec import Meta

from madang.manager.audit.service import AuditLog
from madang.manager.http import Call, endpoint, start_stream
from madang.wire.audit import AuditHead, AuditPage

MEDIA_TYPE: Final = "application/x-ndjson"
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Time = Annotated[float, Meta(ge=0, le=1e11)]


class AuditQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    actor: Name | None = None
    action: Annotated[str, Meta(pattern="^[a-z_.]{1,64}$")] | None = None
    """``session.created``, or ``session`` for all that begin so."""
    kind: Annotated[str, Meta(pattern="^[a-z_]{1,64}$")] | None = None
    object: Name | None = None
    """Id or name."""
    since: Time | None = None
    until: Time | None = None
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    cursor: Annotated[int, Meta(ge=1, le=2**53)] | None = None


class AuditApi:
    def __init__(self, audit: AuditLog) -> None:
        self._audit: Final = audit

    @endpoint("GET", "/v1/audit", query=AuditQuery, returns=AuditPage)
    async def list_audit(self, call: Call[AuditQuery, None]) -> AuditPage:
        """Logins and changes, newest first; administrators and monitors, others of a domain."""
        query = call.query
        items = await self._audit.list(
            call.caller,
            actor=query.actor,
            action=query.action,
            kind=query.kind,
            subject=query.object,
            since=query.since,
            until=query.until,
            before=query.cursor,
            limit=query.limit,
        )
        following = items[-1].seq if len(items) == query.limit else None
        return AuditPage(items=tuple(items), next=following)

    @endpoint("GET", "/v1/audit/head", returns=AuditHead)
    async def get_audit_head(self, call: Call[None, None]) -> AuditHead:
        """Number and digest of the last record: keep it elsewhere."""
        return await self._audit.head(call.caller)

    @endpoint("GET", "/v1/audit/export", streams=MEDIA_TYPE)
    async def export_audit(self, call: Call[None, None]) -> web.StreamResponse:
        """The whole chain in its canonical form, a line a record, for `madang audit verify`."""
        lines = self._audit.export(call.caller)
        first = await anext(lines)  # an error here is still a proper answer
        response = await start_stream(call, MEDIA_TYPE)
        await response.write(first)
        async for some in lines:
            await response.write(some)
        await response.write_eof()
        return response
