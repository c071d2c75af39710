"""Background work: look at what is, compare with what should be, act, wait to be woken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod

from madang.kit.clock import Clock
from madang.kit.tasks import is_cancelled

log = logging.getLogger(__name__)


class Loop(ABC):
    """Runs ``tick`` when woken, and at least every ``period_s``.

    A failing tick is logged once per kind of error and tried again after a growing pause; it never
    ends the loop. ``wake`` is cheap and may be called from anywhere in the event loop's thread.
    """

    period_s: float = 5.0
    max_pause_s: float = 30.0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    async def tick(self, now: float) -> None:
        """One idempotent round; *now* is Unix time."""

    def wake(self) -> None:
        """Run a round soon; several calls before it make one round."""
        self._woken.set()

    def start(self) -> None:
        """Run in the background until ``stop``."""
        if self._task is None:
            self._task = asyncio.create_task(self.run(), name=f"loop:{self.name}")

    async def stop(self) -> None:
        """End; returns once the loop has ended."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def run(self) -> None:
        """Tick until cancelled."""
        pause, last = 0.1, ""
        while True:
            self._woken.clear()
            try:
                await self.tick(self.clock.now())
            except Exception as exc:
                if is_cancelled():
                    raise asyncio.CancelledError from exc
                level = logging.ERROR if repr(exc) != last else logging.DEBUG
                log.log(level, "loop failed", extra={"loop": self.name}, exc_info=exc)
                last = repr(exc)
                await self.clock.sleep(pause)
                pause = min(pause * 2, self.max_pause_s)
                continue
            pause, last = 0.1, ""
            await self.clock.wait(self._woken, self.period_s)
