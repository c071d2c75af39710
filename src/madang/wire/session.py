"""A session as users see it: what was asked, where it stands, how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from madang.wire.network import NO_NETWORK, Network, NetworkUse
from madang.wire.size import Size

HOST_IMAGE: Final = "host"
"""The machine's own system, read-only: the image of a first run."""


class SessionStatus(StrEnum):
    PENDING = "PENDING"
    """Accepted; waits for a place."""
    SCHEDULED = "SCHEDULED"
    """Has a node and its slots; the agent is told."""
    PREPARING = "PREPARING"
    """The agent makes its files, image and sandbox."""
    RUNNING = "RUNNING"
    TERMINATING = "TERMINATING"
    """Being stopped, or ended and being cleaned up."""
    TERMINATED = "TERMINATED"


class Result(StrEnum):
    SUCCESS = "success"
    FAILURE = "failure"
    CANCELLED = "cancelled"
    LOST = "lost"


class Reason(StrEnum):
    """Why a session ended."""

    EXIT = "exit"
    """The program ended by itself, with the exit code."""
    SIGNAL = "signal"
    """The program was ended by a signal that is not ours."""
    OOM = "oom"
    """The memory limit was hit and the main program was killed for it."""
    PIDS = "pids"
    """The processes limit was hit and the program failed."""
    DISK = "disk"
    """The disk limit was hit and the program failed."""
    TIMEOUT = "timeout"
    """The time limit ran out."""
    IDLE = "idle"
    """Its limits call it idle, and it was warned."""
    USER = "user"
    """Somebody stopped it."""
    PREEMPTED = "preempted"
    """It gave way to one of higher priority."""
    GIVEN_UP = "given_up"
    """It never started: its time to wait ran out, or what it comes after did not end well."""
    GUARD = "guard"
    """What keeps its sandbox policy was lost, so it was stopped."""
    LOST = "lost"
    """Its machine or its keeper went away; nobody saw how it ended."""
    START_FAILED = "start_failed"
    """It could not be set up; the text says why."""
    IMAGE_MISSING = "image_missing"
    NODE_LOST = "node_lost"


class SessionKind(StrEnum):
    RUN = "run"
    """Runs a command and ends with it."""
    IDLE = "idle"
    """Has no command: lives until stopped, used by ``exec``, ``shell``, ``put``, ``get``."""
    BUILD = "build"
    """Builds an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a kernel or an exec ended. Counters were read before its cgroup went."""

    reason: Reason
    exit_code: int | None = None
    """What a shell would report: the program's code, or 128 + signal; None if nobody saw it."""
    signal: int | None = None
    text: str = ""
    """In words: what happened, the limit and the peak, what to do."""
    at: float = 0.0
    """Unix time, seconds."""
    duration_s: float = 0.0
    """From the start of the program to its end."""
    cpu_s: float | None = None
    """CPU time, user and system, of all processes; None where it can't be measured."""
    mem_peak_bytes: int | None = None
    oom_kills: int = 0
    """Processes killed for the memory limit, children included."""
    pids_denied: int = 0
    """Forks refused for the processes limit."""
    disk_used_bytes: int | None = None
    disk_full: bool = False
    has_outputs: bool | None = None
    """Whether the outputs folder holds anything; None if nobody could look."""
    network: NetworkUse | None = None
    """What it did with its network; None if it had none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRequest:
    """What the user asked; None takes the default."""

    cpu: float | None = None
    mem_bytes: int | None = None
    pids: int | None = None
    disk_bytes: int | None = None
    time_s: float | None = None


class RootMode(StrEnum):
    """What a session may do to the root of its image, which has to be a whole one to be changed."""

    READ_ONLY = "read-only"
    WRITABLE = "writable"
    """It has a copy of its own, laid over the image's; all files seem to be its user's."""
    FAKE = "fake"
    """Writable, and programs find that they are root; see ``agent.launcher.fakeroot``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """What a user asks for. Everything has a default."""

    argv: tuple[str, ...] = ()
    """Program and arguments; empty: an idle session."""
    argv_encoding: str = "utf-8"
    """``utf-8``, or ``latin-1`` where an argument is not UTF-8: then each character is one byte."""
    name: str | None = None
    """Lower-case letters, digits, dashes; 2 to 40; made up if not given."""
    project: str = ""
    """NAME, or DOMAIN/NAME; the user's default if empty."""
    image: str = HOST_IMAGE
    size: SizeRequest = field(default_factory=SizeRequest)
    preset: str = ""
    """Name of a preset: the size where ``size`` says nothing."""
    env: dict[str, str] = field(default_factory=dict)
    tty: bool = False
    """A pseudo-terminal instead of pipes; then stderr comes with stdout."""
    stdin: bool = False
    """Whether stdin is fed by an attached client; otherwise it is at its end from the start."""
    rows: int = 24
    cols: int = 80
    workspace: str | None = None
    """Digest of an uploaded working directory (see ``/v1/workspaces``)."""
    grace_s: float = 10.0
    """Between SIGTERM and SIGKILL when stopped."""
    labels: dict[str, str] = field(default_factory=dict)
    policy: str = ""
    """Text of a sandbox policy; with those of the administrator it can only be stricter."""
    runtime: str = ""
    """What starts its programs: one of those that the machine offers; empty: its own choice."""
    network: Network = NO_NETWORK
    group: str = ""
    """Scaling group: the machines that it may run on; empty: the default one."""
    priority: int | None = None
    """Higher comes first; None: as the group says."""
    after: tuple[str, ...] = ()
    """Sessions, by name or id, that must have ended well before it starts."""
    after_any: bool = False
    """It is enough that they have ended, however they did."""
    not_before: float | None = None
    """Unix time before which it does not start."""
    give_up_after_s: float | None = None
    """It ends unstarted if it has waited so long."""
    node_labels: tuple[str, ...] = ()
    """``KEY=VALUE``, what its machine must have."""
    arch: str = ""
    """Architecture of its machine, like ``x86_64``; empty: any."""
    apart: str = ""
    """Of all sessions that name the same word, one on a machine."""
    preemptible: bool = False
    """Whether it may be ended for one of higher priority."""
    reservation: str = ""
    """Name of a reservation whose machines it uses."""
    root: RootMode = RootMode.READ_ONLY


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a kernel uses at present."""

    at: float
    cpu_s: float | None = None
    mem_bytes: int | None = None
    mem_peak_bytes: int | None = None
    pids: int | None = None
    disk_bytes: int | None = None
    network: NetworkUse | None = None
    """None if it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """A session was found idle, and is stopped at *stop_at* unless something happens."""

    stop_at: float
    """Unix time, seconds."""
    text: str
    """``no output or input for 1h2m, nobody connected for 1h``"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Why a session waits: the one dominant reason, with its evidence."""

    code: str
    """``capacity.cpu``, ``capacity.mem``, ``node.none``, …"""
    text: str
    since: float
    start_p50: float | None = None
    """Unix time before which it starts as likely as not; None: nobody can tell yet."""
    start_p90: float | None = None
    """The same, of nine in ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One finished or current phase of a session's start."""

    name: str
    """``queue``, ``prepare``, ``start``, ``run``, ``stop``"""
    started_at: float
    ended_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A session, as the API returns it."""

    id: str
    name: str
    kind: SessionKind
    owner: str
    status: SessionStatus
    result: Result | None
    image: str
    image_digest: str
    argv: tuple[str, ...]
    argv_encoding: str
    size: Size
    env: dict[str, str]
    tty: bool
    stdin: bool
    labels: dict[str, str]
    network: Network = NO_NETWORK
    group: str = "default"
    priority: int = 0
    node: str | None
    attempt: int
    created_at: float
    started_at: float | None
    """When the program began."""
    ended_at: float | None
    status_since: float
    deadline: float | None
    """When the status must have changed, by whom: see ``status_owner``."""
    status_owner: str
    frozen_since: float | None = None
    """Since when its programs stand still, of a RUNNING session; None: they run."""
    idle: Idle | None = None
    """The warning before it is stopped for being idle."""
    protected_until: float | None = None
    """Before that it is not stopped for being idle."""
    pending: Pending | None
    ended: Ended | None
    phases: tuple[Phase, ...]
    runtime: str
    """What starts its programs; before it is prepared, what was asked for, perhaps nothing."""
    enforced: dict[str, str]
    """Limit → how it is held: ``cgroup``, ``quota``, ``watch``, ``none``."""
    warnings: tuple[str, ...]
    refusals: int = 0
    """How often its sandbox policy has refused something while it ran."""
    usage: Usage | None
    log_end: int | None
    """Offset after the last output, if known."""
    version: int
    """Grows with every change; the ``ETag``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One move of a session from a status to the next."""

    at: float
    source: SessionStatus | None
    target: SessionStatus
    actor: str
    cause: str
