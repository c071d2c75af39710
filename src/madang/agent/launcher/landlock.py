"""Landlock: a process gives up for good, for itself and its children, what it never needs.

Used for where files may be changed, made and removed. It does not cover modes, owners, times and
extended attributes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from madang.agent.launcher import syscalls

LEAST_ABI: Final = 3
"""Linux 6.2: before, files could be cut short anywhere."""
MAX_DOMAINS: Final = 16
"""What the kernel stacks."""
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_TELL_VERSION, _PATH_BENEATH = 1, 1
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_CHANGE_FOLDER: Final = sum(1 << bit for bit in range(4, 14))
"""Remove and make entries of any kind, and move them to another folder."""
_CHANGE_FILE: Final = _WRITE_FILE | _TRUNCATE
_DEVICES: Final = ("/dev", "/proc")
"""Existing ones can always be written to."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def abi() -> int:
    """What this kernel knows; 0: it has no Landlock, or it is switched off."""
    return max(0, int(_libc.syscall(_CREATE, None, ctypes.c_size_t(0), _TELL_VERSION)))


def restrict(folders: Iterable[str]) -> None:
    """From now on change files only in *folders*; takes no_new_privileges. Raises OSError.

    A folder that is missing can't be made later either.
    """
    handled = struct.pack("=Q", _CHANGE_FILE | _CHANGE_FOLDER)
    rules = syscalls.check(_libc.syscall(_CREATE, handled, ctypes.c_size_t(8), 0), "landlock")
    try:
        for path in _DEVICES:
            _allow(rules, path, _CHANGE_FILE)
        for path in folders:
            with contextlib.suppress(FileNotFoundError):
                _allow(rules, path, _CHANGE_FILE | _CHANGE_FOLDER)
        syscalls.check(_libc.syscall(_RESTRICT, rules, 0), "landlock")
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _CHANGE_FILE
        rule = struct.pack("=Qi", rights, fd)
        syscalls.check(_libc.syscall(_ADD, rules, _PATH_BENEATH, rule, 0), "landlock")
    finally:
        os.close(fd)
