"""Points in time as people write them."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from madang.wire.errors import InvalidRequest, PlatformError
from madang.wire.size import parse_duration


def parse_time(text: str | None, *, field: str) -> float | None:
    """``2h`` (ago), ``2026-11``, ``2026-11-28`` or ``2026-11-28T14:05``, dates in UTC."""
    if text is None:
        return None
    month = f"{text}-01" if len(text) == 7 and text[4] == "-" else text
    try:
        found = datetime.fromisoformat(month)
    except ValueError:
        found = None
    if found is not None:
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    try:
        return time.time() - parse_duration(text, field=field)
    except PlatformError as exc:
        hint = "write 2h, 2026-11, 2026-11-28 or 2026-11-28T14:05 (UTC)"
        raise InvalidRequest(f"--{field}: {text[:40]!r} is no time; {hint}.", field=field) from exc


def show_time(at: float) -> str:
    """To the second, in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
