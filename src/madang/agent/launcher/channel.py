"""Small messages with descriptors between launcher, keeper and init; large ones in a memory file.

SEQPACKET sockets: a message arrives whole or not at all, and the end of the peer is seen at once.
"""

from __future__ import annotations

import _socket
import json
import os
import socket
import sys
from collections.abc import Sequence
from json import encoder
from typing import Any, Final

Message = dict[str, Any]

_MAX_MESSAGE = 64 * 1024
_MAX_FDS = 8
_RIGHTS_BYTES: Final = socket.CMSG_SPACE(4 * _MAX_FDS)

# Forks that stay small use these: without ``json.dumps`` and the enumerations of ``socket`` they
# copy 0.7 MiB less.
_UNIX: Final = int(socket.AF_UNIX)
_SEQPACKET: Final = int(socket.SOCK_SEQPACKET)
_NOSIGNAL: Final = int(socket.MSG_NOSIGNAL)
_scan: Final = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_pieces: Final = encoder.c_make_encoder(  # type: ignore[attr-defined]
    None,
    json.JSONEncoder().default,
    encoder.encode_basestring_ascii,
    None,
    ": ",
    ", ",
    False,
    False,
    True,
)


def pair() -> tuple[socket.socket, socket.socket]:
    one, other = _socket.socketpair(_UNIX, _SEQPACKET)
    return adopt(one.detach()), adopt(other.detach())


def adopt(fd: int) -> socket.socket:
    """One end, by a descriptor that it owns from then on."""
    return socket.socket(_UNIX, _SEQPACKET, 0, fd)


def send(link: socket.socket, message: Message, fds: Sequence[int] = ()) -> bool:
    """Whether the peer was there. Raises BlockingIOError on a full non-blocking socket."""
    return send_bytes(link, _encoded(message), fds)


def send_bytes(link: socket.socket, data: bytes, fds: Sequence[int] = ()) -> bool:
    rights = b"".join([fd.to_bytes(4, sys.byteorder) for fd in fds])
    found = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if fds else []
    try:
        link.sendmsg([data], found, _NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def receive(link: socket.socket) -> tuple[Message | None, list[int]]:
    """The next message, or None once the peer is gone, or says what is none."""
    data, fds = receive_bytes(link)
    if (message := _read(data)) is None:
        for fd in fds:
            os.close(fd)
        return None, []
    return message, fds


def receive_bytes(link: socket.socket) -> tuple[bytes, list[int]]:
    """Empty once the peer is gone."""
    try:
        data, found, _flags, _peer = link.recvmsg(_MAX_MESSAGE, _RIGHTS_BYTES)
    except ConnectionResetError:
        return b"", []
    fds: list[int] = []
    for _level, _kind, raw in found:
        whole = len(raw) & ~3
        fds += [int.from_bytes(raw[at : at + 4], sys.byteorder) for at in range(0, whole, 4)]
    return data, fds


def _encoded(value: Message) -> bytes:
    return "".join(_pieces(value, 0)).encode()


def _read(data: bytes) -> Message | None:
    try:
        text = data.decode()
        message, end = _scan(text, 0)
    except (ValueError, RecursionError, StopIteration):
        return None
    return message if isinstance(message, dict) and end == len(text) else None


def to_memory(value: Message) -> int:
    """A descriptor of an anonymous file that holds *value*."""
    return memory_of(_encoded(value))


def memory_of(content: bytes) -> int:
    fd = os.memfd_create("madang", os.MFD_CLOEXEC)
    data = memoryview(content)
    while data:
        data = data[os.write(fd, data) :]
    return fd


def from_memory(fd: int) -> Message:
    """The value again; closes nothing, so that several processes can read it."""
    size = os.fstat(fd).st_size
    value: Message = _scan(os.pread(fd, size, 0).decode(), 0)[0]
    return value
