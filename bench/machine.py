"""What the kernel says of processes: memory that is really theirs, CPU time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size: shared pages are divided among those who share them."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def tree(pid: int) -> list[int]:
    """*pid* and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += tree(int(child))
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time of the processes and of the children that they have waited for."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))
    return total / TICK


def describe() -> str:
    """The machine in a line."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if "model name" in line), "?")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1024**2
    uname = os.uname()
    return f"{os.cpu_count()} × {model}, {memory:.0f} GiB, {uname.sysname} {uname.release}"
