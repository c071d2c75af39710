"""Versions in headers."""

from __future__ import annotations

from madang.wire.errors import InvalidRequest


def version_of(header: str | None) -> int | None:
    """The number in an ``If-Match`` or ``If-None-Match``; None for ``*`` or none."""
    if header is None or header.strip() == "*":
        return None
    digits = header.strip().removeprefix("W/").strip('"')
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 19):
        raise InvalidRequest(f"If-Match: {header[:40]!r} is no version that we gave.")
    return int(digits)
