"""Text and frames in what a driver writes (docs/reference/drivers.md).

Whoever runs code in a session can write frames themselves: all that they gain is to fool those who
look at their own cells. So lengths are bounded, and what makes no sense is text or is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

MAX_PAYLOAD: Final = 10 << 20
"""Bytes; in base64 it still fits a WebSocket message. Of a longer payload nothing is kept."""
_MAX_HEAD: Final = 400
_HEAD: Final = re.compile(rb"([a-z]{1,16}) ([!-~]{1,64}) ([!-~]{1,250}) ([0-9]{1,12})")


@dataclass(frozen=True, slots=True)
class Frame:
    kind: str
    id: str
    arg: str
    """Empty if it has none."""
    payload: bytes
    lost_bytes: int = 0
    """So long was the payload, where it passed ``MAX_PAYLOAD``."""


class Frames:
    """One stream of one driver."""

    def __init__(self, nonce: str) -> None:
        self._mark: Final = b"\x1e" + nonce.encode() + b" "
        self._rest = b""
        """May become a mark or a head."""
        self._head: Frame | None = None
        self._body = bytearray()
        self._wanted = 0

    def feed(self, data: bytes) -> list[tuple[int, bytes | Frame]]:
        """What became complete, each with the index in *data* at which it did."""
        found: list[tuple[int, bytes | Frame]] = []
        shift, at = len(self._rest), 0
        if self._rest:
            data, self._rest = self._rest + data, b""
        while at < len(data):
            at = self._step(data, at, shift, found)
        return found

    def forget(self) -> None:
        """Something is missing before what comes next."""
        self._rest, self._head, self._wanted = b"", None, 0
        self._body.clear()

    def _step(
        self, data: bytes, at: int, shift: int, found: list[tuple[int, bytes | Frame]]
    ) -> int:
        if self._head is not None:
            return self._take_body(data, at, shift, found)
        start = data.find(self._mark, at)
        if start < 0:
            start = _possible(data, at, self._mark)
        if start > at:
            found.append((start - shift, data[at:start]))
        if start == len(data):
            return start
        end = data.find(b"\n", start, start + len(self._mark) + _MAX_HEAD)
        if end < 0:
            if len(data) - start >= len(self._mark) + _MAX_HEAD:
                found.append((start + 1 - shift, data[start : start + 1]))
                return start + 1
            self._rest = data[start:]
            return len(data)
        match = _HEAD.fullmatch(data, start + len(self._mark), end)
        if match is not None:
            kind, id_, arg, length = match.groups()
            self._wanted = int(length)
            lost = self._wanted if self._wanted > MAX_PAYLOAD else 0
            self._head = Frame(kind.decode(), _word(id_), _word(arg), b"", lost)
        return end + 1

    def _take_body(
        self, data: bytes, at: int, shift: int, found: list[tuple[int, bytes | Frame]]
    ) -> int:
        head = self._head
        assert head is not None
        end = min(len(data), at + self._wanted)
        if not head.lost_bytes:
            self._body += data[at:end]
        self._wanted -= end - at
        at = end
        if self._wanted == 0 and at < len(data):  # the line feed behind it
            if data[at : at + 1] == b"\n":
                at += 1
            frame = Frame(head.kind, head.id, head.arg, bytes(self._body), head.lost_bytes)
            found.append((at - shift, frame))
            self._head = None
            self._body.clear()
        return at


def _possible(data: bytes, at: int, mark: bytes) -> int:
    """Where the end of *data* may be the beginning of a mark; its length if it can't."""
    start = data.find(b"\x1e", max(at, len(data) - len(mark) + 1))
    while start >= 0:
        if mark.startswith(data[start:]):
            return start
        start = data.find(b"\x1e", start + 1)
    return len(data)


def _word(value: bytes) -> str:
    return "" if value == b"-" else value.decode("ascii")
