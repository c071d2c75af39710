"""The manager, put together.

Start: ``open`` (database, loops), ``web_app`` into an aiohttp runner, ``serve_agent`` a link each.
Stop: the runner's clean-up tells all streams (``server.stopping``), then ``close``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

import madang
from madang.kit.clock import Clock
from madang.kit.codec import from_json
from madang.kit.languages import Languages
from madang.kit.loop import Loop
from madang.kit.secret import Secret
from madang.manager.audit.api import AuditApi
from madang.manager.audit.loops import AuditKeeper
from madang.manager.audit.service import AuditLog
from madang.manager.audit.types import AuditSettings
from madang.manager.cells.api import CellApi, ChannelApi
from madang.manager.cells.loops import CellKeeper
from madang.manager.cells.service import CellService
from madang.manager.cells.types import CellSettings
from madang.manager.db import open_database
from madang.manager.db.events import EventFeed, last_event
from madang.manager.db.loops import Checkpointer
from madang.manager.fleet.api import FleetApi
from madang.manager.fleet.loops import NodeWatch
from madang.manager.fleet.service import FleetService
from madang.manager.fleet.types import FleetSettings
from madang.manager.http import Caller, OpenCalls, build_app
from madang.manager.identity.api import AccountApi, LoginApi, PeopleApi
from madang.manager.identity.loops import Doorkeeper
from madang.manager.identity.service import (
    Accounts,
    IdentityService,
    Invitations,
    Logins,
    People,
    Tokens,
    Vault,
)
from madang.manager.identity.service.journal import Journal
from madang.manager.identity.types import IdentitySettings, Principal, Role
from madang.manager.image.api import ImageApi, RecipeApi
from madang.manager.image.loops import BuildWatcher, Collector, Refresher
from madang.manager.image.service import Commits, ImageService, Recipes, Transfers, Versions
from madang.manager.image.types import ImageSettings, Owner
from madang.manager.jupyter.api import ContentsApi, KernelApi, KernelChannelApi
from madang.manager.jupyter.loops import AloneWatch
from madang.manager.jupyter.service import Contents, Kernels
from madang.manager.jupyter.types import JupyterSettings
from madang.manager.languages import LanguageApi
from madang.manager.limits.api import LimitApi, PresetApi
from madang.manager.limits.service import LimitService, LimitTexts, PresetService
from madang.manager.metrics import Metrics
from madang.manager.policy.api import PolicyApi
from madang.manager.policy.service import PolicyService
from madang.manager.scheduling.api import GroupApi, ReservationApi
from madang.manager.scheduling.service import (
    GroupService,
    HistoryService,
    Memory,
    ReservationService,
)
from madang.manager.session import store as session_store
from madang.manager.session.api import (
    EventApi,
    FileApi,
    QueueApi,
    SessionApi,
    SessionPolicyApi,
    StreamApi,
    WorkspaceApi,
)
from madang.manager.session.loops import IdleWatch, Reaper, Retention, Scheduler
from madang.manager.session.service import AgentService, SessionService
from madang.manager.session.service.accounts import SessionLedger
from madang.manager.session.service.kernels import KernelService, kernel_of
from madang.manager.session.service.making import Maker
from madang.manager.session.service.policies import SessionPolicies
from madang.manager.session.service.queueing import QueueService
from madang.manager.session.service.records import Records
from madang.manager.session.service.snapshots import SnapshotReader
from madang.manager.session.types import Blobs, SessionRow, SessionSettings
from madang.manager.system import SystemApi
from madang.manager.usage.api import UsageApi
from madang.manager.usage.service import UsageService
from madang.wire.api import Defaults, Event, ServerInfo
from madang.wire.errors import NodeUnavailable, NotFound, TooLarge
from madang.wire.kernel import ImageMount
from madang.wire.link import LayerSaved, ManagerEnd, ReadFile, SaveLayer
from madang.wire.session import Session, SessionKind, SessionSpec, SessionStatus

_ASKS_OR_FREES: Final = frozenset({SessionStatus.PENDING, SessionStatus.TERMINATED})
"""Moves to these statuses are the scheduler's business."""
_MAY_PLACE: Final = frozenset(
    {"node.connected", "group.changed", "limits.applied", "limits.assigned"}
)
"""So are these: there may be room for somebody now."""
_REPORTED: Final = frozenset({SessionStatus.PREPARING, SessionStatus.RUNNING})
"""Moves to these come from the agent itself: there is nothing to tell it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerSettings:
    """All that the manager needs to know."""

    database_url: str
    """``sqlite:////absolute/path`` or ``postgresql://…``."""
    durable: bool = False
    """SQLite: whether each commit also survives a power cut (slower)."""
    state: str = ""
    """The state folder, for showing."""
    sessions: SessionSettings = field(default_factory=SessionSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    cells: CellSettings = field(default_factory=CellSettings)
    jupyter: JupyterSettings = field(default_factory=JupyterSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    identity: IdentitySettings = field(default_factory=IdentitySettings)
    secret_key_file: str = ""
    """Key of the secrets in the database; empty: they are lost with this process."""
    widen: tuple[str, ...] = ()
    """Rules of the base that sandbox policies may widen."""


class Manager:
    """See the module."""

    def __init__(self, settings: ManagerSettings, blobs: Blobs, clock: Clock) -> None:
        self._settings: Final = settings
        self._clock: Final = clock
        self._blobs: Final = blobs
        self.database: Final = open_database(settings.database_url, durable=settings.durable)
        self.feed: Final = EventFeed(self.database, clock)
        self.metrics: Final = Metrics()
        folder = os.path.join(settings.state, "languages") if settings.state else ""
        self.languages: Final = Languages(folder)
        self.audit: Final = AuditLog(self.database, clock)
        vault = Vault(settings.secret_key_file)
        journal = Journal(self.audit, self.feed, clock)
        self.identity: Final = IdentityService(
            self.database, clock, self.audit, settings.identity, vault
        )
        self.people: Final = People(self.database, clock, self.identity, journal)
        self.tokens: Final = Tokens(self.database, clock, self.identity, journal, vault)
        self.logins: Final = Logins(
            self.database, clock, settings.identity, self.tokens, journal, vault
        )
        self.accounts: Final = Accounts(
            self.database, clock, self.identity, self.logins, journal, vault
        )
        invitation_max_s = settings.identity.invitation_max_s
        self.invitations: Final = Invitations(
            self.database, clock, invitation_max_s, self.identity, self.logins, journal
        )
        self.calls: Final = OpenCalls()
        self._doorkeeper: Final = Doorkeeper(self.database, self.identity, self.calls, clock)
        self.usage: Final = UsageService(self.database, self.audit, clock)
        self.fleet: Final = FleetService(self.database, self.feed, clock, settings.fleet)
        self.images: Final = ImageService(
            self.database, self.audit, clock, settings.images, layers_changed=self.fleet.send_all
        )
        self.versions: Final = Versions(self.images, self.database, clock)
        self.recipes: Final = Recipes(self.database, self.images, clock, settings.images)
        self.commits: Final = Commits(self.database, self.images, clock)
        self.transfers: Final = Transfers(self.images, self.database, settings.images)
        limits = settings.sessions
        self.policies: Final = PolicyService(self.database, self.audit, clock, settings.widen)
        self.agents: Final = AgentService(
            self.database, self.feed, self.images, self.policies, self.usage, clock, limits
        )
        self.fleet.bind(self.agents)
        self.limits: Final = LimitService()
        self.limit_texts: Final = LimitTexts(self.database, self.audit, clock, self.limits)
        self.presets: Final = PresetService(self.database, self.audit, clock)
        ledger = SessionLedger(self.usage)
        self.limits.bind(ledger)
        self.limit_texts.bind(ledger)
        self.groups: Final = GroupService(
            self.database, self.feed, self.audit, clock, limits.reserve_after_s
        )
        self.history: Final = HistoryService(self.database, self.groups, limits.reserve_after_s)
        self.reservations: Final = ReservationService(
            self.database, self.feed, self.groups, self.audit, clock
        )
        memory = Memory()
        reader = SnapshotReader(self.fleet, self.groups, memory, self.limits, self.policies)
        maker = Maker(
            self.fleet,
            self.images,
            self.people,
            blobs,
            self.limits,
            self.presets,
            self.groups,
            self.policies,
            clock,
            limits,
        )
        self.sessions: Final = SessionService(
            self.database,
            self.feed,
            self.fleet,
            self.agents,
            maker,
            self.limits,
            reader,
            memory,
            Records(self.database, self.audit),
            clock,
        )
        self.queue: Final = QueueService(self.database, self.sessions, reader, memory, clock)
        self.kernels: Final = KernelService(self.fleet, self.policies)
        self.cells: Final = CellService(
            self.database, self.sessions, self.kernels, self.languages, clock, settings.cells
        )
        self._cell_keeper: Final = CellKeeper(self.cells, clock)
        self.jupyter: Final = Kernels(
            self.sessions,
            self.cells,
            self.images,
            self.presets,
            self.languages,
            clock,
            limits,
            settings.jupyter,
        )
        self._notebooks: Final = KernelChannelApi(self.jupyter)
        self.session_policies: Final = SessionPolicies(
            self.database, self.feed, self.fleet, self.agents, self.sessions, self.policies, clock
        )
        self.policies.bind(self.session_policies)
        self.images.sessions = _Builds(self)
        self._scheduler: Final = Scheduler(
            self.database, self.feed, reader, memory, self.limits, clock
        )
        self._builds: Final = BuildWatcher(self.images, clock)
        self._loops: Final[tuple[Loop, ...]] = (
            self.feed,
            self._scheduler,
            Reaper(self.database, self.feed, self.fleet, self.agents, clock, limits),
            IdleWatch(
                self.database, self.feed, self.fleet, self.agents, self.limits, self.audit, clock
            ),
            Retention(self.database, self.feed, clock, limits),
            Checkpointer(self.database, clock),
            self._doorkeeper,
            AuditKeeper(self.audit, clock, settings.audit),
            NodeWatch(self.fleet, clock),
            self._builds,
            Collector(self.images, clock),
            Refresher(self.versions, clock),
            self._cell_keeper,
            AloneWatch(self.database, self.feed, self.jupyter, clock),
        )
        self.feed.listen(self.identity.heard)
        self.feed.listen(self._doorkeeper.heard)
        self.feed.listen(self._wake)
        self.feed.listen(self._builds.listen)
        self.feed.listen(self._cell_keeper.listen)
        self.feed.listen(self.metrics.event)

    async def open(self) -> None:
        """Database up to date, loops running. Raises StateVersion, DatabaseUnavailable, …"""
        await self.database.open()
        for loop in self._loops:
            loop.start()

    async def close(self) -> None:
        """Sessions and agents go on."""
        self.feed.release()
        self.cells.release()
        await self.jupyter.close()
        await self.fleet.close()
        for loop in reversed(self._loops):
            await loop.stop()
        await self.database.close()

    async def ensure_admin(self) -> Secret | None:
        """The first token ever; None if one was made before."""
        return await self.identity.ensure_admin()

    async def new_admin_token(self, name: str) -> Secret:
        return await self.identity.new_admin_token(name)

    async def serve_agent(self, link: ManagerEnd) -> None:
        """Work with one agent until its link ends."""
        await self.fleet.serve(link)

    def web_app(self) -> web.Application:
        """All endpoints; its shutdown tells open streams."""
        app = build_app(
            [
                SystemApi(self._health, self._info, self.metrics, self._fill_metrics),
                LoginApi(
                    self.people,
                    self.logins,
                    self.invitations,
                    self._settings.identity.browser_max_s,
                ),
                AccountApi(self.tokens, self.accounts),
                PeopleApi(self.people, self.invitations),
                FleetApi(self.fleet, self._count_by_node),
                GroupApi(self.groups, self.history),
                ReservationApi(self.reservations),
                QueueApi(self.queue),
                AuditApi(self.audit),
                UsageApi(self.usage),
                ImageApi(self.images, self.versions, self.transfers),
                LanguageApi(self.languages),
                RecipeApi(self.recipes, self.commits),
                PolicyApi(self.policies),
                LimitApi(self.limit_texts),
                PresetApi(self.presets),
                SessionApi(self.sessions, self.kernels),
                SessionPolicyApi(self.sessions, self.kernels, self.session_policies),
                StreamApi(self.sessions, self.kernels, self.feed, self._clock),
                FileApi(self.sessions, self.kernels, self._clock),
                CellApi(self.cells),
                ChannelApi(self.cells),
                KernelApi(self.jupyter),
                self._notebooks,
                ContentsApi(
                    Contents(self.sessions, self.kernels, self._settings.jupyter),
                    self._settings.jupyter,
                ),
                WorkspaceApi(self._blobs, self._settings.sessions),
                EventApi(self.database, self.feed, self._clock),
            ],
            authenticate=self.identity.identify,
            open_calls=self.calls,
            observe=self.metrics.request,
            title="Madang",
            version=madang.__version__,
        )

        async def release(_app: web.Application) -> None:
            self.feed.release()
            self.cells.release()
            await self._notebooks.close()

        app.on_shutdown.append(release)
        return app

    def _wake(self, event: Event) -> None:
        """Who has to look because of *event*; each would look by itself later."""
        if event.kind == "session.removed":
            self.agents.forget(event.object)
        target = event.payload.get("target")
        if (node := event.payload.get("node")) and target not in _REPORTED:
            self.fleet.wake(node)
        if event.kind in _MAY_PLACE or target in _ASKS_OR_FREES:
            self._scheduler.wake()

    async def _health(self) -> None:
        async with self.database.read() as tx:
            await last_event(tx)

    async def _count_by_node(self) -> dict[str, int]:
        async with self.database.read() as tx:
            return await session_store.count_by_node(tx)

    async def _info(self) -> ServerInfo:
        limits = self._settings.sessions
        nodes = await self.fleet.nodes()
        return ServerInfo(
            version=madang.__version__,
            api="v1",
            node_count=len(nodes),
            database=self.database.name,
            state=self._settings.state,
            runtimes=tuple(dict.fromkeys(name for node in nodes for name in node.runtimes)),
            defaults=Defaults(
                cpu=limits.cpu,
                mem_bytes=limits.mem_bytes,
                pids=limits.pids,
                disk_bytes=limits.disk_bytes,
                time_s=limits.time_s,
                workspace_limit_bytes=limits.workspace_limit_bytes,
                log_limit_bytes=limits.log_limit_bytes,
            ),
        )

    async def _fill_metrics(self) -> None:
        async with self.database.read() as tx:
            statuses = await session_store.count_by_status(tx)
        nodes = await self.fleet.nodes()
        counts = await self.policies.counts()
        self.metrics.fill(statuses, nodes, self.fleet.online(), self.fleet.loads())
        self.metrics.fill_policies(counts)


class _Builds:
    """What the session slice does for builds (``image.types.Sessions``)."""

    def __init__(self, manager: Manager) -> None:
        self._manager: Final = manager

    async def start_build(
        self,
        owner: Owner,
        spec: SessionSpec,
        key: str,
        offers: tuple[str, ...] = (),
        mount: ImageMount | None = None,
    ) -> Session:
        caller = Principal(
            user_id=owner.user_id,
            user=owner.user,
            role=Role.USER,
            token_id="",
            token="",
            project_id=owner.project_id,
        )
        sessions = self._manager.sessions
        created = await sessions.create(
            caller, spec, key=key, kind=SessionKind.BUILD, offers=offers, mount=mount
        )
        return sessions.view(created.row)

    async def find(self, session_id: str) -> Session | None:
        async with self._manager.database.read() as tx:
            row = await session_store.find(tx, session_id)
        return None if row is None else self._manager.sessions.view(row)

    async def read_file(self, session_id: str, path: str, limit_bytes: int) -> bytes:
        row = await self._row(session_id)
        request = ReadFile(kernel=kernel_of(row), path=path, length=limit_bytes + 1)
        found = b""
        async with self._manager.kernels.open(row, request) as stream:
            async for item in stream:
                found += item if isinstance(item, bytes) else b""
        if len(found) > limit_bytes:
            raise TooLarge(f"{path} has more than {limit_bytes} bytes.")
        return found

    async def get(self, caller: Caller, ref: str) -> Session:
        return self._manager.sessions.view(await self._manager.sessions.get(caller, ref))

    async def mount_of(self, session_id: str) -> ImageMount:
        return from_json(ImageMount, (await self._row(session_id)).image_mount)

    async def save_root(self, session_id: str) -> LayerSaved:
        row = await self._row(session_id)
        request = SaveLayer(kernel=kernel_of(row), limit_bytes=row.disk_bytes)
        async with self._manager.kernels.open(row, request) as stream:
            async for item in stream:
                if isinstance(item, LayerSaved):
                    return item
        raise NodeUnavailable("the machine that has the session's files did not answer.")

    async def _row(self, session_id: str) -> SessionRow:
        async with self._manager.database.read() as tx:
            row = await session_store.find(tx, session_id)
        if row is None:
            raise NotFound(f"session {session_id} was removed.")
        return row

    async def live_images(self) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        async with self._manager.database.read() as tx:
            mounts = await session_store.list_live_mounts(tx)
        for text in mounts:
            digest = from_json(ImageMount, text).digest
            counts[digest] = counts.get(digest, 0) + 1
        return counts
