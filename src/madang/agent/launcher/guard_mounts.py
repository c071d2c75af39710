"""A session's mounts, as its guard sees them from outside."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import syscalls
from madang.wire.errors import RuntimeFailed

_UNASKED_KINDS: Final = frozenset("proc sysfs cgroup cgroup2 devpts mqueue".split())
_UNASKED_PLACES: Final = ("/dev", "/proc", "/sys")
"""What the kernel makes up. /dev/shm is asked about."""
_SHARED_MEMORY: Final = "/dev/shm"
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One of the session's: a descriptor on it, and where the session sees it."""

    place: int
    path: str
    still: bool
    """The session can't change what lies there, by this mount or by another of its own: no name
    comes to mean another file, and no file has a name elsewhere."""


@dataclass(frozen=True, slots=True)
class _Line:
    """Of mountinfo."""

    number: int
    device: bytes
    root: bytes
    """What of the device is mounted: a path in it."""
    path: bytes
    kind: str
    read_only: bool

    def shares(self, other: _Line) -> bool:
        """Whether some file may lie on both."""
        return self.device == other.device and (
            _lies_in(self.root, other.root) or _lies_in(other.root, self.root)
        )


def session_mounts(proc: int) -> list[Mount]:
    """The mounts that files can be opened on. *proc*: the ``/proc`` folder of its init.

    Raises OSError. What the session can change can't lead us elsewhere: no link is followed.
    """
    root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
    try:
        with open(os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as file:
            lines = {line.number: line for line in map(_parsed, file.read().splitlines())}
        found: dict[int, Mount] = {}
        for line in lines.values():
            if line.kind in _UNASKED_KINDS or _is_unasked(line.path):
                continue
            name = line.path.lstrip(b"/") or b"."
            place = syscalls.open_in_root(root, name, os.O_PATH | os.O_NOFOLLOW)
            number = _mount_id(place)
            if number in found or number not in lines:
                os.close(place)  # Seen is the mount that covers it.
            else:
                still = _is_still(lines[number], lines.values())
                found[number] = Mount(place, os.fsdecode(line.path), still)
        return list(found.values())
    finally:
        os.close(root)


def _parsed(line: bytes) -> _Line:
    fields, _, rest = line.partition(b" - ")
    number, _, device, root, path, options, *_ = fields.split()
    return _Line(
        number=int(number),
        device=device,
        root=_unescaped(root),
        path=_unescaped(path),
        kind=rest.split()[0].decode("ascii", "replace"),
        read_only=b"ro" in options.split(b","),
    )


def _unescaped(path: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), path)


def _is_still(line: _Line, lines: Iterable[_Line]) -> bool:
    return line.read_only and not any(line.shares(each) for each in lines if each is not line)


def _lies_in(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def _is_unasked(path: bytes) -> bool:
    return not _lies_in(path, os.fsencode(_SHARED_MEMORY)) and any(
        _lies_in(path, os.fsencode(place)) for place in _UNASKED_PLACES
    )


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    raise RuntimeFailed("the kernel does not tell on which mount a file lies")


def mount_under(mounts: Sequence[Mount], path: str) -> Mount | None:
    """The one that *path* lies on, by its name."""
    over = [each for each in mounts if path == each.path or path.startswith(_prefix(each.path))]
    return max(over, key=lambda each: len(each.path), default=None)


def _prefix(path: str) -> str:
    return path.rstrip("/") + "/"
