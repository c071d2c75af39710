"""Bodies of the HTTP API that are not objects of their own.

The stream protocol (``GET /v1/run``, ``/v1/sessions/{ref}/attach``, ``/v1/sessions/{ref}/exec``,
all
WebSockets): text messages are JSON, ``ClientMessage`` towards the server and ``ServerMessage``
back. Binary messages towards
the server are stdin. Binary messages from the server are output: the ``wire.log`` record as
stored (header and data),
preceded by its offset as u64 little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from madang.wire.kernel import Capacity, ExecSpec, HostLoad
from madang.wire.policy import Refusal
from madang.wire.session import Ended, Session, SessionSpec


class ClientOp(StrEnum):
    RUN = "run"
    """First message on ``/v1/run``: ``spec`` and, for safety, ``key`` (an idempotency key)."""
    ATTACH = "attach"
    """First message on ``…/attach``: ``offset``."""
    EXEC = "exec"
    """First message on ``…/exec``: ``exec``."""
    RESIZE = "resize"
    SIGNAL = "signal"
    STDIN_END = "stdin_end"
    DETACH = "detach"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientMessage:
    op: ClientOp
    spec: SessionSpec | None = None
    key: str | None = None
    exec: ExecSpec | None = None
    offset: int | None = None
    tail_bytes: int | None = None
    rows: int | None = None
    cols: int | None = None
    signal: int | None = None


class ServerOp(StrEnum):
    SESSION = "session"
    """The session changed; sent first, and at each status."""
    GAP = "gap"
    """Output between two offsets is no longer kept."""
    EXEC = "exec"
    """An exec started."""
    END = "end"
    """The program has ended and all its output was sent;

    ``session`` or ``ended`` tells how. Last.
    """
    REFUSED = "refused"
    """The sandbox policy has refused the program something that it had not tried before."""
    ERROR = "error"
    """Last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMessage:
    op: ServerOp
    session: Session | None = None
    ended: Ended | None = None
    exec_id: str | None = None
    start: int | None = None
    end: int | None = None
    refusal: Refusal | None = None
    error: Problem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """RFC 9457."""

    type: str
    """``about:blank``-style: ``urn:madang:error:CODE``"""
    title: str
    status: int
    detail: str
    code: str
    retry: str
    request_id: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceFile:
    path: str
    """Relative; see ``wire.paths``."""
    kind: str
    """``file``, ``dir``, ``link``"""
    mode: int = 0o644
    size_bytes: int = 0
    modified_ns: int = 0
    digest: str | None = None
    """SHA-256 of a file's content."""
    target: str | None = None
    """Of a link, as in ``wire.paths``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceManifest:
    """A working directory: what lies where."""

    files: tuple[WorkspaceFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceState:
    digest: str
    """SHA-256 of the manifest's canonical JSON;

    give it as ``workspace`` when creating a session.
    """
    missing: tuple[str, ...]
    """Blobs to send:

    ``PUT /v1/workspaces/blobs`` with a body of records digest (32 bytes), size u64 LE, data.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Cursor page; ``next`` goes into ``?cursor=``."""

    items: tuple[Session, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    grace_s: float | None = None
    """Instead of the session's own; 0: SIGKILL at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRequest:
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    name: str
    status: str
    """``online``, ``offline``"""
    capacity: Capacity
    allocated: Capacity
    sessions: int
    seen_at: float
    facts: dict[str, str]
    load: HostLoad | None = None
    """What is in use by anybody; null while the machine is offline or has just come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Sizes used where a request says nothing, and limits of the server."""

    cpu: float
    mem_bytes: int
    pids: int
    disk_bytes: int
    time_s: float | None
    workspace_limit_bytes: int
    log_limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    version: str
    api: str
    node_count: int
    database: str
    state: str
    runtimes: tuple[str, ...]
    """What sessions may choose, on any machine."""
    defaults: Defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    code: str
    status: int
    retry: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One change, as ``GET /v1/events`` streams it."""

    id: int
    at: float
    kind: str
    """``session.moved``, ``image.moved``, …"""
    object: str
    payload: dict[str, Any]
