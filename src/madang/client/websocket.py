"""The WebSocket protocol (RFC 6455), client side, without I/O.

Small enough to own: the one library that is a dependency anyway (aiohttp) takes 100 ms to import,
which is most of the time of a short command. No extensions are offered, so frames are plain.
"""

from __future__ import annotations

import base64
import os
from hashlib import sha1
from typing import Final

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

MAX_MESSAGE: Final = 16 * 1024 * 1024
MAX_HEAD: Final = 64 * 1024
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class ProtocolError(Exception):
    """The other side does not speak WebSocket as it should."""


def new_key() -> str:
    return base64.b64encode(os.urandom(16)).decode()


def accept_for(key: str) -> str:
    digest = sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def request_head(path: str, host: str, key: str, headers: dict[str, str]) -> bytes:
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header holds a line break")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers (names in lower case) of an answer. Raises ProtocolError."""
    first, *rest = head.decode("latin-1").split("\r\n")
    version, _, status = first.partition(" ")
    if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
        raise ProtocolError(f"no HTTP answer: {first[:60]!r}")
    pairs = (line.partition(":") for line in rest if line)
    return int(status[:3]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def check_accept(status: int, headers: dict[str, str], key: str) -> None:
    """Raises ProtocolError unless the server agreed to this handshake."""
    agreed = headers.get("upgrade", "").lower() == "websocket"
    if status != 101 or not agreed or headers.get("sec-websocket-accept") != accept_for(key):
        raise ProtocolError(f"answer {status} is no WebSocket handshake")


def encode(opcode: int, payload: bytes) -> bytes:
    """One frame, final and masked as a client must."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 1 << 16:
        head = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2)
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8)
    mask = os.urandom(4)
    return head + mask + _mask(payload, mask)


def _mask(payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    pattern = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload) ^ int.from_bytes(pattern)).to_bytes(size)


class Decoder:
    """Bytes from the server to whole messages: ``(opcode, payload)``."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._parts: list[bytes] = []
        self._opcode = CONTINUATION

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Messages and control frames that became complete. Raises ProtocolError."""
        self._buffer += data
        found: list[tuple[int, bytes]] = []
        at = 0
        while (frame := self._frame(at)) is not None:
            first, payload, at = frame
            message = self._join(first, payload)
            if message is not None:
                found.append(message)
        del self._buffer[:at]
        return found

    def _frame(self, at: int) -> tuple[int, bytes, int] | None:
        buffer = self._buffer
        if len(buffer) < at + 2:
            return None
        first, second = buffer[at], buffer[at + 1]
        if first & 0x70 or second & 0x80:
            raise ProtocolError("a frame has reserved bits or a mask")
        size, extra = second, {126: 2, 127: 8}.get(second, 0)
        start = at + 2 + extra
        if len(buffer) < start:
            return None
        if extra:
            size = int.from_bytes(buffer[at + 2 : start])
        if size > MAX_MESSAGE:
            raise ProtocolError(f"a frame of {size} bytes is too large")
        if len(buffer) < start + size:
            return None
        return first, bytes(buffer[start : start + size]), start + size

    def _join(self, first: int, payload: bytes) -> tuple[int, bytes] | None:
        final, opcode = first & 0x80, first & 0x0F
        if opcode & 0x8:
            if not final or len(payload) > 125:
                raise ProtocolError("a control frame is too long or cut")
            return opcode, payload
        if (opcode == CONTINUATION) != bool(self._opcode):
            raise ProtocolError("fragments of messages are mixed")
        self._opcode = opcode or self._opcode
        self._parts.append(payload)
        if sum(map(len, self._parts)) > MAX_MESSAGE:
            raise ProtocolError("a message is too large")
        if not final:
            return None
        whole, kind = b"".join(self._parts), self._opcode
        self._parts, self._opcode = [], CONTINUATION
        return kind, whole
