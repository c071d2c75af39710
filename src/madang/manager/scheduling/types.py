"""What the planner reads and says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from madang.kit.codec import from_json

Amounts = Mapping[str, int]
"""Slot → amount, in the ledger's units: cpu_milli, mem_bytes, disk_bytes, pids."""

WHOLE: Final = 1000
"""Thousandths of one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A session that waits. Amounts are those of one member; all members are equal."""

    session: str
    name: str
    priority: int
    created_at: float
    slots: Amounts
    owner: str = ""
    group: str = ""
    devices: int = 0
    device_milli: int = WHOLE
    """Of each device; less than a whole only where one is asked for."""
    models: frozenset[str] = frozenset()
    """Models of device that will do; empty: any."""
    labels: frozenset[str] = frozenset()
    """What the machine must have."""
    arch: str = ""
    members: int = 1
    """A gang: all of them start, or none."""
    apart: str = ""
    """No two with the same word on one machine; a gang's own members neither."""
    after: tuple[str, ...] = ()
    """Sessions that must have ended well before."""
    not_before: float = 0.0
    give_up_at: float | None = None
    limit_s: float | None = None
    """Longest run time; None: it may run for ever."""
    reservation: str = ""
    preempts: bool = False
    """Whether those of lower priority may be ended for it."""
    after_any: bool = False
    """It is enough that those of ``after`` have ended."""
    accounts: tuple[str, ...] = ()
    """Whose limits count, like ``project:lab``; empty: the owner's."""
    kind: str = ""
    """Sessions of one kind run about as long: its program."""
    keeps: frozenset[str] = frozenset()
    """What of its sandbox policy the machine must keep: ``:files``, ``crun:nets``."""

    @property
    def payers(self) -> tuple[str, ...]:
        return self.accounts or (self.owner,)

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.members < 1 or self.devices < 0 or not 0 < self.device_milli <= WHOLE:
            raise ValueError(f"{self.name}: at least one member, part of a device above 0 up to 1")
        if self.devices > 1 and self.device_milli != WHOLE:
            raise ValueError(f"{self.name}: a part of a device is asked for of one only")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A connected machine."""

    node: str
    capacity: Amounts
    free: Amounts
    group: str = ""
    devices: tuple[int, ...] = ()
    """Thousandths left of each."""
    model: str = ""
    arch: str = ""
    labels: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()
    """What it can't keep of that which asks need kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a placed session, or one member of it, holds on a machine."""

    node: str
    name: str
    slots: Amounts
    session: str = ""
    owner: str = ""
    devices: tuple[tuple[int, int], ...] = ()
    """Which device, and how many thousandths of it."""
    priority: int = 0
    started_at: float = 0.0
    ends_at: float | None = None
    """At the latest, from its time limit; None: nobody knows."""
    apart: str = ""
    preemptible: bool = False
    leaving: bool = False
    """It was told to end."""
    reservation: str = ""
    accounts: tuple[str, ...] = ()
    """As of an ask."""
    kind: str = ""

    @property
    def payers(self) -> tuple[str, ...]:
        return self.accounts or (self.owner,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Machines kept for some sessions for some time."""

    name: str
    nodes: frozenset[str]
    starts_at: float
    ends_at: float
    no_show_s: float = 900.0
    """If nothing of it runs or waits so long after the start, the machines are given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a pass looks at."""

    pending: tuple[Ask, ...]
    rooms: tuple[Room, ...]
    held: tuple[Held, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    used: Mapping[str, float] = field(default_factory=dict)
    """Owner → dominant share × seconds, halved each half-life; see ``order.decayed``."""
    ended: Mapping[str, bool] = field(default_factory=dict)
    """Session → whether it ended well; of those that somebody waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Typical:
    """A kind of task and how often it comes, for placement that keeps room for what comes."""

    cpu_milli: int
    devices: int
    device_milli: int
    weight: float
    models: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How one group is run, limits included. ``order`` and ``placement`` name plugins."""

    order: str = "fifo"
    placement: str = "pack"
    reserve_after_s: float = 120.0
    """How long one waits until it keeps room."""
    reserve_at_most: int = 16
    """How many keep room at the same time; the first in order have it."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Owner → share; 1 where not named."""
    limits: Mapping[str, Amounts] = field(default_factory=dict)
    """Account → slots at once, in all groups; devices are ``device_milli``."""
    deserved: Mapping[str, Amounts] = field(default_factory=dict)
    """Account → its share of the group; what it holds beyond is borrowed, and given back."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Account → what people call it, for reasons."""
    half_life_s: float = 7 * 86400.0
    stretch: float = 10.0
    """For the order ``short``: how many seconds a second of run time counts."""
    usual_run_s: float = 86400.0
    """For those without a time limit, where a run time is needed for ordering."""
    notice_s: float = 86400.0
    """How long before a reservation begins its machines take nothing without a time limit."""
    min_run_s: float = 600.0
    """How long anybody runs before it may be preempted."""
    grace_s: float = 30.0
    typical: tuple[Typical, ...] = ()
    """For the placement ``fragments``; empty: the mix of the snapshot."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.half_life_s <= 0 or any(weight <= 0 for weight in self.weights.values()):
            raise ValueError("half-life and weights must be above 0")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one member of a session goes, and which devices it gets thousandths of."""

    session: str
    node: str
    devices: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    session: str
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Preempt:
    """Who is to end, for whom, and how long it is given."""

    session: str
    wanted_by: str
    grace_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    places: tuple[Place, ...]
    """In the order in which they were decided; a gang's members together."""
    waits: tuple[Wait, ...]
    """Every session that is neither placed nor given up, each with its reason."""
    preempts: tuple[Preempt, ...] = ()
    given_up: tuple[Wait, ...] = ()
    """Those that can't start any more, each with its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a session asks of its place besides amounts; kept with its row."""

    after: tuple[str, ...] = ()
    """Ids."""
    after_any: bool = False
    not_before: float | None = None
    give_up_at: float | None = None
    needs: tuple[str, ...] = ()
    """Labels ``KEY=VALUE``, and offers such as ``network:full``."""
    arch: str = ""
    apart: str = ""
    preemptible: bool = False
    reservation: str = ""
    accounts: tuple[str, ...] = ()
    kind: str = ""
    keeps: tuple[str, ...] = ()
    """Kinds of rules of its image's policy and of its own (``policy_kept``)."""


@lru_cache(maxsize=4096)
def wishes_of(text: str) -> Wishes:
    """Of a row; empty: none."""
    return from_json(Wishes, text) if text else Wishes()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRules:
    """A group's settings, parsed."""

    policy: Policy = Policy()
    share_by: str = "user"
    """Who shares, ``user`` or ``project``: the owner of asks."""
    priority: int = 0
    """Where nobody says."""
    priority_max: int = 0
    """The highest that those who don't administer may ask for."""
    preempts_from: int | None = None
    """Priority from which sessions may have others ended; None: none may."""
    projects: tuple[str, ...] = ()
    """Who may use it; empty, as for domains: everybody."""
    domains: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    """What sessions in it may choose; empty: all."""
    labels: tuple[str, ...] = ()
    """Of all its machines."""
    accepts: tuple[str, ...] = ()
    """Kinds of rules that may go unkept where a machine can't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An estimate as it was given to a session."""

    at: float
    p50_s: float
    p90_s: float
    base_s: float
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A session that has ended, as the planner saw it; times in microseconds."""

    session_id: str
    name: str
    group_name: str
    node: str | None
    owner: str
    project_id: str
    program: str
    priority: int
    cpu_milli: int
    mem_bytes: int
    disk_bytes: int
    pids: int
    time_us: int | None
    wishes: str
    told: str
    created_at: int
    scheduled_at: int | None
    """None: it never had a place."""
    ended_at: int
    result: str
    reason: str
