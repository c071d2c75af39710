"""Values of the session slice: the row, the life table, and the faces of its neighbours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from madang.manager.db import Reader, Transaction
from madang.manager.fleet.types import Slots
from madang.manager.http import Caller
from madang.wire.api import WorkspaceManifest
from madang.wire.kernel import ImageMount, KernelId
from madang.wire.policy import Sandbox
from madang.wire.session import SessionStatus

S = SessionStatus


@dataclass(frozen=True, slots=True)
class Rule:
    """What may follow a status, who sees to it, and within which time."""

    next: frozenset[SessionStatus]
    owner: str
    deadline_s: float | None
    """None: the work, or a user, ends it."""


LIFE: Final[Mapping[SessionStatus, Rule]] = {
    S.PENDING: Rule(frozenset({S.SCHEDULED, S.TERMINATED}), "scheduler", None),
    S.SCHEDULED: Rule(frozenset({S.PREPARING, S.RUNNING, S.TERMINATING}), "starter", 60.0),
    S.PREPARING: Rule(frozenset({S.RUNNING, S.TERMINATING}), "starter", 600.0),
    S.RUNNING: Rule(frozenset({S.TERMINATING}), "watcher", None),
    S.TERMINATING: Rule(frozenset({S.TERMINATED}), "reaper", 120.0),  # and the session's grace
    S.TERMINATED: Rule(frozenset(), "", None),
}
PLACED: Final = (S.SCHEDULED, S.PREPARING, S.RUNNING, S.TERMINATING)
"""Statuses that hold slots of a node."""


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A row as stored, columns in the table's order; times in microseconds, JSON as text."""

    id: str
    name: str
    kind: str
    owner_id: str
    owner: str
    project_id: str
    status: str
    result: str | None
    priority: int
    spec: str
    image: str
    image_digest: str
    image_mount: str
    cpu_milli: int
    mem_bytes: int
    pids: int
    disk_bytes: int
    time_us: int | None
    node: str | None
    held_by: str | None
    attempt: int
    nonce: str
    revision: int
    created_at: int
    started_at: int | None
    ended_at: int | None
    status_since: int
    deadline: int | None
    stop_reason: str
    stop_text: str
    grace_us: int
    frozen_at: int | None
    freeze_revision: int
    pending: str | None
    ended: str | None
    phases: str
    enforced: str
    warnings: str
    log_end: int | None
    refused: str
    image_policy: str
    version: int
    group_name: str = "default"
    token_id: str = ""
    """The token that asked for it."""
    idle_text: str = ""
    """In which way it is idle, if it was warned."""
    protected_by: str = ""
    idle_stop_at: int | None = None
    """When it will be stopped for being idle; None: it was not warned."""
    protected_until: int | None = None
    """Not stopped for being idle before that."""
    wishes: str = ""
    """``scheduling.types.Wishes`` as JSON; empty: none."""
    told: str = ""
    """The first estimate that it was given, ``scheduling.types.Told`` as JSON; empty: none."""

    @property
    def kernel(self) -> KernelId:
        return KernelId(self.id, self.attempt)

    @property
    def slots(self) -> Slots:
        return Slots(self.cpu_milli, self.mem_bytes, self.disk_bytes, self.pids)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """Sizes where a request says nothing, and limits."""

    cpu: float = 1.0
    mem_bytes: int = 1 << 30
    pids: int = 512
    disk_bytes: int = 10 << 30
    time_s: float | None = None
    log_limit_bytes: int = 64 << 20
    """Output kept of one session; the oldest goes first."""
    workspace_limit_bytes: int = 512 << 20
    retention_s: float = 7 * 86400.0
    """How long an ended session is kept with its output and files."""
    retention_count: int = 1000
    """How many ended sessions are kept at most; the oldest go first."""
    event_retention_s: float = 86400.0
    """How long events can be read again by ``Last-Event-ID``."""
    key_retention_s: float = 86400.0
    """How long an Idempotency-Key is remembered."""
    decision_retention_s: float = 30 * 86400.0
    """How long it is kept what was decided and what became of it: for replays and forecasts."""
    reserve_after_s: float = 120.0
    """After this a waiting session has room kept for it: smaller ones don't pass for ever."""
    node_lost_after_s: float = 900.0
    """How long a machine may be silent until the sessions on it count as lost."""


class Images(Protocol):
    """What the image slice does for sessions."""

    async def resolve(self, caller: Caller, name: str) -> ImageMount:
        """A ready image. Raises ImageUnknown."""
        ...

    async def policy_of(self, caller: Caller, name: str) -> str:
        """The text of its layer of the sandbox policy; empty: none."""
        ...

    async def wanted_layers(self) -> tuple[str, ...] | None:
        """Layers that nodes shall keep; None: no opinion."""
        ...


class Sandboxes(Protocol):
    """What the policies in force on one node make of a session."""

    def of(self, image: str, session: str) -> Sandbox:
        """*image*, *session*: the texts of these layers; empty: none."""
        ...

    def live_of(self, image: str, session: str) -> str:
        """Names the live rules of that sandbox; none: empty."""
        ...


class Policies(Protocol):
    """What the policy slice does for sessions."""

    async def sandboxes(self, tx: Reader, node: str) -> Sandboxes: ...

    async def count_refusals(
        self, tx: Transaction, label: str, node: str, news: Mapping[tuple[str, int], int]
    ) -> None:
        """(layer, line) of a rule → how much more it has refused on *node*.

        *label*: of the sandbox whose rules they are.
        """
        ...


class Blobs(Protocol):
    """What ``storage.BlobStore`` does for working directories."""

    async def missing(self, digests: Sequence[str]) -> list[str]: ...

    async def put(self, digest: str, size: int, chunks: AsyncIterator[bytes]) -> None: ...

    async def put_manifest(self, manifest: WorkspaceManifest) -> str: ...

    async def complete(self, digest: str) -> bool:
        """Whether the manifest *digest* and all its files are there."""
        ...
