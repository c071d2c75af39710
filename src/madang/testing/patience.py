"""How long tests wait for what must come, and how.

What another process or task writes (a file, a row, a counter, a log) is there some time after what
made it write: it is waited for, and the bound says only that it never came.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

PATIENCE_S: Final = 60.0
"""Two slow cores, and other work on them."""
_POLL_S: Final = 0.02


async def until(look: Callable[[], T], ready: Callable[[T], object] = bool) -> T:
    """What *look* sees once it is *ready*; fails with the last look."""
    late = time.monotonic() + PATIENCE_S
    while not ready(seen := look()):
        assert time.monotonic() < late, f"after {PATIENCE_S:g} s still {seen!r}"
        await asyncio.sleep(_POLL_S)
    return seen


def wait_until(look: Callable[[], T], ready: Callable[[T], object] = bool) -> T:
    """The same for tests without a loop."""
    late = time.monotonic() + PATIENCE_S
    while not ready(seen := look()):
        assert time.monotonic() < late, f"after {PATIENCE_S:g} s still {seen!r}"
        time.sleep(_POLL_S)
    return seen
