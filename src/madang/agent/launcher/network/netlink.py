"""Requests to the kernel's network parts (``man 7 netlink``), and its answers."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, Self

ROUTE: Final = 0
NETFILTER: Final = 12

REQUEST: Final = 0x1
ACK: Final = 0x4
DUMP: Final = 0x300
EXCLUSIVE: Final = 0x200
CREATE: Final = 0x400

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ERROR, _DONE = 2, 3
_TYPE_BITS: Final = 0x3FFF
_NESTED: Final = 0x8000
_CAP_ACK: Final = 10
_SOL_NETLINK: Final = 270
_BUFFER: Final = 1 << 18
_PATIENCE_S: Final = 10.0


def attribute(kind: int, value: bytes | int | str) -> bytes:
    """One attribute, padded; numbers take 32 bits, texts end with NUL."""
    if isinstance(value, int):
        value = struct.pack("=I", value)
    elif isinstance(value, str):
        value = value.encode() + b"\0"
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(attributes))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, value) of each attribute in *data*."""
    while len(data) >= 4:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < 4:
            return
        yield kind & _TYPE_BITS, data[4:length]
        data = data[length + 3 & ~3 :]


class Netlink:
    """A connection to the part *family* of the network namespace it was made in."""

    def __init__(self, family: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
        self._socket.settimeout(_PATIENCE_S)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.bind((0, 0))
        self.number = 0
        """Of the newest message."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def message(self, kind: int, flags: int, body: bytes) -> bytes:
        self.number += 1
        return _HEADER.pack(16 + len(body), kind, REQUEST | flags, self.number, 0) + body

    def change(self, kind: int, flags: int, body: bytes, what: str) -> None:
        """Have something done. Raises OSError that says *what*."""
        message = self.message(kind, ACK | flags, body)
        self.send(message, self.number, what)

    def send(self, data: bytes, number: int, what: str) -> None:
        """Messages of which *number*, the last to do something, wants an ACK. Raises OSError."""
        self._socket.send(data)
        for _ in self._answers(number, what):
            pass

    def dump(self, kind: int, body: bytes, what: str) -> list[bytes]:
        """The bodies of all that there are."""
        self._socket.send(self.message(kind, DUMP, body))
        return list(self._answers(self.number, what))

    def get(self, kind: int, body: bytes, what: str) -> bytes:
        self._socket.send(self.message(kind, ACK, body))
        return b"".join(self._answers(self.number, what))

    def _answers(self, number: int, what: str) -> Iterator[bytes]:
        """Until the end of a dump, or word on message *number*; other words are passed over."""
        while True:
            data = self._socket.recv(_BUFFER)
            while len(data) >= 16:
                length, kind, _, told, _ = _HEADER.unpack_from(data)
                body, data = data[16:length], data[length + 3 & ~3 :]
                if kind == _ERROR and (code := -int.from_bytes(body[:4], "little", signed=True)):
                    self._drain()
                    raise OSError(code, f"{what}: {os.strerror(code)}")
                if told != number:
                    continue
                if kind in {_ERROR, _DONE}:
                    return
                yield body

    def _drain(self) -> None:
        self._socket.setblocking(False)
        try:
            while self._socket.recv(_BUFFER):
                pass
        except BlockingIOError:
            pass
        finally:
            self._socket.settimeout(_PATIENCE_S)
