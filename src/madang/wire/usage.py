"""What was used, by whom, and what it costs; over the API."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A session held slots of a machine from one time to another; as it stands in the ledger."""

    id: str
    session_id: str
    session: str
    kind: str
    attempt: int
    node: str
    user: str
    project: str
    group: str
    cpu: float
    mem_bytes: int
    disk_bytes: int
    pids: int
    started_at: float
    ended_at: float | None
    """None: it goes on."""
    closed_by: str
    """``agent``: it saw the end; ``manager``: the machine was silent; ``admin``: a correction."""
    cpu_s: float | None = None
    """CPU time measured."""
    mem_peak_bytes: int | None = None
    disk_used_bytes: int | None = None
    received_bytes: int | None = None
    sent_bytes: int | None = None
    corrects: str | None = None
    """Id of the row that this one takes the place of."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalPage:
    items: tuple[Interval, ...]
    next: str | None = None
    """``cursor`` of the next page; None: that was all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageLine:
    """The sum of some intervals, cut to the time that was asked for."""

    by: dict[str, str]
    """What they have in common: ``{"user": "ann", "month": "2026-11"}``."""
    intervals: int
    open: int
    """Of these, how many go on: counted until now."""
    time_s: float
    cpu_core_s: float
    """Cores allocated × seconds."""
    mem_byte_s: float
    disk_byte_s: float
    pid_s: float
    cpu_used_s: float
    """CPU time measured. Of an interval that was cut, the same share as of its time."""
    mem_peak_bytes: int
    """The largest of any one of them."""
    received_bytes: int
    sent_bytes: int
    cost: dict[str, str] = field(default_factory=dict)
    """Currency → amount, exact; empty where nothing has a price."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    since: float | None
    until: float
    by: tuple[str, ...]
    lines: tuple[UsageLine, ...]
    total: UsageLine


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What shall stand in the ledger instead."""

    reason: str
    ended_at: float | None = None
    """None: it never ran; nothing is charged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one unit of a slot (a core, a GiB, a process) costs for an hour."""

    group: str
    """``*``: of all groups without a price of their own."""
    slot: str
    """``cpu``, ``mem``, ``disk`` or ``pids``."""
    price: str
    """Decimal, such as ``0.045``."""
    currency: str
    valid_from: float = 0.0
    """In a request 0: from now on."""
    author: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BillLine:
    user: str
    group: str
    slot: str
    unit_hours: str
    """Core-hours or GiB-hours at this price, rounded to thousandths."""
    price: str
    amount: str
    """Rounded to hundredths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Of a project for a month (UTC)."""

    project: str
    month: str
    currency: str
    lines: tuple[BillLine, ...]
    total: str
    """Sum of the lines as they are printed."""
    open: int
    """Intervals that go on: the bill will grow."""
    unpriced: tuple[str, ...] = ()
    """``group slot`` that were used and have no price."""
