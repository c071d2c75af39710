"""System calls that Python has no function for, by ctypes; x86-64 and aarch64.

Each raises OSError like ``os`` does. Kernel 5.12 or newer.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable, Collection
from functools import cache
from typing import Any, Final

CLONE_NEWTIME: Final = 0x80
CLONE_PARENT: Final = 0x8000
CLONE_NEWNS: Final = 0x20000
CLONE_NEWCGROUP: Final = 0x2000000
CLONE_NEWUTS: Final = 0x4000000
CLONE_NEWIPC: Final = 0x8000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_NOATIME: Final = 1024
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_SET_NAME: Final = 15
PR_SET_SECCOMP: Final = 22
PR_CAPBSET_DROP: Final = 24
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

CAP_SYS_ADMIN: Final = 21
CLOSE_RANGE_CLOEXEC: Final = 4
LAST_CAP: Final = 63
"""One past the highest capability that can ever be; the kernel refuses those it lacks."""

_ARG_START, _ARG_END = 45, 46
"""Fields of ``/proc/PID/stat`` after the name."""
_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_AT_EMPTY_PATH: Final = 0x1000
_MOUNT_ATTR_IDMAP: Final = 0x100000
_OPEN_TREE_CLONE: Final = 0x1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_CAPABILITY_V3: Final = 0x20080522
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP_RUNNING: Final = 0x41

_NUMBERS: Final = {
    "x86_64": {"clone": 56, "pivot_root": 155, "capset": 126},
    "aarch64": {"clone": 220, "pivot_root": 41, "capset": 91},
}
_COMMON: Final = {
    "open_tree": 428, "move_mount": 429, "close_range": 436, "openat2": 437, "mount_setattr": 442,
}  # fmt: skip
"""Since Linux 5 new calls have one number everywhere."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.syscall.restype = ctypes.c_long


def number(name: str) -> int:
    """The number of a system call on this machine."""
    found = _COMMON.get(name)
    return found if found is not None else _NUMBERS[os.uname().machine][name]


def check(result: int, what: str = "") -> int:
    """Return *result*, or raise what ``errno`` says."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}" if what else os.strerror(code))
    return result


def mount(
    source: bytes | None,
    target: bytes,
    kind: bytes | None = None,
    flags: int = 0,
    data: bytes | None = None,
) -> None:
    result = _libc.mount(source, target, kind, flags, data)
    check(result, f"mount {os.fsdecode(source or kind or b'')} on {os.fsdecode(target)}")


def bind(source: bytes, target: bytes, *, recursive: bool = False) -> None:
    mount(source, target, None, MS_BIND | (MS_REC if recursive else 0))


def umount(target: bytes, flags: int = MNT_DETACH | UMOUNT_NOFOLLOW) -> None:
    check(_libc.umount2(target, flags), f"umount {os.fsdecode(target)}")


def mount_setattr(path: bytes, attributes: int, *, recursive: bool = True) -> None:
    """Add MOUNT_ATTR_* to the mount at *path* and, if *recursive*, to all below."""
    data = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(number("mount_setattr"), _AT_FDCWD, path, flags, data, len(data))
    check(result, f"mount_setattr {os.fsdecode(path)}")


def map_owners(tree: int, namespace: int) -> None:
    """Show what ``open_tree`` gave with the owners that the user *namespace* makes of them."""
    data = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
    result = _libc.syscall(
        number("mount_setattr"), tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, data, len(data)
    )
    check(result, "mount_setattr")


def open_tree(path: bytes) -> int:
    """A copy of the mounts at *path* and below, attached nowhere."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    result: int = _libc.syscall(number("open_tree"), _AT_FDCWD, path, flags)
    return check(result, f"open_tree {os.fsdecode(path)}")


def clone_mount(path: bytes) -> int:
    """A descriptor of what is mounted at *path*, once more: mounted nowhere yet."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_SYMLINK_NOFOLLOW
    result = _libc.syscall(number("open_tree"), _AT_FDCWD, path, flags)
    return check(result, f"open_tree {os.fsdecode(path)}")


def move_mount(fd: int, target: bytes) -> None:
    """Mount what ``clone_mount`` or ``open_tree`` gave, in whatever mount namespace we are in."""
    result = _libc.syscall(
        number("move_mount"), fd, b"", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH
    )
    check(result, f"move_mount to {os.fsdecode(target)}")


def pivot_root(new: bytes, old: bytes) -> None:
    check(_libc.syscall(number("pivot_root"), new, old), f"pivot_root {os.fsdecode(new)}")


def unshare(flags: int) -> None:
    check(_libc.unshare(flags), f"unshare {flags:#x}")


def setns(fd: int, flags: int) -> None:
    check(_libc.setns(fd, flags), f"setns {flags:#x}")


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    return check(_libc.prctl(option, a, b, c, d), f"prctl {option}")


def die_with_parent(number: int) -> None:
    """Get signal *number* when the parent dies; cleared by every change of uid."""
    prctl(PR_SET_PDEATHSIG, number)


def sethostname(name: bytes) -> None:
    check(_libc.sethostname(name, len(name)), "sethostname")


def fork_sibling(flags: int = 0) -> int:
    """Fork a child of our parent; 0 in the child. No handler of a fork runs, in C nor in Python."""
    flags |= CLONE_PARENT | signal.SIGCHLD
    return check(_libc.syscall(number("clone"), flags, None, None, None, None), "clone")


def drop_bounding_set(kept: Collection[int] = ()) -> None:
    """No program that is executed later can gain a capability; while still privileged."""
    for capability in range(LAST_CAP + 1):
        if capability not in kept and _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break


def drop_capabilities(kept: Collection[int] = ()) -> None:
    """Empty the ambient and inheritable sets, the permitted and effective ones but for *kept*."""
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    keep_capabilities(kept)


def keep_capabilities(kept: Collection[int], *, ambient: bool = False) -> None:
    """No others; the *ambient* ones survive an execution by an ordinary user."""
    header = struct.pack("=Ii", _CAPABILITY_V3, 0)
    low = sum(1 << capability for capability in kept)  # All that we name are below 32.
    sets = struct.pack("=6I", low, low, low * ambient, 0, 0, 0)
    check(_libc.syscall(number("capset"), header, sets), "capset")
    for capability in kept if ambient else ():
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def become(uid: int, capability: int) -> None:
    """An ordinary user, who keeps one capability for good and can gain no other."""
    drop_bounding_set()
    prctl(PR_SET_KEEPCAPS, 1)
    change_user(uid)
    header = struct.pack("=Ii", _CAPABILITY_V3, 0)
    low, high = divmod(1 << capability, 1 << 32)[::-1]
    sets = struct.pack("=6I", low, low, 0, high, high, 0)  # Effective, permitted, inheritable.
    check(_libc.syscall(number("capset"), header, sets), "capset")


def change_user(uid: int) -> None:
    """Be *uid*, in the group of the same number and no other, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def no_new_privileges() -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def install_filter(program: bytes) -> None:
    """Install a seccomp program, an array of ``sock_filter``; needs no_new_privileges."""
    header = struct.pack("HxxxxxxQ", len(program) // 8, _address(program))
    prctl(PR_SET_SECCOMP, 2, _address(header))


def close_on_exec_from(first: int) -> None:
    """Mark every descriptor from *first* on as close-on-exec."""
    _close_range(first, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC)


def close_all_but(*kept: int) -> None:
    """Close every descriptor but *kept* and the standard three."""
    first = 3
    for fd in (*sorted(k for k in kept if k > 2), 1 << 31):
        if fd > first:
            _close_range(first, fd - 1, 0)
        first = fd + 1


def _close_range(first: int, last: int, flags: int) -> None:
    arguments = ctypes.c_uint(first), ctypes.c_uint(last), flags
    check(_libc.syscall(number("close_range"), *arguments), "close_range")


def loopback_up() -> None:
    """Bring ``lo`` up: in a new network namespace it is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", _IFF_UP_RUNNING)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)


def set_process_name(name: str) -> None:
    """At most 15 bytes; what ``ps``, ``/proc/PID/comm`` and ``/proc/PID/cmdline`` show.

    The command line that we were started with goes: every session sees its init's, and it tells
    paths and settings of the platform.
    """
    text = name.encode()
    short = text[:15]
    prctl(PR_SET_NAME, _address(short))
    start, end = _arguments()
    if start:
        ctypes.memmove(start, text[: end - start - 1].ljust(end - start, b"\0"), end - start)


@cache
def _arguments() -> tuple[int, int]:
    """Where our command line lies; in forks it is the same."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[_ARG_START]), int(fields[_ARG_END])


def _address(text: bytes) -> int:
    """Of its bytes, while it lives. ``create_string_buffer`` would make a type for each length."""
    return ctypes.c_void_p.from_buffer(ctypes.c_char_p(text)).value or 0


DEFAULT: Final = int(signal.SIG_DFL)
IGNORE: Final = int(signal.SIG_IGN)


def handle(number: int, action: Callable[[int, Any], object] | int) -> None:
    """``signal.signal`` without its enumerations: a fork copies a quarter of a MiB for those."""
    _signal.signal(number, action)


RESOLVE_NO_MAGICLINKS: Final = 0x2
RESOLVE_IN_ROOT: Final = 0x10
_BELOW: Final = 0x1 | RESOLVE_NO_MAGICLINKS | 0x4 | 0x8  # NO_XDEV, NO_SYMLINKS, BENEATH


def open_in_root(root: int, path: bytes, flags: int) -> int:
    """Open *path* as if the folder *root* were ``/``: no link and no ``..`` leads out of it."""
    return _open(root, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def open_below(folder: int, path: bytes, flags: int) -> int:
    """Open *path* in *folder*, on its mount and without any link. Raises OSError."""
    return _open(folder, path, flags, _BELOW)


def _open(root: int, path: bytes, flags: int, resolve: int) -> int:
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    while True:
        result = _libc.syscall(number("openat2"), root, path, how, len(how))
        if result >= 0 or ctypes.get_errno() != errno.EAGAIN:
            return int(check(result, os.fsdecode(path)))
        # Something was renamed meanwhile and the kernel could not be sure.
