"""MIME bundles: what a cell shows, as JSON can carry it."""

from __future__ import annotations

import base64
import re
from typing import Any, Final

from madang.kit.codec import from_json
from madang.manager.cells.rules.frames import MAX_PAYLOAD, Frame
from madang.wire.errors import InvalidRequest

METADATA: Final = "application/vnd.madang.metadata+json"
"""A part of this type is the bundle's metadata."""
MAX_PARTS: Final = 32
_MIME: Final = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,63}/[A-Za-z0-9!#$&^_.+-]{1,127}")
_BINARY: Final = re.compile(r"(?:image|audio|video|font)/(?!.*\bxml\b).*")


class Bundle:
    """Parts of one output, until its last has come."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {}
        self._size = 0

    def add(self, frame: Frame) -> str:
        """Take a part; returns the display's id that it names, or nothing."""
        mime, _, rest = frame.arg.partition(";")
        if _MIME.fullmatch(mime) is None:
            mime = "text/plain"
        size = frame.lost_bytes or len(frame.payload)
        self._size += size
        if self._size > MAX_PAYLOAD or len(self.data) >= MAX_PARTS:
            self.data.setdefault("text/plain", f"[{mime} of {size} bytes: too large to show]")
        elif mime == METADATA:
            value = _json(frame.payload)
            self.metadata = value if isinstance(value, dict) else {}
        else:
            self.data[mime] = as_json(mime, frame.payload)
        named = [word[8:] for word in rest.split(";") if word.startswith("display=")]
        return named[0][:64] if named else ""


def as_json(mime: str, payload: bytes) -> Any:
    """Text, what a JSON document says, or base64 of what is neither."""
    if mime == "application/json" or mime.endswith("+json"):
        return _json(payload)
    if mime.startswith("text/") or mime.endswith("+xml"):
        return payload.decode("utf-8", "replace")
    if _BINARY.fullmatch(mime) is None:
        try:
            return payload.decode()
        except UnicodeDecodeError:
            pass
    return base64.b64encode(payload).decode()


def _json(payload: bytes) -> Any:
    try:
        return from_json(object, payload)
    except InvalidRequest:
        return payload.decode("utf-8", "replace")
