"""What users do with sessions."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, replace
from typing import Final

from madang.kit.clock import Clock
from madang.kit.codec import to_json
from madang.kit.ids import new_name
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.db.events import EventFeed, last_event
from madang.manager.fleet.service import FleetService
from madang.manager.http import Caller
from madang.manager.limits.service import LimitService
from madang.manager.scheduling.planner import plan
from madang.manager.scheduling.service import Memory
from madang.manager.session import store
from madang.manager.session.rules import (
    accounts_of,
    view,
)
from madang.manager.session.service import moves
from madang.manager.session.service.agents import AgentService
from madang.manager.session.service.estimates import estimates, pending_of
from madang.manager.session.service.kernels import not_running
from madang.manager.session.service.making import Maker
from madang.manager.session.service.records import Records
from madang.manager.session.service.snapshots import SnapshotReader, View
from madang.manager.session.types import SessionRow
from madang.wire.api import StopRequest
from madang.wire.errors import (
    Ambiguous,
    Conflict,
    HostLacks,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
)
from madang.wire.kernel import ImageMount, KernelReport
from madang.wire.session import (
    HistoryEntry,
    Reason,
    Session,
    SessionKind,
    SessionSpec,
    SessionStatus,
)

S = SessionStatus

MAX_WAIT_S: Final = 60.0
MAX_KEY: Final = 200
SEEN: Final = 2000
"""Waiting sessions that a preview and a question look at."""
CONFIRM_S: Final = 2.0
"""How long a freeze or thaw waits to hear that it was done; it is done later all the same."""
_REF: Final = re.compile(r"(?:([0-9a-z._-]{1,40})/)?([0-9a-z-]{1,64})")


@dataclass(frozen=True, slots=True)
class Created:
    row: SessionRow
    repeated: bool
    """The Idempotency-Key was known: this is the session made then."""


class SessionService:
    """Callers see their own sessions, administrators all."""

    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        fleet: FleetService,
        agents: AgentService,
        maker: Maker,
        limits: LimitService,
        reader: SnapshotReader,
        memory: Memory,
        records: Records,
        clock: Clock,
    ) -> None:
        self._database: Final = database
        self.records: Final = records
        self._feed: Final = feed
        self._fleet: Final = fleet
        self._agents: Final = agents
        self._maker: Final = maker
        self._limits: Final = limits
        self._reader: Final = reader
        self._memory: Final = memory
        self._clock: Final = clock

    # Making

    async def create(
        self,
        caller: Caller,
        spec: SessionSpec,
        *,
        key: str | None = None,
        kind: SessionKind | None = None,
        offers: tuple[str, ...] = (),
        mount: ImageMount | None = None,
    ) -> Created:
        """Accept a session; the scheduler is woken. Slow checks come before the transaction.

        *offers*: layers that a build may read. *mount*: what it runs from, instead of an image.
        """
        if key is not None and not (1 <= len(key) <= MAX_KEY and key.isprintable()):
            raise InvalidRequest(f"Idempotency-Key: 1 to {MAX_KEY} printable characters.")
        body = to_json(spec)
        digest = hashlib.sha256(body).hexdigest()
        if key is not None:
            async with self._database.read() as tx:
                if (known := await self._by_key(tx, caller, key, digest)) is not None:
                    return Created(known, repeated=True)
        ready = await self._maker.ready(caller, spec, body.decode(), kind, mount)
        if offers:
            ready = replace(ready, mount=replace(ready.mount, offers=offers))
        async with self._database.begin() as tx:
            if key is not None:
                if (known := await self._by_key(tx, caller, key, digest)) is not None:
                    return Created(known, repeated=True)
                await store.add_key(
                    tx,
                    owner_id=caller.user_id,
                    key=key,
                    digest=digest,
                    session_id=ready.id,
                    at=ready.at,
                )
            name = await self._free_name(tx, caller, spec.name)
            row = await self._maker.row(tx, caller, ready, name, self._get)
            await store.add(tx, row, actor=caller.user)
            await self.records.created(tx, caller, row, spec)
        self._feed.wake()
        return Created(row, repeated=False)

    async def _by_key(self, tx: Reader, caller: Caller, key: str, digest: str) -> SessionRow | None:
        known = await store.find_key(tx, caller.user_id, key)
        if known is None:
            return None
        if known.digest != digest:
            raise IdempotencyMismatch(f"Idempotency-Key {key!r} came before with another body.")
        row = await store.find(tx, known.session_id)
        if row is None:
            text = f"Idempotency-Key {key!r} made session {known.session_id}, which was removed."
            raise Conflict(text, session=known.session_id)
        return row

    async def _free_name(self, tx: Transaction, caller: Caller, wanted: str | None) -> str:
        if wanted is not None:
            if await store.name_taken(tx, caller.user_id, wanted):
                text = (
                    f"you have a session named {wanted!r}; choose another, or `madang rm {wanted}`."
                )
                raise Conflict(text, name=wanted)
            return wanted
        tries = 0
        while await store.name_taken(tx, caller.user_id, name := new_name(tries)):
            tries += 1
        return name

    async def preview(self, caller: Caller, spec: SessionSpec) -> Session:
        """As ``create`` would make it, with where it would go or why it would wait; not stored."""
        row, _ = await self.draft(caller, spec)
        return view(row, None)

    async def draft(self, caller: Caller, spec: SessionSpec) -> tuple[SessionRow, View]:
        """The row that ``create`` would add, with its place or its reason, among all that wait."""
        ready = await self._maker.ready(caller, spec, to_json(spec).decode(), None)
        now = seconds(ready.at)
        async with self._database.read() as tx:
            row = await self._maker.row(tx, caller, ready, spec.name or "", self._get)
            found = await self._reader.read(tx, [*await store.list_pending(tx, SEEN), row], now)
        decided = plan(found.snapshot, found.policies, now)
        for place in decided.places:
            if place.session == row.id:
                return replace(row, node=place.node), found
        waits = (*decided.waits, *decided.given_up)
        wait = next(wait for wait in waits if wait.session == row.id)
        told = estimates(found, [wait], self._memory, now).get(row.id)
        pending = pending_of(row, wait, told, row.created_at)
        return replace(row, pending=to_json(pending).decode()), found

    # Reading

    async def get(self, caller: Caller, ref: str) -> SessionRow:
        """By id, name, or unique prefix of a name; ``owner/name`` for whoever sees several owners'.

        The caller's own come before all others. Raises NotFound, Ambiguous.
        """
        async with self._database.read() as tx:
            return await self._get(tx, caller, ref)

    async def _get(self, tx: Reader, caller: Caller, ref: str) -> SessionRow:
        if match := _REF.fullmatch(ref):
            owner, name = match.groups()
            found = await store.list_ref(tx, name, caller, owner=owner)
            if not found:
                found = await store.list_prefix(tx, name, caller, owner=owner)
            own = [row for row in found if row.owner_id == caller.user_id]
            if len(chosen := own or found) == 1:
                return chosen[0]
            if chosen:
                names = ", ".join(f"{row.owner}/{row.name}" for row in chosen)
                raise Ambiguous(f"{ref!r} may be several sessions: {names}, …", ref=ref)
        raise NotFound(f"no session {ref[:64]!r}. `madang ps --all` lists them.", ref=ref[:64])

    def view(self, row: SessionRow) -> Session:
        return view(row, self._agents.live.get(row.id))

    async def wait(
        self, caller: Caller, ref: str, *, version: int | None, timeout_s: float
    ) -> SessionRow:
        """Returns once the version differs from *version*, after *timeout_s* in any case."""
        row = await self.get(caller, ref)
        until = self._clock.monotonic() + min(timeout_s, MAX_WAIT_S)
        with self._feed.watch(row.id) as watch:
            while True:
                row = await self.get(caller, row.id)
                left = until - self._clock.monotonic()
                if version is None or row.version != version or left <= 0 or self._feed.closing:
                    return row
                await watch.wait_for(self._clock, left)

    async def page(
        self,
        caller: Caller,
        *,
        status: SessionStatus | None,
        ended: bool,
        after: str | None,
        limit: int,
    ) -> tuple[list[SessionRow], int]:
        """Newest first, and the number of the last event that it shows."""
        async with self._database.read() as tx:
            last = await last_event(tx)
            rows = await store.list_page(
                tx,
                caller=caller,
                status=status,
                ended=ended,
                after=after,
                limit=limit,
            )
        return rows, last

    async def wait_event(self, since: int, timeout_s: float) -> None:
        """Returns once an event after *since* exists, after *timeout_s* in any case."""
        until = self._clock.monotonic() + min(timeout_s, MAX_WAIT_S)
        with self._feed.watch() as watch:
            while not self._feed.closing:
                async with self._database.read() as tx:
                    last = await last_event(tx)
                left = until - self._clock.monotonic()
                if last > since or left <= 0:
                    return
                await watch.wait_for(self._clock, left)

    async def history(self, caller: Caller, ref: str) -> list[HistoryEntry]:
        async with self._database.read() as tx:
            row = await self._get(tx, caller, ref)
            return await store.list_history(tx, row.id)

    # Standing still

    async def set_frozen(self, caller: Caller, ref: str, *, frozen: bool) -> SessionRow:
        """Freeze or thaw; the answer comes when the machine has done it, or does not say so soon.

        Raises SessionNotRunning unless it is RUNNING, HostLacks where its machine can't.
        """
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            row = await self._get(tx, caller, ref)
            if row.status != S.RUNNING:
                raise not_running(row)
            row = await moves.set_frozen(tx, row, at=at, frozen=frozen) or row
            await self.records.write(tx, caller, row, "frozen" if frozen else "thawed")
        self._feed.wake()
        report = await self._confirmation(row)
        if report is not None and report.freeze_error and frozen:
            raise HostLacks(f"session {row.name} is not frozen: {report.freeze_error}")
        return await self.get(caller, row.id)

    async def _confirmation(self, row: SessionRow) -> KernelReport | None:
        """The agent's report after it followed the order in *row*; None: it has not said so yet."""
        until = self._clock.monotonic() + CONFIRM_S
        while (left := until - self._clock.monotonic()) > 0 and not self._feed.closing:
            if row.held_by not in self._fleet.online():
                return None
            report = self._agents.live.get(row.id)
            if report is not None and report.freeze_revision >= row.freeze_revision:
                return report
            await self._clock.wait(self._agents.heard.next(), left)
            if (current := await self._current(row)) is None or current.status != S.RUNNING:
                return None
        return None

    async def _current(self, row: SessionRow) -> SessionRow | None:
        async with self._database.read() as tx:
            return await store.find(tx, row.id)

    # Left alone

    async def protect(self, caller: Caller, ref: str, for_s: float | None) -> SessionRow:
        """Not to be stopped for being idle for that long from now; 0: the protection ends.

        None: as long as its limits allow. Raises LimitRefused for longer, Conflict where nothing
        would stop it.
        """
        if for_s is not None and not (math.isfinite(for_s) and for_s >= 0):
            raise InvalidRequest("for_s: seconds from now, 0 or more.", field="for_s")
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            row = await self._get(tx, caller, ref)
            if row.status == S.TERMINATED:
                raise not_running(row)
            accounts = accounts_of(row)
            until = at + micros(await self._limits.protection(tx, accounts, row.name, for_s))
            columns = {
                "protected_until": until if until > at else None,
                "protected_by": caller.user,
            }
            if until > at:
                columns |= {"idle_stop_at": None, "idle_text": ""}
            row = await store.change(tx, row, at=at, what="protected", **columns) or row
            after = {"protected_until": None if until <= at else seconds(until)}
            await self.records.write(tx, caller, row, "protected", after=after)
        self._feed.wake()
        return row

    # Ending

    async def stop(self, caller: Caller, ref: str, request: StopRequest) -> SessionRow:
        """Idempotent; the answer may still be TERMINATING."""
        grace = request.grace_s
        if grace is not None and not 0 <= grace <= 3600:
            raise InvalidRequest("grace_s: between 0 and 3600 seconds.", field="grace_s")
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            found = await self._get(tx, caller, ref)
            row = await moves.stop(
                tx,
                found,
                at=at,
                actor=caller.user,
                reason=Reason.USER,
                text=f"stopped by {caller.user}",
                grace_us=moves.to_stored(grace),
            )
            if row.version != found.version:
                before, after = {"status": found.status}, {"status": row.status, "grace_s": grace}
                await self.records.write(tx, caller, row, "stopped", before=before, after=after)
        self._feed.wake()
        return row

    async def remove(self, caller: Caller, ref: str, *, force: bool, version: int | None) -> None:
        """With output and files; *force* also ends it, without grace."""
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            row: SessionRow | None = await self._get(tx, caller, ref)
            assert row is not None
            if version is not None and row.version != version:
                text = f"session {row.name} is at version {row.version}, not {version}."
                raise PreconditionFailed(text, version=row.version)
            if row.status != S.TERMINATED:
                if not force:
                    text = (
                        f"session {row.name} has not ended: `madang stop {row.name}` first, or "
                        f"`madang rm --force {row.name}`."
                    )
                    raise Conflict(text, status=row.status)
                ended = moves.lost(f"removed by {caller.user}", reason=Reason.USER)
                row = await moves.end(tx, row, ended, at=at, actor=caller.user)
            if row is not None and await moves.remove(tx, row, at=at, actor=caller.user):
                before = {"owner": row.owner, "force": force}
                await self.records.write(tx, caller, row, "removed", before=before)
        self._feed.wake()
