"""How much of the machine a guard may take: what a session makes it do is nobody else's."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Final

_SPAN_S: Final = 0.2
_SHARE: Final = 0.5
"""Of one processor; in any span."""


def hurry() -> None:
    """Be woken before ordinary programs: who asks us waits. With a pace, for the others' sake."""
    with contextlib.suppress(OSError):  # Some control groups take no such processes.
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


class Pace:
    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.process_time,
    ) -> None:
        """*used*: processor time."""
        self._clock = clock
        self._used = used
        self._began, self._before = clock(), used()

    def rest_s(self) -> float:
        """How long to answer nobody: a session's questions have taken their share. Else 0."""
        now = self._clock()
        if now - self._began >= _SPAN_S:
            self._began, self._before = now, self._used()
        elif self._used() - self._before >= _SPAN_S * _SHARE:
            return self._began + _SPAN_S - now
        return 0.0
