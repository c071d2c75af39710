"""Waking everybody who waits for the next change."""

from __future__ import annotations

import asyncio


class Broadcast:
    """``notify`` wakes all current waiters at once; who waits later waits for the next one.

    Look at the state, then ``await wait()``: nothing is missed inside one event loop as long as
    there is no other ``await`` between the look and the wait.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None

    def notify(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            event.set()

    def next(self) -> asyncio.Event:
        """Set at the next ``notify``."""
        if self._event is None:
            self._event = asyncio.Event()
        return self._event

    async def wait(self) -> None:
        await self.next().wait()
