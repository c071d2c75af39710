"""Background duties of the image slice."""

from __future__ import annotations

from typing import Final

from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.manager.image.service import ImageService, Versions
from madang.wire.api import Event
from madang.wire.session import SessionStatus


class BuildWatcher(Loop):
    """Makes images of builds that ended. Woken by the ends of sessions."""

    period_s = 5.0

    def __init__(self, service: ImageService, clock: Clock) -> None:
        super().__init__(clock)
        self._service: Final = service

    def listen(self, event: Event) -> None:
        """Give this to the event feed."""
        ended = event.payload.get("target") == SessionStatus.TERMINATED
        if ended or event.kind == "session.removed":
            self.wake()

    async def tick(self, now: float) -> None:
        await self._service.settle_builds()


class Collector(Loop):
    """Forgets removed images once nothing runs from them."""

    period_s = 60.0

    def __init__(self, service: ImageService, clock: Clock) -> None:
        super().__init__(clock)
        self._service: Final = service

    async def tick(self, now: float) -> None:
        await self._service.forget_removed(now)


class Refresher(Loop):
    """Makes anew, by schedule, what is kept up to date."""

    period_s = 60.0

    def __init__(self, versions: Versions, clock: Clock) -> None:
        super().__init__(clock)
        self._versions: Final = versions

    async def tick(self, now: float) -> None:
        await self._versions.refresh_due(now)
