"""Values of the fleet slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from madang.kit.codec import from_json
from madang.wire.kernel import NATIVE, Capacity, Desired, Hello, KernelReport
from madang.wire.size import Size

DEFAULT_GROUP: Final = "default"
"""The scaling group of nodes and sessions where nobody says another."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Amounts in the ledger's units; see ``tables.SLOTS``."""

    cpu_milli: int
    mem_bytes: int
    disk_bytes: int
    pids: int

    @classmethod
    def of(cls, size: Size | Capacity) -> Slots:
        """Cores are rounded up to thousandths."""
        cpu = math.ceil(round(size.cpu * 1000, 6))
        return cls(cpu, size.mem_bytes, size.disk_bytes, size.pids)

    @property
    def amounts(self) -> dict[str, int]:
        """By slot."""
        return {
            "cpu_milli": self.cpu_milli,
            "mem_bytes": self.mem_bytes,
            "disk_bytes": self.disk_bytes,
            "pids": self.pids,
        }

    def within(self, other: Slots) -> bool:
        """Whether *other* has as much of everything."""
        return (
            self.cpu_milli <= other.cpu_milli
            and self.mem_bytes <= other.mem_bytes
            and self.disk_bytes <= other.disk_bytes
            and self.pids <= other.pids
        )

    def capacity(self) -> Capacity:
        return Capacity(
            cpu=self.cpu_milli / 1000,
            mem_bytes=self.mem_bytes,
            disk_bytes=self.disk_bytes,
            pids=self.pids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """A node with its ledger."""

    name: str
    incarnation: int
    revision: int
    facts: str
    seen_at: int
    capacity: Slots
    used: Slots
    group: str = DEFAULT_GROUP
    """The scaling group that it belongs to."""

    @property
    def runtimes(self) -> tuple[str, ...]:
        """What sessions may choose there; a machine that has not said it yet has the one."""
        found = from_json(dict[str, str], self.facts)
        return tuple(found.get("runtimes", NATIVE).split(", "))

    @property
    def own_group(self) -> str:
        """What its own settings say; empty: nothing."""
        return from_json(dict[str, str], self.facts).get("group", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    name: str
    text: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """How the manager notices that an agent is gone."""

    hello_within_s: float = 10.0
    """Until a new link must have said who it is."""
    lost_after_s: float = 15.0
    """Seconds of silence until a link is given up. Three heartbeats: one may come late."""
    seen_every_s: float = 10.0
    """How exact ``seen_at`` is kept in the database."""


class Duties(Protocol):
    """What the links need from the session slice, which lies above this one."""

    async def desired(self, node: str, since: int | None) -> Desired | None:
        """The full desired state (*since* None), or what changed after that revision, if any."""
        ...

    async def prune(self, node: str, upto: int) -> None:
        """All up to this revision was told on the link that there is now."""
        ...

    async def adopt(self, hello: Hello) -> None:
        """Compare all that a node runs with the rows."""
        ...

    async def observe(self, node: str, reports: Sequence[KernelReport]) -> None: ...
