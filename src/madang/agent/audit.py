"""Compares what the agent believes with what the runtime sees, now and then.

Events tell everything in time; this finds what no event told: kernels that a request of a former
agent made after the new one had looked, ends that nobody saw, kernels that were frozen or thawed
behind our back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from madang.agent.kernel import Kernel
from madang.agent.runtime.contract import Found, Runtime
from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.wire.kernel import KernelId

log = logging.getLogger(__name__)


class Audit(Loop):
    def __init__(
        self,
        runtime: Runtime,
        clock: Clock,
        period_s: float,
        kernels: dict[KernelId, Kernel],
        stranger: Callable[[Found], None],
    ) -> None:
        """*stranger* is told of what the runtime has and *kernels* lack."""
        super().__init__(clock)
        self.period_s = period_s
        self._runtime = runtime
        self._kernels = kernels
        self._stranger = stranger

    async def tick(self, now: float) -> None:
        del now
        before = dict(self._kernels)
        ran = {kernel_id for kernel_id, kernel in before.items() if kernel.running}
        rested = {kernel_id for kernel_id, kernel in before.items() if kernel.settled}
        found = {each.kernel: each for each in await self._runtime.adopt()}
        for each in found.values():
            if each.kernel not in before and each.kernel not in self._kernels:
                log.warning("unknown kernel found", extra={"kernel": str(each.kernel)})
                self._stranger(each)
            elif each.kernel in rested and each.running:
                log.warning("ended kernel found running", extra={"kernel": str(each.kernel)})
                await self._runtime.kill(each.kernel)
                await self._runtime.settle(each.kernel)
        for kernel_id in ran:
            if kernel_id not in found or not found[kernel_id].running:
                before[kernel_id].lose()
            else:
                before[kernel_id].found_frozen(found[kernel_id].frozen)
