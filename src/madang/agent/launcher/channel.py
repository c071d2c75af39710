"""Small messages with descriptors between launcher, keeper and init; large ones in a memory file.

SEQPACKET sockets: a message arrives whole or not at all, and the end of the peer is seen at once.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

_MAX_MESSAGE = 64 * 1024
_MAX_FDS = 8


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(link: socket.socket, message: Message, fds: Sequence[int] = ()) -> bool:
    """Whether the peer was there. Raises BlockingIOError on a full non-blocking socket."""
    try:
        socket.send_fds(link, [json.dumps(message).encode()], list(fds), socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def receive(link: socket.socket) -> tuple[Message | None, list[int]]:
    """The next message, or None once the peer is gone, or says what is none."""
    try:
        data, fds, _flags, _peer = socket.recv_fds(link, _MAX_MESSAGE, _MAX_FDS)
    except ConnectionResetError:
        return None, []
    if (message := _read(data)) is None:
        for fd in fds:
            os.close(fd)
        return None, []
    return message, fds


def _read(data: bytes) -> Message | None:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def to_memory(value: Message) -> int:
    """A descriptor of an anonymous file that holds *value*."""
    fd = os.memfd_create("madang", os.MFD_CLOEXEC)
    data = memoryview(json.dumps(value).encode())
    while data:
        data = data[os.write(fd, data) :]
    return fd


def from_memory(fd: int) -> Message:
    """The value again; closes nothing, so that several processes can read it."""
    size = os.fstat(fd).st_size
    value: Message = json.loads(os.pread(fd, size, 0))
    return value
