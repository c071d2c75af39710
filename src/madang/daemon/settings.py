"""Every setting of the server: its name, default and meaning.

``config`` fills these in and ``madang config show`` prints them; the reference documentation is
made from the docstrings. Standard library only: the supervisor imports this. A key in the file is
the field's name without its unit (``mem_bytes`` is ``mem = "2g"``, ``keep_s`` is ``keep = "7d"``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from madang.wire.size import GIB, MIB

DAY_S: Final = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where the server listens and what it writes."""

    host: str = "127.0.0.1"
    """Address to listen on. The API is not encrypted yet: leave it at loopback, or put a TLS proxy
    in front."""
    port: int = 8470
    """TCP port; 0 takes any free one."""
    state: str = ""
    """State folder. Empty: ``/var/lib/madang`` for root, else ``$XDG_DATA_HOME/madang``."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is written to the log."""
    runtime: Literal["native", "process"] = "native"
    """``native`` isolates; ``process`` does not and is for tests only."""
    uid: int = 2_000_000_000
    """User number of the server process when started by root; it should have no other use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings:
    """Where rows are kept."""

    url: str = ""
    """``postgresql://user:password@host/name``. Empty: SQLite in the state folder."""
    durable: bool = False
    """SQLite: whether each change also survives a power cut, which makes it slower. A crash of the
    server loses nothing either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultSettings:
    """The size of a session that does not say its own."""

    cpu: float = 1.0
    """Cores."""
    mem_bytes: int = 2 * GIB
    """Memory, at most half of the machine's."""
    pids: int = 512
    """Processes and threads at once."""
    disk_bytes: int = 4 * GIB
    """Writable disk of the session."""
    time_s: float | None = None
    """Longest run time; none if not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """What a single request or session may bring along."""

    workspace_bytes: int = 512 * MIB
    """Largest working directory."""
    log_bytes: int = 64 * MIB
    """Output kept for each program; the oldest goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionSettings:
    """How long ended sessions stay, with their output and files; and the audit log."""

    keep_s: float = 7 * DAY_S
    """Removed when they ended longer ago."""
    count: int = 1000
    """Beyond this number the oldest are removed earlier."""
    audit_s: float | None = None
    """How long records of the audit log are kept. None: for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginSettings:
    """How long people stay logged in."""

    browser_idle_s: float = DAY_S / 2
    """A browser session ends after so long without a request."""
    browser_s: float = 7 * DAY_S
    """A browser session ends after so long in any case."""
    token_s: float = 90 * DAY_S
    """How long the token is valid that `madang login` makes of a password."""
    invitation_s: float = 30 * DAY_S
    """How long an invitation may be valid at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What this machine gives to sessions."""

    name: str = ""
    """Name of this machine; empty: its host name."""
    group: str = ""
    """Scaling group of this machine; empty: where the administrator puts it (`madang node set`)."""
    labels: tuple[str, ...] = ()
    """``KEY=VALUE``, by which sessions may choose this machine (`--needs`)."""
    cpu_overcommit: float = 1.0
    """Cores given out for each core there is."""
    disk_overcommit: float = 4.0
    """Disk given out for what is free: few sessions fill theirs. Each one's own limit holds."""
    mem_reserve_bytes: int = 512 * MIB
    """Memory never given to sessions."""
    disk_reserve_bytes: int = 1 * GIB
    """Free disk below which no session starts."""
    slots: int = 3
    """Sandboxes made ahead, so that a session starts at once; about 1.5 MB each."""
    warm_memory_bytes: int | None = None
    """Memory for interpreters that have everything imported already, so that Python sessions start
    at once. 0: none. None: a sixteenth of this machine's, at most 2 GiB. Root only."""
    scratch_pool: int = 8
    """Scratch disks made ahead."""
    uid_count: int = 100_000
    """User numbers for sessions, from ``server.uid`` + 1 on."""
    runtime: str = "native"
    """What starts the programs of sessions that don't choose: ``native``, ``crun``, ``runc``,
    ``runsc`` or ``docker``."""
    runtimes: tuple[str, ...] = ("native", "crun", "runc", "runsc", "docker")
    """What sessions may choose with ``--runtime``, if the machine has it. ``native`` stays."""
    docker_socket: str = "/run/docker.sock"
    """Where Docker's engine listens, for sessions with ``--runtime docker``."""
    host_paths: tuple[str, ...] = ()
    """Further folders of this machine that sessions may read, such as ``/data/sets``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsSettings:
    """What happens to running sessions by itself."""

    freeze_idle_after_s: float | None = None
    """Freeze sessions that wait for people (no main program, or one at a terminal) once they had no
    input and used no CPU for so long; looked at every 5 s. Input wakes them. None: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSettings:
    """What sandbox policies may do on this machine; only root changes it, not the API."""

    widen: tuple[str, ...] = ()
    """Rules of the base that an administrator's policy may widen, such as ``perf``. None unless
    named here; ``madang policy show base`` tells their names."""
    accept_unkept: bool = False
    """Whether a session starts, with a warning, where the machine can't keep a rule of its policy.
    Otherwise it does not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """Which networks sessions may have on this machine; only root changes it, not the API."""

    modes: tuple[str, ...] = ("none",)
    """Of ``none``, ``allow`` (what a session names) and ``full``. The latter two take root, nft and
    a machine that forwards packets; ``madang doctor`` looks."""
    addresses: str = "10.213.0.0/16"
    """A range for sessions that nothing else in reach uses; each takes two addresses."""
    forbidden: tuple[str, ...] = ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16")
    """Ranges that no session reaches in any mode. This machine's own addresses, other sessions,
    169.254.0.0/16 (metadata services), multicast and loopback are forbidden besides."""
    resolvers: tuple[str, ...] = ()
    """Addresses of name servers for sessions. Empty: those of ``/etc/resolv.conf``."""
    bandwidth_bits: int | None = None
    """Most for each session and direction, like ``100mbit`` per second. None: no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesSettings:
    """Where images come from and what is kept of them."""

    registries: str = ""
    """A TOML file of image registries that need a word: private addresses, ``http``, mirrors,
    logins; see «Build and use images». Read at the start, by the server's user. Empty: none."""
    versions: int = 3
    """Older versions of each image that are kept to go back to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of it."""

    server: ServerSettings = field(default_factory=ServerSettings)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    defaults: DefaultSettings = field(default_factory=DefaultSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    logins: LoginSettings = field(default_factory=LoginSettings)
    sessions: SessionsSettings = field(default_factory=SessionsSettings)
    node: NodeSettings = field(default_factory=NodeSettings)
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    images: ImagesSettings = field(default_factory=ImagesSettings)
