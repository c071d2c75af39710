"""When a failed call is tried again: one rule for both clients."""

from __future__ import annotations

import os
import time
from typing import Final

from madang.wire.errors import PlatformError, RateLimited, ServerUnreachable, Shutdown

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 1.0


class Retries:
    """Pauses between the tries of one call, or of the tries to take a stream up again.

    Tried again are: a lost connection, a refused one if the server answered before (it restarts),
    a server that says that it is stopping, and too many calls at once. Never longer than
    *patience_s* in all, and never a call that is not repeatable.
    """

    def __init__(self, patience_s: float, *, repeatable: bool = True, answered: bool) -> None:
        self._until = time.monotonic() + patience_s
        self._pause = FIRST_PAUSE_S
        self._repeatable = repeatable
        self._answered = answered

    def pause_s(self, error: PlatformError) -> float | None:
        """Seconds to wait before the next try; None: give up."""
        if not (self._repeatable and self._worthwhile(error)):
            return None
        left = self._until - time.monotonic()
        asked = float(error.details.get("retry_after_s", 0.0))
        pause = max(asked, self._pause * (0.5 + os.urandom(1)[0] / 512))
        self._pause = min(self._pause * 2, LONGEST_PAUSE_S)
        return pause if pause <= left else None

    def _worthwhile(self, error: PlatformError) -> bool:
        if isinstance(error, ServerUnreachable):
            return self._answered or not error.details.get("refused", False)
        return isinstance(error, Shutdown | RateLimited)
