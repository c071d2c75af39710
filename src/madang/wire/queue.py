"""Groups of machines, the queue before them, and what can be asked about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from madang.wire.kernel import Capacity
from madang.wire.session import Pending

MAX_GROUP_TEXT: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A scaling group: some machines, and how their queue is run."""

    name: str
    text: str
    """Its settings, TOML; see the reference."""
    version: int
    """Grows with every change; the ``ETag``."""
    nodes: tuple[str, ...]
    capacity: Capacity
    """Of all its machines together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDraft:
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDraft:
    """What an administrator decides about a machine."""

    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Machines that are kept for one project for some time."""

    name: str
    project: str
    group: str
    nodes: tuple[str, ...]
    starts_at: float
    ends_at: float
    no_show_s: float
    """If nothing of it runs or waits so long after the start, the machines are given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationDraft:
    name: str
    starts_at: float
    ends_at: float
    project: str = ""
    """Name or id; empty: the caller's."""
    group: str = "default"
    nodes: tuple[str, ...] = ()
    """Empty: *count* of those that nobody else has then."""
    count: int = 1
    no_show_s: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """How good the estimates of a group have been."""

    told: int = 0
    """Estimates that have come true, or not."""
    coverage: float | None = None
    """Part of these sessions that started before p90; None before the first."""
    median_error_s: float | None = None
    """Between p50 and the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A change that would let a session start; tried with the planner before it is said."""

    text: str
    after: str = ""
    """Name of the session whose end it takes; empty: it starts now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Why a session waits, until when, and what would help."""

    name: str
    group: str
    node: str | None = None
    """Where it is, or would be placed now; None: it has to wait."""
    place: int | None = None
    """Its place in the queue of its group, from 1, in the order of priority and age."""
    waiting: int = 0
    """Sessions in that queue."""
    pending: Pending | None = None
    options: tuple[Option, ...] = ()
    forecast: Forecast = Forecast()
    """Of its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueEntry:
    id: str
    name: str
    owner: str
    group: str
    priority: int
    place: int
    """From 1; gaps are sessions that the caller may not see."""
    created_at: float
    pending: Pending | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The queue of a group, or of all."""

    items: tuple[QueueEntry, ...]
    waiting: int
    """Sessions that wait, those among them that the caller may not see."""
    forecasts: dict[str, Forecast]
    """By group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewNodes:
    """Machines that a replay adds."""

    cpu: float
    mem_bytes: int
    disk_bytes: int = 1 << 50
    pids: int = 1 << 22
    count: int = 1
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """What would have been."""

    since: float
    until: float
    """Unix times."""
    group: str = "default"
    set: dict[str, str] = field(default_factory=dict)
    """Settings of the group that differ, like ``order`` or ``weights.project:lab``."""
    add_nodes: tuple[NewNodes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayFigures:
    jobs: int
    """Sessions that asked in that time; waits are theirs."""
    started: int
    mean_wait_s: float
    p50_wait_s: float
    p90_wait_s: float
    utilisation: float
    """Part of the group in use, of what was used most."""
    fairness: float
    """Jain's index over owners, by weight: 1 if all had the same."""
    preemptions: int
    given_up: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    happened: ReplayFigures
    unchanged: ReplayFigures
    """The same sessions, simulated with the settings of today."""
    changed: ReplayFigures
    """With the change."""
    left_out: int
    """Sessions that no machine of today could hold."""
    decisions: int
    """Passes of that time that were planned once more from what was written down then."""
    different: int
    """Of these, how many came out otherwise: none, unless this is another version."""
