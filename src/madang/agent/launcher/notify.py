"""seccomp's user notification: a filter that hands calls over, and who answers them.

No argument that is an address is ever looked at, so that a call can go on (``pass_on``) without a
race: what is decided on can't be changed by a second thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import platform
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import syscalls
from madang.wire.syscalls import numbers

_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER, _GET_NOTIF_SIZES = 1, 3
_NEW_LISTENER, _WAIT_KILLABLE = 1 << 3, 1 << 5
_RECEIVE, _SEND, _IS_VALID = 0xC0502100, 0xC0182101, 0x40082102
_CONTINUE: Final = 1
_REQUEST: Final = struct.Struct("=QIIiIQ6Q")
_RESPONSE: Final = struct.Struct("=QqiI")

_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_INSTRUCTION: Final = struct.Struct("<HBBI")
_ARGS_OFFSET: Final = 16
CLONE_THREAD: Final = 0x10000
MAX_CALLS: Final = 250
"""That can be handed over: what one jump can pass over."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def possible() -> bool:
    sizes = ctypes.create_string_buffer(6)
    number = _SECCOMP.get(platform.machine(), -1)
    return bool(_libc.syscall(number, _GET_NOTIF_SIZES, 0, sizes) == 0)


def known(calls: Collection[str]) -> dict[int, str]:
    """Those that this machine has: number → name."""
    table = numbers(platform.machine())
    return {table[call]: call for call in calls if call in table}


def program(calls: Collection[str]) -> bytes:
    """Hands *calls* over and lets others pass. The start of a thread is never handed over."""
    wanted = sorted(known(calls))
    clone = numbers(platform.machine())["clone"]
    lines = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCH[platform.machine()]),
        (_RETURN, 0, 0, _ALLOW),  # The main filter kills those.
        (_LOAD, 0, 0, 0),
    ]
    if clone in wanted:
        lines += [
            (_EQUAL, 0, 4, clone),
            (_LOAD, 0, 0, _ARGS_OFFSET),
            (_ANY_BIT, 0, 1, CLONE_THREAD),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _NOTIFY),
        ]
        wanted.remove(clone)
    lines += [
        (_EQUAL, len(wanted) - at, 0, number) for at, number in enumerate(wanted)
    ]  # To the last line.
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _NOTIFY)]
    return b"".join(_INSTRUCTION.pack(*line) for line in lines)


def install(calls: Collection[str]) -> int:
    """Put the filter on the calling thread and its children; its listener. Raises OSError.

    From then on *calls* wait for who has the listener; without anybody they fail with ENOSYS.
    """
    made = program(calls)
    code = ctypes.create_string_buffer(made, len(made))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(made) // _INSTRUCTION.size, ctypes.addressof(code))
    )
    number = _SECCOMP[platform.machine()]
    result = _libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE, header)
    if result < 0 and ctypes.get_errno() == errno.EINVAL:  # Before Linux 5.19.
        result = _libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER, header)
    return int(syscalls.check(result, "seccomp"))


@dataclass(frozen=True, slots=True)
class Request:
    """A thread waits for what its call gives."""

    id: int
    tid: int
    """As our PID namespace counts."""
    number: int
    arguments: tuple[int, ...]


class Listener:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def receive(self) -> Request | None:
        """None: who asked has gone."""
        data = bytearray(_REQUEST.size)
        try:
            fcntl.ioctl(self._fd, _RECEIVE, data)
        except OSError:
            return None
        number, tid, _, call, _, _, *arguments = _REQUEST.unpack(data)
        return Request(number, tid, call, tuple(arguments))

    def still_waits(self, request: Request) -> bool:
        """Whether ``tid`` is still the thread that asked."""
        try:
            fcntl.ioctl(self._fd, _IS_VALID, struct.pack("=Q", request.id))
        except OSError:
            return False
        return True

    def pass_on(self, request: Request) -> None:
        """The kernel does the call."""
        self._send(request, 0, 0, _CONTINUE)

    def fail(self, request: Request, code: int) -> None:
        self._send(request, 0, -code, 0)

    def give(self, request: Request, value: int) -> None:
        """The call has given *value*."""
        self._send(request, value, 0, 0)

    def _send(self, request: Request, value: int, error: int, flags: int) -> None:
        data = bytearray(_RESPONSE.pack(request.id, value, error, flags))
        try:
            fcntl.ioctl(self._fd, _SEND, data)
        except OSError as exc:
            if exc.errno != errno.ENOENT:  # Else: who asked has gone.
                raise
