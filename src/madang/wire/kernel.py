"""What manager and agent say to each other about kernels (DESIGN §5).

Desired state flows down with numbered revisions: the whole of it on connect, then deltas. What
*is* flows up. A
report counts only while (session, attempt, nonce) still match the manager's row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from madang.wire.network import NO_NETWORK, Network
from madang.wire.policy import NO_SANDBOX, Sandbox
from madang.wire.session import Ended, RootMode, Usage
from madang.wire.size import Size

DEFAULT_PATH: Final = (
    "/env/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/madang/bin"
)
WORK_DIR: Final = "/work"
OUTPUT_DIR: Final = "/outputs"
HOME_DIR: Final = "/home/user"
USER_NAME: Final = "user"
TOOLS_DIR: Final = "/madang/tools"
"""Read-only programs of ours, bound into build sessions only."""
SERVICE_DIR: Final = "/madang/run"
"""Sockets that the agent offers to this session alone."""
PROXY_PORT: Final = 3128
"""Where a build session whose image is a whole root finds the agent's proxy, on its loopback."""
NATIVE: Final = "native"
"""The runtime that every machine offers: no program but ours."""
RUNSC: Final = "runsc"
WITHOUT_NETWORK: Final = frozenset({RUNSC})
"""Runtimes whose sessions can have none."""
"""The runtime whose sessions have a kernel of their own: gVisor."""


@dataclass(frozen=True, slots=True)
class KernelId:
    """One attempt to run a session on one node. Everything made for it carries this name."""

    session: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.session}.{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> KernelId:
        """The reverse of ``str``; raises ValueError."""
        session, _, attempt = text.rpartition(".")
        if not session or not attempt.isdecimal():
            raise ValueError(f"{text!r} is no kernel id")
        return cls(session, int(attempt))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMount:
    """An image as the runtime mounts it."""

    name: str
    digest: str
    """Content address: same digest, same files."""
    kind: str
    """``host``, ``layers`` or ``root``: see ``wire.image.ImageKind``"""
    layers: tuple[str, ...] = ()
    """Layer digests, topmost first, that together are ``/env`` or the whole root."""
    env: dict[str, str] = field(default_factory=dict)
    warm: tuple[str, ...] = ()
    """Modules that its interpreters import ahead; see ``agent.launcher.warm``."""
    offers: tuple[str, ...] = ()
    """Layers that a build may read through its proxy, topmost first; no part of the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """Everything an agent needs to start a kernel; complete and resolved."""

    argv: tuple[str, ...]
    argv_encoding: str = "utf-8"
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = WORK_DIR
    image: ImageMount
    size: Size
    tty: bool = False
    stdin: bool = False
    rows: int = 24
    cols: int = 80
    hostname: str = "session"
    """The session's name."""
    workspace: str | None = None
    """Digest of the manifest whose files are put into the working directory before the start."""
    grace_s: float = 10.0
    log_limit_bytes: int = 64 * 1024 * 1024
    """Output kept; the oldest goes first."""
    build: bool = False
    """A build session: gets ``TOOLS_DIR`` and a registry proxy in ``SERVICE_DIR``."""
    sandbox: Sandbox = NO_SANDBOX
    """What its policy adds to the base; see ``wire.policy``."""
    runtime: str = ""
    """What starts its programs (``agent.launcher.offers``); empty: the node's own choice."""
    network: Network = NO_NETWORK
    owner: str = ""
    """Whose session it is. What one owner's builds claim is never believed for another's."""
    root: RootMode = RootMode.READ_ONLY


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecSpec:
    """One more program in a running kernel."""

    argv: tuple[str, ...]
    argv_encoding: str = "utf-8"
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = WORK_DIR
    tty: bool = False
    stdin: bool = False
    rows: int = 24
    cols: int = 80


class Wanted(StrEnum):
    RUN = "run"
    STOP = "stop"
    """End it: SIGTERM, the grace, then SIGKILL."""
    KEEP = "keep"
    """It has ended and the manager knows; keep its files and output until it is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The desired state of one kernel."""

    kernel: KernelId
    nonce: str
    revision: int
    wanted: Wanted
    spec: KernelSpec
    stop_reason: str = ""
    """A ``Reason`` value when ``wanted`` is ``stop``."""
    stop_text: str = ""
    frozen: bool = False
    """Whether its programs shall stand still: the word of ``freeze_revision``."""
    freeze_revision: int = 0
    """Revision of the newest order to freeze or thaw; one that was followed is not followed again.

    After it was followed the agent may wake or freeze the kernel by itself (see
    ``agent.freezing``).
    """
    live: str = ""
    """Digest of those rules of ``spec.sandbox`` that can be changed while it runs; none: empty.

    A running kernel whose report names another one is given the rules anew.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """Manager → agent. ``full`` replaces everything; else ``set`` and ``forget`` are a delta.

    Whatever the agent has and a full list (or ``forget``) does not name is stopped and removed
    with all its files.
    """

    revision: int
    full: bool
    set: tuple[Assignment, ...] = ()
    forget: tuple[KernelId, ...] = ()
    keep_layers: tuple[str, ...] | None = None
    """In a full list: image layers still wanted; the agent deletes others that nothing uses."""


class KernelState(StrEnum):
    PREPARING = "preparing"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """What was done about the newest live rules of a kernel's sandbox."""

    live: str = ""
    """``Assignment.live`` of the rules in force, or of those that the error is about."""
    label: str = ""
    """Of the sandbox whose live rules are in force, where it is not that of the start."""
    later: tuple[str, ...] = ()
    """Places of rules among them that count only for sessions that start from now on."""
    error: str = ""
    """Why they could not be put in force; then the former ones still are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """How people use a kernel. Numbers only grow, until its agent starts anew."""

    inputs: int = 0
    """Input, sizes, signals and execs."""
    visits: int = 0
    """Clients that came to follow or to feed it, and execs."""
    clients: int = 0
    """Such clients at present."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """Agent → manager: what is."""

    kernel: KernelId
    nonce: str
    state: KernelState
    started_at: float | None = None
    ended: Ended | None = None
    enforced: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    usage: Usage | None = None
    log_end: int | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Phase of the start → duration: ``workspace``, ``image``, ``sandbox``, …"""
    frozen_since: float | None = None
    """Since when its programs stand still; None: they run."""
    freeze_revision: int = 0
    """Newest order to freeze or thaw that ``frozen_since`` already takes into account."""
    freeze_error: str = ""
    """Why that order could not be followed."""
    guarded: Guarded = Guarded()
    refused: dict[str, int] = field(default_factory=dict)
    """Place of a rule (``site line 3``) → how often it has refused something."""
    activity: Activity | None = None
    """None: its agent does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Agent → manager, first message of each link: who it is, what it has, all that it runs."""

    node: str
    incarnation: int
    """Grows with every start of the agent; a newer one replaces an older connection."""
    capacity: Capacity
    facts: dict[str, str]
    """What the machine can do, as ``doctor`` prints it."""
    inventory: tuple[KernelReport, ...]
    layers: tuple[str, ...] = ()
    """Image layers that lie on the node."""
    revision: int = 0
    """Newest revision that the agent ever took in; it ignores older ones, full lists too.

    A manager whose own counter is behind (a restored backup) goes on from above it.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a node can give to sessions."""

    cpu: float
    mem_bytes: int
    disk_bytes: int
    pids: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmLoad:
    """Interpreters that a node keeps ready for warm starts."""

    budget_bytes: int
    """The most that they and their waiting forks may use together."""
    used_bytes: int
    """Their proportional set size when it was last measured."""
    interpreters: int
    ready: int
    """Of them: those that have imported everything."""
    forks: int
    """Made ahead, waiting for sessions."""
    starts: int
    """Sessions that started warm since the node's launcher began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    """What is in use on a whole machine, by anybody."""

    cpu: float
    """Cores, on average since the last heartbeat."""
    cpus: int
    """Cores that there are."""
    mem_bytes: int
    """What can't be had without swapping; caches don't count."""
    mem_total_bytes: int
    warm: WarmLoad | None = None
    """Null where nothing is kept warm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Agent → manager: changes since the last message, or a heartbeat when empty."""

    node: str
    incarnation: int
    kernels: tuple[KernelReport, ...] = ()
    load: HostLoad | None = None
    """With heartbeats."""
