"""Frames on ``launcher.sock``: u32 little-endian length, then that much JSON (an object).

Request: ``{"id": N, "op": …, "kernel": …, …}``. Answer: ``{"id": N, "ok": {…}}`` or ``{"id": N,
"error": CODE, "text": …, "details": {…}}``. Push: ``{"changed": KERNEL}``. The answer to ``files``
carries a descriptor with the first byte of its frame.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

from madang.wire.errors import InvalidRequest, TooLarge

MAX_FRAME: Final = 8 * 1024 * 1024
_LENGTH: Final = struct.Struct("<I")


def frame(message: dict[str, Any]) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_FRAME:
        raise TooLarge(f"request of {len(data)} bytes; the most is {MAX_FRAME}.")
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Puts frames together from what arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Whole messages so far. Raises InvalidRequest on garbage: then close the connection."""
        self._buffer += data
        found: list[dict[str, Any]] = []
        while (message := self._next()) is not None:
            found.append(message)
        return found

    def _next(self) -> dict[str, Any] | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_FRAME:
            raise InvalidRequest(f"frame of {length} bytes; the most is {MAX_FRAME}.")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        try:
            message = json.loads(bytes(self._buffer[_LENGTH.size : end]))
        except (ValueError, RecursionError) as exc:
            raise InvalidRequest("frame is no JSON.") from exc
        del self._buffer[:end]
        if not isinstance(message, dict):
            raise InvalidRequest("frame is no JSON object.")
        return message
