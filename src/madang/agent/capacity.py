"""What this node can give to sessions."""

from __future__ import annotations

import os
from typing import Final

from madang.agent.runtime.contract import RuntimeFacts
from madang.agent.settings import AgentSettings
from madang.wire.kernel import Capacity
from madang.wire.policy_kept import ACCEPTED, KEEPS_FACT, UNKEPT_FACT

_PIDS_FOR_US: Final = 2048


def capacity(settings: AgentSettings, facts: RuntimeFacts, held_disk_bytes: int) -> Capacity:
    """Measured now; *held_disk_bytes* are in use by sessions, so counted as theirs to give."""
    disk = os.statvfs(settings.state_dir)
    free = disk.f_bavail * disk.f_frsize + held_disk_bytes
    mine = Capacity(
        cpu=len(os.sched_getaffinity(0)) * settings.cpu_overcommit,
        mem_bytes=max(0, _memory() - settings.mem_reserve_bytes),
        disk_bytes=_promised(settings, free - settings.disk_reserve_bytes),
        pids=max(0, _pids() - _PIDS_FOR_US),
    )
    limit = facts.capacity
    if limit is None:
        return mine
    return Capacity(
        cpu=min(mine.cpu, limit.cpu * settings.cpu_overcommit),
        mem_bytes=min(mine.mem_bytes, limit.mem_bytes),
        disk_bytes=min(mine.disk_bytes, _promised(settings, limit.disk_bytes)),
        pids=min(mine.pids, limit.pids),
    )


def _promised(settings: AgentSettings, free_bytes: int) -> int:
    return round(max(0, free_bytes) * settings.disk_overcommit)


def facts_as_text(facts: RuntimeFacts) -> dict[str, str]:
    """For ``doctor`` and ``madang show``."""
    texts = {f"enforced.{name}": how for name, how in facts.enforced.items()}
    texts |= {f"warning.{n}": text for n, text in enumerate(facts.warnings, 1)}
    runtimes = facts.runtimes or (facts.name,)
    texts |= {
        "runtime": runtimes[0],
        "runtimes": ", ".join(runtimes),
        "networks": ", ".join(facts.networks),
        "rootless": "yes" if facts.rootless else "no",
        "arch": os.uname().machine,
    }
    texts |= {KEEPS_FACT + name: ", ".join(facts.keeps.get(name, ())) for name in runtimes}
    if facts.accepts_unkept:
        texts[UNKEPT_FACT] = ACCEPTED
    return texts


def place_as_text(settings: AgentSettings) -> dict[str, str]:
    """Where the machine's own settings put it."""
    texts = {"group": settings.group, "labels": ", ".join(settings.labels)}
    return {key: text for key, text in texts.items() if text}


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _pids() -> int:
    found = []
    for name in ("pid_max", "threads-max"):
        with open(f"/proc/sys/kernel/{name}", encoding="ascii") as file:
            found.append(int(file.read()))
    return min(found)
