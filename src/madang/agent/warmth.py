"""What is kept ready for warm starts, as the runtime last told: no heartbeat waits for it."""

from __future__ import annotations

from madang.agent.runtime.contract import Runtime
from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.wire.errors import LauncherUnavailable
from madang.wire.kernel import WarmLoad


class WarmMeter(Loop):
    """Looks once for each heartbeat."""

    def __init__(self, runtime: Runtime, clock: Clock, period_s: float) -> None:
        super().__init__(clock)
        self.period_s = period_s
        self.seen: WarmLoad | None = None
        self._runtime = runtime

    async def tick(self, now: float) -> None:
        del now
        try:
            self.seen = await self._runtime.warmth()
        except LauncherUnavailable:  # It is being started again, and keeps nothing warm yet.
            self.seen = None
