"""Create, read, stop, remove."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from madang.manager.http import Call, Reply, endpoint
from madang.manager.http.versions import version_of
from madang.manager.session.service import SessionService
from madang.manager.session.service.kernels import KernelService
from madang.manager.session.service.users import MAX_WAIT_S
from madang.manager.session.types import SessionRow
from madang.wire.api import Page, SignalRequest, StopRequest
from madang.wire.limits import ProtectRequest
from madang.wire.session import HistoryEntry, Session, SessionSpec, SessionStatus

CREATE_LIMIT: Final = 16 << 20
"""Bytes of a request: a MiB of arguments takes up to six as JSON escapes, variables come on top."""

Seconds = Annotated[float, Meta(ge=0, le=MAX_WAIT_S)]


class CreateQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    dry_run: bool = False


class ListQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    status: SessionStatus | None = None
    all: bool = False
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    cursor: Annotated[str, Meta(pattern="^[0-9a-z]{26}$")] | None = None
    wait: Seconds = 0.0
    since: Annotated[int, Meta(ge=0)] | None = None


class GetQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    wait: Seconds = 0.0
    version: int | None = None


class RemoveQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    force: bool = False


class SessionApi:
    def __init__(self, sessions: SessionService, kernels: KernelService) -> None:
        self._sessions: Final = sessions
        self._kernels: Final = kernels

    def _tagged(self, row: SessionRow, status: int | None = None) -> Reply:
        headers = {"ETag": f'"{row.version}"'}
        if status == 201:
            headers["Location"] = f"/v1/sessions/{row.id}"
        return Reply(self._sessions.view(row), headers, status)

    @endpoint(
        "POST",
        "/v1/sessions",
        scope="sessions",
        query=CreateQuery,
        body=SessionSpec,
        returns=Session,
        status=201,
        also=(200,),
        body_limit=CREATE_LIMIT,
        headers=("Idempotency-Key",),
    )
    async def create_session(self, call: Call[CreateQuery, SessionSpec]) -> Reply:
        """Create a session; with an Idempotency-Key, once."""
        if call.query.dry_run:
            return Reply(await self._sessions.preview(call.caller, call.body), status=200)
        key = call.header("Idempotency-Key")
        created = await self._sessions.create(call.caller, call.body, key=key)
        return self._tagged(created.row, 201)

    @endpoint("GET", "/v1/sessions", query=ListQuery, returns=Page)
    async def list_sessions(self, call: Call[ListQuery, None]) -> Reply:
        """List sessions, newest first; with wait, once something changed after event since."""
        query = call.query
        if query.wait and query.since is not None:
            await self._sessions.wait_event(query.since, query.wait)
        rows, last = await self._sessions.page(
            call.caller,
            status=query.status,
            ended=query.all,
            after=query.cursor,
            limit=query.limit,
        )
        following = rows[-1].id if len(rows) == query.limit else None
        page = Page(items=tuple(map(self._sessions.view, rows)), next=following)
        return Reply(page, {"Madang-Event": str(last)})

    @endpoint(
        "GET",
        "/v1/sessions/{ref}",
        query=GetQuery,
        returns=Session,
        also=(304,),
        headers=("If-None-Match",),
    )
    async def get_session(self, call: Call[GetQuery, None]) -> Reply:
        """Read a session; with wait, once its version differs."""
        query, ref = call.query, call.path("ref")
        if query.wait:
            row = await self._sessions.wait(
                call.caller, ref, version=query.version, timeout_s=query.wait
            )
        else:
            row = await self._sessions.get(call.caller, ref)
        if call.header("If-None-Match") == f'"{row.version}"':
            return Reply(None, {"ETag": f'"{row.version}"'}, 304)
        return self._tagged(row)

    @endpoint(
        "POST", "/v1/sessions/{ref}/stop", scope="sessions", body=StopRequest, returns=Session
    )
    async def stop_session(self, call: Call[None, StopRequest]) -> Reply:
        """Stop a session: SIGTERM, its grace, SIGKILL. Idempotent."""
        return self._tagged(await self._sessions.stop(call.caller, call.path("ref"), call.body))

    @endpoint("POST", "/v1/sessions/{ref}/freeze", scope="sessions", returns=Session)
    async def freeze_session(self, call: Call[None, None]) -> Reply:
        """Freeze a running session: no CPU, memory and slots kept; input wakes it. Idempotent."""
        row = await self._sessions.set_frozen(call.caller, call.path("ref"), frozen=True)
        return self._tagged(row)

    @endpoint("POST", "/v1/sessions/{ref}/thaw", scope="sessions", returns=Session)
    async def thaw_session(self, call: Call[None, None]) -> Reply:
        """Let a frozen session go on. Idempotent."""
        row = await self._sessions.set_frozen(call.caller, call.path("ref"), frozen=False)
        return self._tagged(row)

    @endpoint(
        "POST",
        "/v1/sessions/{ref}/protect",
        scope="sessions",
        body=ProtectRequest,
        returns=Session,
    )
    async def protect_session(self, call: Call[None, ProtectRequest]) -> Reply:
        """Keep a session from being stopped as idle, for a time that its limits allow."""
        ref = call.path("ref")
        return self._tagged(await self._sessions.protect(call.caller, ref, call.body.for_s))

    @endpoint("POST", "/v1/sessions/{ref}/signal", scope="sessions", body=SignalRequest, status=204)
    async def signal_session(self, call: Call[None, SignalRequest]) -> None:
        """Send a signal to the program's process group."""
        row = await self._sessions.get(call.caller, call.path("ref"))
        await self._sessions.records.note(call.caller, row, "signalled", signal=call.body.signal)
        await self._kernels.signal(row, call.body.signal)

    @endpoint(
        "DELETE",
        "/v1/sessions/{ref}",
        scope="sessions",
        query=RemoveQuery,
        status=204,
        headers=("If-Match",),
    )
    async def remove_session(self, call: Call[RemoveQuery, None]) -> None:
        """Remove an ended session with its output and files; force: end it first."""
        version = version_of(call.header("If-Match"))
        await self._sessions.remove(
            call.caller, call.path("ref"), force=call.query.force, version=version
        )

    @endpoint("GET", "/v1/sessions/{ref}/history", returns=list[HistoryEntry])
    async def get_history(self, call: Call[None, None]) -> list[HistoryEntry]:
        """Every move of a session, oldest first."""
        return await self._sessions.history(call.caller, call.path("ref"))
