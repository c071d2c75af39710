"""What is known of one running program: how far its output goes, and when it has ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

from madang.agent.keepers import Keepers
from madang.kit.broadcast import Broadcast
from madang.kit.clock import Clock
from madang.kit.codec import from_json
from madang.wire.errors import InvalidRequest
from madang.wire.session import Ended

log = logging.getLogger(__name__)

ENDED: Final = "ended.json"
_RETRY_S: Final = 0.2


class Watch:
    """One connection to one keeper, whatever the number of readers."""

    def __init__(self, folder: str, keepers: Keepers, clock: Clock) -> None:
        self.folder = folder
        self.end = 0
        """Offset after the last record known."""
        self.gone = False
        """The program has ended, or its keeper died."""
        self.refusals = 0
        """Grows with what its sandbox policy refused."""
        self.stopping = False
        """Its keeper is ending it."""
        self.changed = Broadcast()
        self._keepers = keepers
        self._clock = clock

    async def run(
        self,
        on_gone: Callable[[], None] | None = None,
        on_stopping: Callable[[], None] | None = None,
        on_refusals: Callable[[], None] | None = None,
    ) -> None:
        """Follow until the program has ended; then call *on_gone*."""
        while not self.gone:
            try:
                await self._follow(on_stopping, on_refusals)
                self.gone = True
            except OSError as exc:  # we lack something (descriptors, memory): not its end
                log.warning("keeper not watched", extra={"folder": self.folder, "error": str(exc)})
                await self._clock.sleep(_RETRY_S)
        self.changed.notify()
        if on_gone is not None:
            on_gone()

    async def _follow(
        self, on_stopping: Callable[[], None] | None, on_refusals: Callable[[], None] | None
    ) -> None:
        async with aclosing(self._keepers.watch(self.folder)) as told:
            async for news in told:
                if news.end is not None and news.end > self.end:
                    self.end = news.end
                    self.changed.notify()
                if news.refusals is not None and news.refusals > self.refusals:
                    self.refusals = news.refusals
                    self.changed.notify()
                    if on_refusals is not None:
                        on_refusals()
                if news.stopping and not self.stopping:
                    self.stopping = True
                    if on_stopping is not None:
                        on_stopping()
                if news.ended:
                    return


def read_ended(folder: str) -> Ended | None:
    """``ended.json`` of an ``io`` folder, if it is there."""
    try:
        with open(os.path.join(folder, ENDED), "rb") as file:
            return from_json(Ended, file.read())
    except FileNotFoundError:
        return None
    except (OSError, InvalidRequest) as exc:
        log.warning("end not readable", extra={"folder": folder, "error": str(exc)})
        return None
