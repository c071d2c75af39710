"""Measures what runs; ends what passes a limit that nothing else holds, freezes what rests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from madang.agent.kernel import Kernel
from madang.agent.runtime.contract import Runtime
from madang.agent.settings import AgentSettings
from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.wire.errors import PlatformError
from madang.wire.session import Reason, Usage
from madang.wire.size import format_bytes

log = logging.getLogger(__name__)

WATCH: Final = "watch"


class Meter(Loop):
    """Usage of all running kernels each heartbeat; of those to be watched four times a second."""

    def __init__(
        self,
        settings: AgentSettings,
        runtime: Runtime,
        clock: Clock,
        kernels: Callable[[], Iterable[Kernel]],
    ) -> None:
        super().__init__(clock)
        self._settings = settings
        self._runtime = runtime
        self._kernels = kernels
        self._all_due = 0.0
        self.period_s = settings.heartbeat_s

    async def tick(self, now: float) -> None:
        del now
        running = [kernel for kernel in self._kernels() if kernel.running]
        watched = [kernel for kernel in running if _is_watched(kernel)]
        at = self.clock.monotonic()
        everybody = at >= self._all_due
        if everybody:
            self._all_due = at + self._settings.heartbeat_s
        for kernel in running if everybody else watched:
            await self._measure(kernel)
        left = max(0.0, self._all_due - self.clock.monotonic())
        self.period_s = min(left, self._settings.watch_period_s) if watched else left

    async def _measure(self, kernel: Kernel) -> None:
        try:
            usage = await self._runtime.usage(kernel.id)
        except PlatformError as exc:  # it may just have ended; or the launcher is away
            log.debug("no usage", extra={"kernel": str(kernel.id), "error": exc.text})
            return
        if kernel.running:
            kernel.measured(usage)
            _judge(kernel, usage)


def _is_watched(kernel: Kernel) -> bool:
    enforced = kernel.report().enforced
    return WATCH in {enforced.get("mem"), enforced.get("disk")}


def _judge(kernel: Kernel, usage: Usage) -> None:
    if kernel.assignment is None:
        return
    size, enforced = kernel.assignment.spec.size, kernel.report().enforced
    rules = (
        ("mem", usage.mem_bytes, size.mem_bytes, Reason.OOM, "memory"),
        ("disk", usage.disk_bytes, size.disk_bytes, Reason.DISK, "disk"),
    )
    for name, used, limit, reason, word in rules:
        if enforced.get(name) == WATCH and used is not None and used > limit:
            kernel.condemn(
                reason,
                f"ended: {word} limit {format_bytes(limit)} passed, {format_bytes(used)} in "
                f"use; ask for more with --{name}",
            )
