"""What an agent must be told."""

from __future__ import annotations

import os
from dataclasses import dataclass

from madang.wire.size import GIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """One node's agent."""

    node: str
    """The node's name."""
    state_dir: str
    """The state folder; the agent writes below ``server/`` only, and reads ``kernels/``."""
    heartbeat_s: float = 5.0
    """Between two full reports. Three may be late before the node counts as silent."""
    cpu_overcommit: float = 1.0
    """Cores promised to sessions for each real one."""
    disk_overcommit: float = 1.0
    """Disk promised to sessions for what is free: few fill theirs, and the files are sparse."""
    mem_reserve_bytes: int = 512 * MIB
    """Memory that sessions never get: for the system and for us."""
    disk_reserve_bytes: int = 1 * GIB
    """Free space below which nothing new is started; not part of the capacity either."""
    kill_margin_s: float = 2.0
    """After a stop's grace, until the agent kills over the keeper's head."""
    start_patience_s: float = 30.0
    """How long a start waits for a launcher that is away."""
    preparing_after_s: float = 0.1
    """A start slower than this is reported as PREPARING; a faster one shows RUNNING at once."""
    stream_patience_s: float = 5.0
    """How long a stream waits for a kernel that the agent has not been told of yet."""
    audit_s: float = 30.0
    """Between two comparisons with all that the runtime has."""
    freeze_idle_after_s: float | None = None
    """Freeze what waits for people and had neither input nor CPU time for so long; None: never."""
    watch_period_s: float = 0.25
    """Between two looks at memory and disk where no kernel feature holds the limit."""

    group: str = ""
    """Scaling group of the node; empty: as the manager has it."""
    labels: tuple[str, ...] = ()
    """``KEY=VALUE``, by which sessions may choose the node."""
    boot_id: str = ""
    """Name of this boot of the machine; empty: ask the kernel. Simulations give their own."""

    @property
    def journal(self) -> str:
        """The journal's file."""
        return os.path.join(self.state_dir, "server", "journal.db")

    @property
    def layers(self) -> str:
        """Folder of image layers."""
        return os.path.join(self.state_dir, "layers")
