"""Whether the machine is short of memory: then nothing is kept warm for later."""

from __future__ import annotations

from typing import Final

from madang.agent.launcher import cgroups

MEMINFO: Final = "/proc/meminfo"
STALLS: Final = "/proc/pressure/memory"
"""Pressure stall information; not every kernel has it."""
LEAST_FREE: Final = 0.05
"""Of the machine's memory."""
MOST_STALLED: Final = 10.0
"""Percent of the last ten seconds in which everybody waited for memory."""


def is_short() -> bool:
    return few_left(cgroups.read(MEMINFO)) or stalled(cgroups.read(STALLS))


def few_left(meminfo: str) -> bool:
    found = dict.fromkeys(("MemTotal", "MemAvailable"), 0)
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0])
    return found["MemAvailable"] < found["MemTotal"] * LEAST_FREE


def stalled(pressure: str) -> bool:
    for line in pressure.splitlines():
        kind, *fields = line.split()
        for field in fields:
            name, _, value = field.partition("=")
            if (kind, name) == ("full", "avg10"):
                return float(value) >= MOST_STALLED
    return False
