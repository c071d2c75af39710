"""Makes a child another user, with a view of the files that it needs.

Where the interpreter, the package or the state folder lie below a folder that the user can't enter
(``/root``), the child gets a mount namespace in which that folder is an empty tmpfs that holds only
the needed parts, at the same paths. Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable

import madang
from madang.agent.launcher import syscalls


def needed_paths(also: Iterable[str]) -> list[str]:
    """What a process of ours must reach: interpreter, libraries, package; outermost only."""
    executable = os.path.realpath(sys.executable)
    package = os.path.dirname(os.path.dirname(os.path.realpath(madang.__file__)))
    paths = {
        sys.prefix,
        sys.base_prefix,
        os.path.dirname(executable),
        package,
        *also,
        *(path for path in sys.path if os.path.isabs(path) and os.path.exists(path)),
    }
    return _outermost(path for path in paths if path != "/")


def closed_parents(paths: Iterable[str], uid: int) -> list[str]:
    """The outermost folders above *paths* that *uid*, in no group, can't pass."""
    closed = set()
    for path in paths:
        parent = os.path.dirname(path)
        while parent != "/":
            if not _passable(parent, uid):
                closed.add(parent)
            parent = os.path.dirname(parent)
    return _outermost(closed)


def _passable(path: str, uid: int) -> bool:
    found = os.stat(path)
    return bool(found.st_mode & (0o100 if found.st_uid == uid else 0o001))


def _outermost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(path == outer or path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def open_view(paths: list[str], closed: list[str]) -> None:
    """Let *paths* be reached through *closed* parents, in a mount namespace of our own."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, b"/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    hidden = [path for path in paths if any(path.startswith(top + "/") for top in closed)]
    held = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in hidden}
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    for top in closed:
        syscalls.mount(b"tmpfs", os.fsencode(top), b"tmpfs", flags, b"mode=755,size=1m")
    for path, fd in held.items():
        os.makedirs(path, mode=0o755, exist_ok=True)
        syscalls.bind(b"/proc/self/fd/%d" % fd, os.fsencode(path), recursive=True)
        os.close(fd)


def become(uid: int, gid: int) -> None:
    """Drop root for good; no way back through a set-user-id program."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    syscalls.no_new_privileges()


def die_with(parent: int, signum: int = signal.SIGTERM) -> None:
    """Get *signum* when *parent* dies, also if it has died already."""
    syscalls.die_with_parent(signum)
    if os.getppid() != parent:
        os._exit(0)
