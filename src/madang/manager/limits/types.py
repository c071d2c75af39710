"""Values of the limits slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from madang.manager.db import Reader

KINDS: Final = ("token", "user", "project", "domain")
"""Kinds of accounts, from the narrowest to the widest."""
EVERY: Final = "*"
"""``user:*``: every user without limits of their own."""
MONTH_SLOT: Final = "cpu_hours"

DEFAULT_GRACE_S: Final = 600.0
DEFAULT_PROTECT_S: Final = 86400.0
DEFAULT_BELOW: Final = {"cpu": 0.01, "network": 1024.0}
"""Cores, and bytes per second, on average over the time: less is none."""

Amounts = Mapping[str, int]
"""Slot → amount, in the ledger's units; see ``fleet.tables.SLOTS``."""


class IdleKind(StrEnum):
    OUTPUT = "output"
    """Neither output nor input."""
    CPU = "cpu"
    NETWORK = "network"
    CONNECTION = "connection"
    """Nobody attached, and no program of ``exec`` begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A session is idle in this respect after so long."""

    kind: IdleKind
    after_s: float
    below: float = 0.0
    """Cores or bytes per second on average; see ``DEFAULT_BELOW``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A text of limits, read. None, and slots that are not named: no limit."""

    at_once: Amounts = field(default_factory=dict)
    """Slots of all placed sessions together."""
    session: Amounts = field(default_factory=dict)
    """Slots of one session."""
    sessions: int | None = None
    """Not ended, waiting ones included."""
    pending: int | None = None
    time_s: float | None = None
    """The longest time limit of a session; one without any gets it."""
    cpu_hours: int | None = None
    """Allocated, in a calendar month (UTC)."""
    folders: int | None = None
    folder_bytes: int | None = None
    deserved: Mapping[str, Amounts] = field(default_factory=dict)
    """Group → the share that nobody else keeps from it; what is beyond is borrowed."""
    idle: tuple[Check, ...] = ()
    """All of them must agree."""
    idle_grace_s: float = DEFAULT_GRACE_S
    """From the warning to the end."""
    protect_s: float = DEFAULT_PROTECT_S
    """How far ahead a session may be protected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsRow:
    """A version as stored; times in microseconds."""

    id: int
    name: str
    version: int
    text: str
    digest: str
    author_id: str
    author: str
    at: int
    note: str
    removed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentRow:
    target: str
    """An account, or ``KIND:*``."""
    name: str
    author: str
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetRow:
    name: str
    size: str
    """A ``SizeRequest`` as JSON."""
    about: str
    version: int
    author: str
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """Limits that count for an account."""

    account: str
    shown: str
    """``project lab``"""
    name: str
    version: int
    target: str
    """What they are assigned to: the account itself, or ``KIND:*``."""
    text: str
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A session that is to be made."""

    slots: Amounts
    time_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sessions of an account that have not ended."""

    sessions: int = 0
    pending: int = 0
    """Of these, such that wait."""


class Ledger(Protocol):
    """What the slices above this one know of accounts."""

    async def count(self, tx: Reader, account: str) -> Counts: ...

    async def slots(self, tx: Reader, account: str) -> Amounts:
        """Of all placed sessions together."""
        ...

    async def cpu_seconds(self, tx: Reader, account: str, since: int, now: int) -> float:
        """Allocated within that time (microseconds): cores × seconds."""
        ...
