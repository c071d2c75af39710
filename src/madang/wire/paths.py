"""File names on the wire: any bytes, written as text without loss.

A path travels percent-encoded (RFC 3986): letters, digits and ``-._~/`` and most marks stand for
themselves, each
other byte is ``%XX``. So names that are not UTF-8 pass through JSON and URLs.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from madang.wire.errors import PathInvalid

SAFE: Final = "/-._~ !$&'()*+,:;=@[]{}^"
MAX_PATH: Final = 4096


def to_wire(path: bytes) -> str:
    """Bytes of a file name as text."""
    return quote_from_bytes(path, safe=SAFE)


def from_wire(text: str) -> bytes:
    """The bytes again. Raises PathInvalid on NUL, an empty or an over-long path."""
    path = unquote_to_bytes(text)
    if not path or b"\0" in path or len(path) > MAX_PATH:
        raise PathInvalid(f"path {text[:80]!r} is empty, too long or has a NUL byte.")
    return path


def relative(text: str) -> bytes:
    """The bytes of a path that must stay below its root: no ``..``, not absolute."""
    path = from_wire(text)
    parts = path.split(b"/")
    if path.startswith(b"/") or b".." in parts or b"" in parts or b"." in parts:
        raise PathInvalid(f"path {text[:80]!r} must be relative, without '.', '..' or '//'.")
    return path


def display(path: bytes) -> str:
    """For people: unprintable bytes replaced."""
    text = path.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "�" for c in text)
