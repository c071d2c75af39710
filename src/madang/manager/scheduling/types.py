"""What the planner reads and says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Amounts = Mapping[str, int]
"""Slot → amount, in the ledger's units: cpu_milli, mem_bytes, disk_bytes, pids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A session that waits."""

    session: str
    name: str
    priority: int
    created_at: float
    slots: Amounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A connected machine."""

    node: str
    capacity: Amounts
    free: Amounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a placed session holds; evidence for reasons."""

    node: str
    name: str
    slots: Amounts


@dataclass(frozen=True, slots=True)
class Place:
    session: str
    node: str


@dataclass(frozen=True, slots=True)
class Wait:
    session: str
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    places: tuple[Place, ...]
    waits: tuple[Wait, ...]
    """Every session that is not placed, each with its reason."""
