"""fanotify: the kernel asks before it opens a file, and waits for the answer.

Asked is about the object that a path has led to; who could still change the path is too late. A
group that is closed lets everything pass that waits, and whatever comes: see ``guard``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import syscalls

OPEN: Final = 0x10000
EXECUTE: Final = 0x40000

_CLOEXEC, _NONBLOCK, _CONTENT, _UNLIMITED_QUEUE, _UNLIMITED_MARKS = 0x1, 0x2, 0x4, 0x10, 0x20
_EVENT_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | 0o100000
"""Not to wait for the other end of a FIFO. 0o100000: O_LARGEFILE."""
_ADD, _REMOVE, _MOUNT, _IGNORED, _FLUSH, _EVICTABLE = 0x1, 0x2, 0x10, 0x20, 0x80, 0x200
_IGNORE_ENTRIES: Final = 0x8 | 0x40 | 0x200 | 0x400
"""ONLYDIR, IGNORED_SURV_MODIFY, EVICTABLE and IGNORE, which heeds ON_CHILD."""
_ON_CHILD: Final = 0x0800_0000
_AT_FDCWD: Final = -100
_ALLOW, _DENY = 1, 2
_METADATA: Final = struct.Struct("=IBBHQii")
_RESPONSE: Final = struct.Struct("=iI")
_READ_BYTES: Final = _METADATA.size * 256

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = [
    *(ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p),
]


@dataclass(frozen=True, slots=True)
class Event:
    """Somebody waits for the answer. ``fd`` is the object, ours to close."""

    fd: int
    access: int
    """OPEN or EXECUTE."""
    pid: int
    """As our PID namespace counts."""


def possible() -> bool:
    """Whether this kernel asks us: takes CAP_SYS_ADMIN outside of any user namespace."""
    try:
        os.close(Group().fileno())
    except OSError:
        return False
    return True


class Group:
    """A queue of questions, and the marks that say about what to ask."""

    def __init__(self) -> None:
        """Raises OSError."""
        flags = _CLOEXEC | _NONBLOCK | _CONTENT | _UNLIMITED_QUEUE | _UNLIMITED_MARKS
        result = _libc.fanotify_init(flags, _EVENT_FLAGS)
        self._fd = syscalls.check(result, "fanotify_init")
        self._evictable = _EVICTABLE

    def fileno(self) -> int:
        return self._fd

    def mark_mount(self, place: int, access: int) -> None:
        """Ask about *access* (bits) on the mount that *place*, any descriptor, lies on."""
        path = b"/proc/self/fd/%d" % place
        result = _libc.fanotify_mark(self._fd, _ADD | _MOUNT, access, _AT_FDCWD, path)
        syscalls.check(result, "fanotify_mark")

    def unmark_mount(self, place: int, access: int) -> None:
        path = b"/proc/self/fd/%d" % place
        result = _libc.fanotify_mark(self._fd, _REMOVE | _MOUNT, access, _AT_FDCWD, path)
        if result < 0 and ctypes.get_errno() != errno.ENOENT:
            syscalls.check(result, "fanotify_mark")

    def ignore(self, fd: int, access: int) -> None:
        """Don't ask about this file again until it is changed, or ``ask_again``."""
        flags = _ADD | _IGNORED | self._evictable
        result = _libc.fanotify_mark(self._fd, flags, access, fd, None)
        if result < 0 and self._evictable and ctypes.get_errno() == errno.EINVAL:
            self._evictable = 0  # Before Linux 5.19.
            self.ignore(fd, access)

    def ignore_entries(self, folder: int) -> bool:
        """Don't ask about what lies directly in *folder*, any descriptor, until ``ask_again``.

        False: not before Linux 6.0.
        """
        path = b"/proc/self/fd/%d" % folder
        mask = OPEN | EXECUTE | _ON_CHILD
        return not _libc.fanotify_mark(self._fd, _ADD | _IGNORE_ENTRIES, mask, _AT_FDCWD, path)

    def ask_again(self) -> None:
        """Forget what is ignored."""
        syscalls.check(_libc.fanotify_mark(self._fd, _FLUSH, 0, _AT_FDCWD, None), "fanotify_mark")

    def read(self) -> Iterator[Event]:
        """The questions that wait. One whose object can't be opened is refused by the kernel."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except OSError:
            return
        at = 0
        while at < len(data):
            length, _, _, _, mask, fd, pid = _METADATA.unpack_from(data, at)
            at += length
            if fd >= 0:
                yield Event(fd, mask & (OPEN | EXECUTE), pid)

    def answer(self, event: Event, *, passes: bool) -> None:
        """Who waited may be gone."""
        try:
            os.write(self._fd, _RESPONSE.pack(event.fd, _ALLOW if passes else _DENY))
        except FileNotFoundError:
            pass
        finally:
            os.close(event.fd)
