"""Time that tests own.

``FakeClock`` stands still until the test moves it. ``simulate`` runs a coroutine on an event loop
whose time jumps to the next timer as soon as nothing else can run: hours pass in milliseconds, and
the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

EPOCH: Final = 1_800_000_000.0
_ROUNDS: Final = 40
"""Turns of the event loop that any chain of wake-ups gets."""


class FakeClock:
    """See ``kit.clock.Clock``."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._wall = EPOCH
        self._timers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        return self._wall + self._elapsed

    def monotonic(self) -> float:
        return self._elapsed

    def jump(self, seconds: float) -> None:
        """Somebody sets the machine's clock: only ``now`` changes."""
        self._wall += seconds

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        timer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._timers, (self._elapsed + seconds, next(self._numbers), timer))
        await timer

    async def wait(self, event: asyncio.Event, timeout_s: float) -> bool:
        return await _first(event, self.sleep(timeout_s))

    async def advance(self, seconds: float) -> None:
        """Let that much time pass; whoever wakes acts at its own moment."""
        target = self._elapsed + seconds
        await settle()
        while self._timers and self._timers[0][0] <= target:
            due, _, timer = heapq.heappop(self._timers)
            self._elapsed = max(self._elapsed, due)
            if not timer.done():
                timer.set_result(None)
            await settle()
        self._elapsed = target
        await settle()


async def settle() -> None:
    """Let everything run that can run without time passing or input coming."""
    for _ in range(_ROUNDS):
        await asyncio.sleep(0)


async def _first(event: asyncio.Event, sleep: Coroutine[Any, Any, None]) -> bool:
    if event.is_set():
        sleep.close()
        return True
    waiter = asyncio.ensure_future(event.wait())
    timer = asyncio.ensure_future(sleep)
    try:
        await asyncio.wait((waiter, timer), return_when=asyncio.FIRST_COMPLETED)
        return event.is_set()
    finally:
        waiter.cancel()
        timer.cancel()


class LoopClock:
    """The event loop's own time; with ``simulate`` it is virtual."""

    def now(self) -> float:
        return EPOCH + self.monotonic()

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def wait(self, event: asyncio.Event, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        return True


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping until the next timer, moves the time there."""

    def __init__(self) -> None:
        super().__init__()
        self.elapsed = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)
        events = super().select(0)
        if not events and timeout > 0:
            self.elapsed += timeout
        return events


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.elapsed


def simulate(work: Coroutine[Any, Any, T]) -> T:
    """Run *work* in virtual time. Nothing in it may wait for threads or other processes."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(work)
