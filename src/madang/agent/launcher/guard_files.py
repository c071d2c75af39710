"""Rules about files, kept by the guard: it is asked about each open on the session's mounts.

Files on mounts that are read-only for the session are asked about once, as long as the rules stay:
there, no name can come to mean another file. Mounts about which no rule says anything are not asked
about at all.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import fanotify, patterns, syscalls
from madang.agent.launcher.fanotify import EXECUTE, OPEN, Event
from madang.wire.errors import RuntimeFailed
from madang.wire.policy import Access, Answer, FileRule, Placed, strictest
from madang.wire.policy_live import FILES_NEEDED

_UNASKED_KINDS: Final = frozenset("proc sysfs cgroup cgroup2 devpts mqueue".split())
_UNASKED_PLACES: Final = ("/dev", "/proc", "/sys")
"""What the kernel makes up. /dev/shm is asked about."""
_SHARED_MEMORY: Final = "/dev/shm"
_DELETED: Final = " (deleted)"
_BITS: Final = {Access.OPEN: OPEN, Access.EXECUTE: EXECUTE}
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")

Tell = Callable[[Placed, str, str, int], None]
"""Called with the rule, what was tried, on what, and by which process (as we count)."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A rule that is ready to judge."""

    rule: FileRule
    access: int
    names: re.Pattern[str]

    def refuses(self, path: str, access: int) -> bool:
        if not self.access & access:
            return False
        return bool(self.names.fullmatch(path)) is not self.rule.others


@dataclass(frozen=True, slots=True)
class Mount:
    """One of the session's: a descriptor on it, and where the session sees it."""

    place: int
    path: str


def session_mounts(proc: int) -> list[Mount]:
    """The mounts that files can be opened on. *proc*: the ``/proc`` folder of its init.

    Raises OSError. What the session can change can't lead us elsewhere: no link is followed.
    """
    root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
    try:
        with open(os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as file:
            lines = file.read().splitlines()
        found: dict[int, Mount] = {}
        for line in lines:
            path, kind = _mount_of(line)
            if kind in _UNASKED_KINDS or _is_unasked(path):
                continue
            name = path.lstrip(b"/") or b"."
            place = syscalls.open_in_root(root, name, os.O_PATH | os.O_NOFOLLOW)
            number = _mount_id(place)
            if number in found:
                os.close(place)
            else:
                found[number] = Mount(place, os.fsdecode(path))
        return list(found.values())
    finally:
        os.close(root)


def _mount_of(line: bytes) -> tuple[bytes, str]:
    """(where it is mounted, its kind), of a line of mountinfo."""
    fields, _, rest = line.partition(b" - ")
    path = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), fields.split()[4])
    return path, rest.split()[0].decode("ascii", "replace")


def _is_unasked(path: bytes) -> bool:
    shown = os.fsdecode(path)
    if shown == _SHARED_MEMORY or shown.startswith(_SHARED_MEMORY + "/"):
        return False
    return any(shown == place or shown.startswith(place + "/") for place in _UNASKED_PLACES)


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    raise RuntimeFailed("the kernel does not tell on which mount a file lies")


class Files:
    """Answers the kernel. Nothing that a session does makes it wait."""

    def __init__(self, group: fanotify.Group, tell: Tell) -> None:
        self.group = group
        self._tell = tell
        self._mounts: list[Mount] = []
        self._marked: dict[Mount, int] = {}
        self._rules: tuple[_Ready, ...] = ()
        self._pids = ""

    def connect(self, proc: int) -> None:
        """Find the session's mounts; *proc* as in ``session_mounts``."""
        self._mounts = session_mounts(proc)
        self._pids = os.readlink("ns/pid", dir_fd=proc)

    def replace(self, rules: Iterable[FileRule]) -> None:
        """In force when it returns: what was cached of the former rules is forgotten."""
        self._rules = tuple(map(_ready, strictest(rules)))
        wanted = {mount: access for mount in self._mounts if (access := self._asked(mount))}
        for mount, access in wanted.items():
            if missing := access & ~self._marked.get(mount, 0):
                self.group.mark_mount(mount.place, missing)
        for mount, access in self._marked.items():
            if surplus := access & ~wanted.get(mount, 0):
                self.group.unmark_mount(mount.place, surplus)
        self._marked = wanted
        self.group.ask_again()

    def _asked(self, mount: Mount) -> int:
        """The kinds of access to a mount on which some rule has an opinion."""
        found = 0
        for each in self._rules:
            names = each.rule.patterns
            if each.rule.others:
                wanted = not any(patterns.holds_all_of(name, mount.path) for name in names)
            else:
                wanted = any(patterns.may_lie_under(name, mount.path) for name in names)
            found |= each.access if wanted else 0
        return found

    def ready(self) -> None:
        """Answer what waits."""
        for event in self.group.read():
            passes = False
            try:
                passes = self._judge(event)
            finally:
                self.group.answer(event, passes=passes)

    def _judge(self, event: Event) -> bool:
        try:
            path = _path_of(event.fd)
        except OSError:  # Deeper than the kernel can tell.
            return not self._rules
        rule = self._refusing(path, event.access)
        if rule is None:
            self._remember(event, path)
            return True
        what = Access.EXECUTE if event.access & EXECUTE else Access.OPEN
        self._tell(rule, what, path, event.pid)
        if rule.answer is Answer.KILL:
            self._kill(event.pid)
        return rule.answer is Answer.LOG

    def _refusing(self, path: str, access: int) -> FileRule | None:
        return next((each.rule for each in self._rules if each.refuses(path, access)), None)

    def _remember(self, event: Event, path: str) -> None:
        if os.fstatvfs(event.fd).f_flag & os.ST_RDONLY:
            passing = [bit for bit in (OPEN, EXECUTE) if self._refusing(path, bit) is None]
            self.group.ignore(event.fd, sum(passing))

    def _kill(self, pid: int) -> None:
        """The process waits for our answer; should it die meanwhile, its number may be reused."""
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == self._pids:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


def _ready(rule: FileRule) -> _Ready:
    names = (*rule.patterns, *FILES_NEEDED) if rule.others and not _logs(rule) else rule.patterns
    access = sum(_BITS[each] for each in set(rule.access))
    return _Ready(rule, access, patterns.compiled(names))


def _logs(rule: FileRule) -> bool:
    return rule.answer is Answer.LOG


def _path_of(fd: int) -> str:
    """As the session sees it. Who has deleted a file has not changed its name for us."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    if path.endswith(_DELETED) and os.fstat(fd).st_nlink == 0:
        return path.removesuffix(_DELETED)
    return path
