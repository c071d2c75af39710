"""What users do with sessions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import to_json
from madang.kit.ids import new_id, new_name
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.db.events import EventFeed, last_event
from madang.manager.fleet import store as ledger
from madang.manager.fleet.service import FleetService
from madang.manager.fleet.tables import SLOTS
from madang.manager.fleet.types import Slots
from madang.manager.http import Caller
from madang.manager.identity.service import People
from madang.manager.scheduling.rules import lacking, plan, show, slot_name
from madang.manager.scheduling.types import Ask, Held, Room
from madang.manager.session import store
from madang.manager.session.rules import check_spec, next_phases, resolve_size, view
from madang.manager.session.service import moves
from madang.manager.session.service.agents import AgentService
from madang.manager.session.service.kernels import not_running
from madang.manager.session.types import Blobs, Images, SessionRow, SessionSettings
from madang.wire.api import StopRequest
from madang.wire.errors import (
    Ambiguous,
    Conflict,
    HostLacks,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    RuntimeNotOffered,
    SizeImpossible,
    WorkspaceIncomplete,
)
from madang.wire.kernel import ImageMount, KernelReport
from madang.wire.session import (
    HistoryEntry,
    Pending,
    Reason,
    Session,
    SessionKind,
    SessionSpec,
    SessionStatus,
)
from madang.wire.size import Size

S = SessionStatus

MAX_WAIT_S: Final = 60.0
MAX_KEY: Final = 200
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
        images: Images,
        people: People,
        blobs: Blobs,
        clock: Clock,
        settings: SessionSettings,
    ) -> None:
        self._database: Final = database
        self._feed: Final = feed
        self._fleet: Final = fleet
        self._agents: Final = agents
        self._images: Final = images
        self._people: Final = people
        self._blobs: Final = blobs
        self._clock: Final = clock
        self._settings: Final = settings

    # Making

    async def create(
        self,
        caller: Caller,
        spec: SessionSpec,
        *,
        key: str | None = None,
        kind: SessionKind | None = None,
    ) -> Created:
        """Accept a session; the scheduler is woken. Slow checks come before the transaction."""
        if key is not None and not (1 <= len(key) <= MAX_KEY and key.isprintable()):
            raise InvalidRequest(f"Idempotency-Key: 1 to {MAX_KEY} printable characters.")
        body = to_json(spec)
        digest = hashlib.sha256(body).hexdigest()
        if key is not None:
            async with self._database.read() as tx:
                if (known := await self._by_key(tx, caller, key, digest)) is not None:
                    return Created(known, repeated=True)
        row = await self._prepare(caller, spec, body.decode(), kind)
        async with self._database.begin() as tx:
            if key is not None:
                if (known := await self._by_key(tx, caller, key, digest)) is not None:
                    return Created(known, repeated=True)
                await store.add_key(
                    tx,
                    owner_id=caller.user_id,
                    key=key,
                    digest=digest,
                    session_id=row.id,
                    at=row.created_at,
                )
            project_id = await self._people.project_for(tx, caller, spec.project)
            row = replace(row, project_id=project_id)
            row = replace(row, name=await self._free_name(tx, caller, spec.name))
            await store.add(tx, row, actor=caller.user)
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

    async def _prepare(
        self, caller: Caller, spec: SessionSpec, body: str, kind: SessionKind | None
    ) -> SessionRow:
        check_spec(spec)
        size = resolve_size(spec, self._settings)
        mount = await self._images.resolve(caller, spec.image)
        image_policy = await self._images.policy_of(caller, spec.image)
        if spec.workspace is not None and not await self._blobs.complete(spec.workspace):
            text = f"the server lacks files of working directory {spec.workspace[:12]}; send them."
            raise WorkspaceIncomplete(text, workspace=spec.workspace)
        await self._refuse_impossible(size)
        await self._refuse_missing(spec.runtime)
        if kind is None:
            kind = SessionKind.RUN if spec.argv else SessionKind.IDLE
        row = self._row(caller, spec, body, kind, size, mount)
        return replace(row, image_policy=image_policy)

    def _row(
        self,
        caller: Caller,
        spec: SessionSpec,
        body: str,
        kind: SessionKind,
        size: Size,
        mount: ImageMount,
    ) -> SessionRow:
        at = micros(self._clock.now())
        slots = Slots.of(size)
        return SessionRow(
            id=new_id(),
            name=spec.name or "",
            kind=str(kind),
            owner_id=caller.user_id,
            owner=caller.user,
            project_id=caller.project_id,
            status=str(S.PENDING),
            result=None,
            priority=0,
            spec=body,
            image=spec.image,
            image_digest=mount.digest,
            image_mount=to_json(mount).decode(),
            image_policy="",
            cpu_milli=slots.cpu_milli,
            mem_bytes=slots.mem_bytes,
            pids=slots.pids,
            disk_bytes=slots.disk_bytes,
            time_us=moves.to_stored(size.time_s),
            node=None,
            held_by=None,
            attempt=0,
            nonce="",
            revision=0,
            created_at=at,
            started_at=None,
            ended_at=None,
            status_since=at,
            deadline=None,
            stop_reason="",
            stop_text="",
            grace_us=micros(spec.grace_s),
            frozen_at=None,
            freeze_revision=0,
            pending=None,
            ended=None,
            phases=next_phases("[]", S.PENDING, at),
            enforced="{}",
            warnings="[]",
            log_end=None,
            refused="{}",
            version=1,
        )

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

    async def _refuse_impossible(self, size: Size) -> None:
        nodes = await self._fleet.nodes()
        slots = Slots.of(size)
        if not nodes or any(slots.within(node.capacity) for node in nodes):
            return
        asked = asdict(slots)
        slot, most = lacking(asked, [asdict(node.capacity) for node in nodes])
        name = slot_name(slot)
        text = (
            f"{name}: asks {show(slot, asked[slot])}, but the largest machine has "
            f"{show(slot, most)}. Ask for less with --{name}."
        )
        raise SizeImpossible(text, slot=name, asked=asked[slot], largest=most)

    async def _refuse_missing(self, runtime: str) -> None:
        """A runtime that no machine offers."""
        nodes = await self._fleet.nodes()
        offered = {name: None for node in nodes for name in node.runtimes}
        if runtime and nodes and runtime not in offered:
            raise RuntimeNotOffered(runtime, offered=offered, why="no machine offers it")

    async def preview(self, caller: Caller, spec: SessionSpec) -> Session:
        """As ``create`` would make it, with where it would go or why it would wait; not stored."""
        row = await self._prepare(caller, spec, to_json(spec).decode(), None)
        ask = ask_of(row)
        async with self._database.read() as tx:
            snapshot = await read_snapshot(tx, self._fleet.online())
        found = plan([ask], snapshot.rooms, seconds(row.created_at), held=snapshot.held)
        if found.places:
            return view(replace(row, node=found.places[0].node), None)
        wait = found.waits[0]
        pending = Pending(code=wait.code, text=wait.text, since=seconds(row.created_at))
        return view(replace(row, pending=to_json(pending).decode()), None)

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

    # Ending

    async def stop(self, caller: Caller, ref: str, request: StopRequest) -> SessionRow:
        """Idempotent; the answer may still be TERMINATING."""
        grace = request.grace_s
        if grace is not None and not 0 <= grace <= 3600:
            raise InvalidRequest("grace_s: between 0 and 3600 seconds.", field="grace_s")
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            row = await self._get(tx, caller, ref)
            row = await moves.stop(
                tx,
                row,
                at=at,
                actor=caller.user,
                reason=Reason.USER,
                text=f"stopped by {caller.user}",
                grace_us=moves.to_stored(grace),
            )
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
            if row is not None:
                await moves.remove(tx, row, at=at, actor=caller.user)
        self._feed.wake()


def ask_of(row: Any) -> Ask:
    """Of a ``SessionRow`` or a row of ``store.list_pending``."""
    return Ask(
        session=row.id,
        name=row.name,
        priority=row.priority,
        created_at=seconds(row.created_at),
        slots=_slots(row),
    )


def _slots(row: Any) -> dict[str, int]:
    return {slot: getattr(row, slot) for slot in SLOTS}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the planner looks at."""

    rooms: Sequence[Room]
    held: Sequence[Held]


async def read_snapshot(tx: Reader, online: set[str]) -> Snapshot:
    rooms = []
    for node in await ledger.list_nodes(tx):
        if node.name in online:
            capacity, used = asdict(node.capacity), asdict(node.used)
            free = {slot: capacity[slot] - used[slot] for slot in capacity}
            rooms.append(Room(node=node.name, capacity=capacity, free=free))
    held = [
        Held(node=row.node, name=row.name, slots=_slots(row)) for row in await store.list_placed(tx)
    ]
    return Snapshot(rooms, held)
