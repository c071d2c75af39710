"""The row of a session that is to be made: everything checked, nothing stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Protocol

from madang.kit.clock import Clock
from madang.kit.codec import to_json
from madang.kit.ids import new_id
from madang.manager.db import Reader, micros
from madang.manager.fleet import store as ledger
from madang.manager.fleet.service import FleetService
from madang.manager.fleet.types import Slots
from madang.manager.http import Caller
from madang.manager.identity.service import People
from madang.manager.limits.service import LimitService, PresetService
from madang.manager.limits.types import Asked
from madang.manager.policy.service import PolicyService
from madang.manager.scheduling.rules import priority_of
from madang.manager.scheduling.service import GroupService
from madang.manager.scheduling.service.reservations import check_use
from madang.manager.scheduling.types import GroupRules, Wishes
from madang.manager.session.rules import check_root, check_spec, next_phases, resolve_size
from madang.manager.session.service import moves
from madang.manager.session.service.places import Asking, refuse_impossible, wishes_for
from madang.manager.session.types import Blobs, Images, SessionRow, SessionSettings
from madang.wire.errors import PlatformError, WorkspaceIncomplete
from madang.wire.kernel import ImageMount
from madang.wire.session import SessionKind, SessionSpec, SessionStatus
from madang.wire.size import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A request whose slow checks are done."""

    id: str
    """Of the session that it becomes."""
    at: int
    spec: SessionSpec
    body: str
    """As the user sent it."""
    kind: SessionKind
    size: Size
    mount: ImageMount
    image_policy: str


class Find(Protocol):
    async def __call__(self, tx: Reader, caller: Caller, ref: str) -> SessionRow: ...


class Maker:
    def __init__(
        self,
        fleet: FleetService,
        images: Images,
        people: People,
        blobs: Blobs,
        limits: LimitService,
        presets: PresetService,
        groups: GroupService,
        policies: PolicyService,
        clock: Clock,
        settings: SessionSettings,
    ) -> None:
        self._fleet: Final = fleet
        self._images: Final = images
        self._people: Final = people
        self._blobs: Final = blobs
        self._limits: Final = limits
        self._presets: Final = presets
        self._groups: Final = groups
        self._policies: Final = policies
        self._clock: Final = clock
        self._settings: Final = settings

    async def ready(
        self,
        caller: Caller,
        spec: SessionSpec,
        body: str,
        kind: SessionKind | None,
        mount: ImageMount | None = None,
    ) -> Ready:
        """What needs no transaction. Raises what is wrong with the request itself.

        *mount*: what it runs from, instead of the image that *spec* names.
        """
        check_spec(spec)
        if spec.preset:
            spec = replace(spec, size=await self._presets.fill(spec.preset, spec.size))
        size = resolve_size(spec, self._settings)
        mount = mount or await self._images.resolve(caller, spec.image)
        check_root(spec, mount)
        image_policy = await self._images.policy_of(caller, spec.image)
        if spec.workspace is not None and not await self._blobs.complete(spec.workspace):
            text = f"the server lacks files of working directory {spec.workspace[:12]}; send them."
            raise WorkspaceIncomplete(text, workspace=spec.workspace)
        if kind is None:
            kind = SessionKind.RUN if spec.argv else SessionKind.IDLE
        return Ready(
            id=new_id(),
            at=micros(self._clock.now()),
            spec=spec,
            body=body,
            kind=kind,
            size=size,
            mount=mount,
            image_policy=image_policy,
        )

    async def row(
        self, tx: Reader, caller: Caller, ready: Ready, name: str, find: Find
    ) -> SessionRow:
        """With its project, group, priority, wishes and time limit.

        *find*: who its dependencies are. Raises GroupRefused, LimitExceeded, PolicyUnkept, …
        """
        spec = ready.spec
        project = await self._people.project_for(tx, caller, spec.project)
        groups = await self._groups.current(tx)
        group = groups.choose(spec.group, caller, project)
        rules = groups.rules[group]
        if spec.reservation:
            await check_use(tx, spec.reservation, group, project)
        after = [(await find(tx, caller, ref)).id for ref in spec.after]
        accounts = await self._limits.accounts(
            tx, user=caller.user_id, project=project, token=caller.token_id
        )
        asking = Asking(
            spec=spec,
            slots=Slots.of(ready.size),
            image_policy=ready.image_policy,
            group=group,
            project=project,
            at=ready.at,
        )
        wishes = wishes_for(asking, accounts, tuple(after))
        await self._check_place(tx, asking, wishes, rules)
        priority = priority_of(spec.priority, group, rules, administers=caller.administers)
        asked = Asked(slots=asking.slots.amounts, time_s=ready.size.time_s)
        time_s = await self._limits.check_create(tx, accounts, asked, at=ready.at)
        return _row(caller, ready, asking, wishes, name=name, priority=priority, time_s=time_s)

    async def _check_place(
        self, tx: Reader, asking: Asking, wishes: Wishes, rules: GroupRules
    ) -> None:
        demands = await self._policies.demands(tx)
        try:
            nodes = await self._fleet.recent_nodes(tx)
            refuse_impossible(asking, wishes, rules, demands, nodes)
        except PlatformError:  # Nobody is refused for what has changed meanwhile.
            refuse_impossible(asking, wishes, rules, demands, await ledger.list_nodes(tx))


def _row(
    caller: Caller,
    ready: Ready,
    asking: Asking,
    wishes: Wishes,
    *,
    name: str,
    priority: int,
    time_s: float | None,
) -> SessionRow:
    """Made at once: it has many fields, and creations come by the hundred."""
    slots, at = asking.slots, ready.at
    return SessionRow(
        id=ready.id,
        name=name,
        kind=str(ready.kind),
        owner_id=caller.user_id,
        owner=caller.user,
        project_id=asking.project,
        status=str(SessionStatus.PENDING),
        result=None,
        priority=priority,
        spec=ready.body,
        image=ready.spec.image,
        image_digest=ready.mount.digest,
        image_mount=to_json(ready.mount).decode(),
        image_policy=ready.image_policy,
        cpu_milli=slots.cpu_milli,
        mem_bytes=slots.mem_bytes,
        pids=slots.pids,
        disk_bytes=slots.disk_bytes,
        time_us=moves.to_stored(time_s),
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
        grace_us=micros(ready.spec.grace_s),
        frozen_at=None,
        freeze_revision=0,
        pending=None,
        ended=None,
        phases=next_phases("[]", SessionStatus.PENDING, at),
        enforced="{}",
        warnings="[]",
        log_end=None,
        refused="{}",
        version=1,
        group_name=asking.group,
        token_id=caller.token_id,
        wishes=to_json(wishes).decode(),
    )
