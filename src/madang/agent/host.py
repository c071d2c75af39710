"""What is in use on the whole machine, by sessions and everybody else."""

from __future__ import annotations

import psutil

from madang.wire.kernel import HostLoad


class HostMeter:
    """CPU is counted from one look to the next."""

    def __init__(self) -> None:
        self._idle, self._total = _cpu_times()

    def load(self) -> HostLoad:
        """Since the last look; memory as of now."""
        cpus = psutil.cpu_count() or 1
        idle, total = _cpu_times()
        passed = total - self._total
        busy = 1 - (idle - self._idle) / passed if passed > 0 else 0.0
        self._idle, self._total = idle, total
        memory = psutil.virtual_memory()
        return HostLoad(
            cpu=round(min(max(busy, 0.0), 1.0) * cpus, 3),
            cpus=cpus,
            mem_bytes=memory.total - memory.available,
            mem_total_bytes=memory.total,
        )


def _cpu_times() -> tuple[float, float]:
    """Seconds of all processors since the start: idle, and altogether."""
    times = psutil.cpu_times()
    idle = times.idle + times.iowait
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return idle, idle + busy  # a guest's time is part of the user's
