"""Things that failed are made again later: soon at first, then ever more rarely."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

FIRST_S: Final = 10.0
"""What failed once may be tried again after so long: an overloaded machine is slow, not broken."""
_FACTOR: Final = 6.0
LAST_S: Final = 600.0
_FORGOTTEN_S: Final = LAST_S

Key = TypeVar("Key", bound=Hashable)


class Failures(Generic[Key]):
    """How often what failed in a row, and until when it is let be."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[Key, tuple[int, float]] = {}
        """Times in a row, and until when."""

    def note(self, key: Key) -> float:
        """It failed; the seconds until it may be tried again."""
        now = self._clock()
        self._known = {
            each: found for each, found in self._known.items() if now - found[1] < _FORGOTTEN_S
        }
        times = self._known.get(key, (0, now))[0] + 1
        self._known[key] = (times, now + wait_s(times))
        return wait_s(times)

    def forgive(self, key: Key) -> None:
        """It worked."""
        self._known.pop(key, None)

    def holds(self, key: Key) -> bool:
        """Whether it is too early for another try."""
        return key in self._known and self._clock() < self._known[key][1]


def wait_s(times: int) -> float:
    """After so many failures in a row, at least one."""
    return min(LAST_S, FIRST_S * _FACTOR ** min(times - 1, 10))
