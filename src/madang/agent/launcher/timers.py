"""Calls to be made later, for the launcher's loop."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable


class Timers:
    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._calls: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()

    def after(self, seconds: float, call: Callable[[], None]) -> int:
        number = next(self._numbers)
        self._calls[number] = call
        heapq.heappush(self._heap, (time.monotonic() + seconds, number))
        return number

    def cancel(self, number: int) -> None:
        """No error if it was called or cancelled before."""
        self._calls.pop(number, None)

    def wait_s(self) -> float | None:
        """Until the next one; None: there is none."""
        while self._heap and self._heap[0][1] not in self._calls:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - time.monotonic()) if self._heap else None

    def run(self) -> None:
        """Make the calls that are due."""
        while self.wait_s() == 0.0:
            _, number = heapq.heappop(self._heap)
            self._calls.pop(number)()
