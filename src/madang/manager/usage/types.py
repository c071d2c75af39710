"""Values of the usage slice; times in microseconds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

AGENT: Final = "agent"
MANAGER: Final = "manager"
ADMIN: Final = "admin"


class Slot(StrEnum):
    """What a session has of a machine, and pays for."""

    CPU = "cpu"
    MEM = "mem"
    DISK = "disk"
    PIDS = "pids"

    @property
    def column(self) -> str:
        return _COLUMNS[self]

    @property
    def unit(self) -> int:
        """How much of the column is one of what is priced: a core, a GiB, a process."""
        return _UNITS[self]


_COLUMNS: Final = {
    Slot.CPU: "cpu_milli",
    Slot.MEM: "mem_bytes",
    Slot.DISK: "disk_bytes",
    Slot.PIDS: "pids",
}
_UNITS: Final = {Slot.CPU: 1000, Slot.MEM: 1 << 30, Slot.DISK: 1 << 30, Slot.PIDS: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A run that holds slots of a node."""

    session_id: str
    session: str
    kind: str
    attempt: int
    nonce: str
    node: str
    user_id: str
    user: str
    project_id: str
    group_name: str
    token_id: str
    cpu_milli: int
    mem_bytes: int
    disk_bytes: int
    pids: int
    started_at: int

    @property
    def id(self) -> str:
        return f"{self.session_id}.{self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the agent counted until the end; None: nobody could."""

    cpu_us: int | None = None
    mem_peak_bytes: int | None = None
    disk_used_bytes: int | None = None
    received_bytes: int | None = None
    sent_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A row as stored, columns in the table's order."""

    id: str
    session_id: str
    session: str
    kind: str
    attempt: int
    nonce: str
    node: str
    user_id: str
    user: str
    project_id: str
    domain_id: str
    group_name: str
    token_id: str
    cpu_milli: int
    mem_bytes: int
    disk_bytes: int
    pids: int
    started_at: int
    ended_at: int | None
    closed_by: str
    cpu_us: int | None
    mem_peak_bytes: int | None
    disk_used_bytes: int | None
    received_bytes: int | None
    sent_bytes: int | None
    corrects: str | None
    reason: str
    recorded_at: int


@dataclass(frozen=True, slots=True)
class PriceRow:
    """What an hour of a slot costs in a group, from a time on."""

    id: int
    group_name: str
    slot: str
    price: str
    """Decimal, of one unit (core, GiB) for an hour."""
    currency: str
    valid_from: int
    author: str
    at: int
