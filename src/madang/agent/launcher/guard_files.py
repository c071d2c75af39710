"""Rules about files, kept by the guard: it is asked about each open on the session's mounts.

Where the session can change nothing, no name can come to mean another file, so there it is asked
about a folder once: if no rule speaks of anything in it, the kernel asks no more about what lies in
it, otherwise no more about the file. Until the rules change. Mounts about which no rule says
anything are not asked about at all.
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
from madang.agent.launcher.guard_mounts import Mount, mount_under, session_mounts
from madang.wire.policy import Access, Answer, FileRule, Placed, strictest
from madang.wire.policy_live import FILES_NEEDED

_DELETED: Final = " (deleted)"
MAX_FOLDERS: Final = 4096
"""What is known about folders is forgotten beyond."""
_BITS: Final = {Access.OPEN: OPEN, Access.EXECUTE: EXECUTE}

Tell = Callable[[Placed, str, str, int], None]
"""Called with the rule, what was tried, on what, and by which process (as we count)."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A rule that is ready to judge."""

    rule: FileRule
    access: int
    names: re.Pattern[str]
    folders: re.Pattern[str]
    """Of which it may refuse an entry; with ``others``: of which it refuses none."""

    def refuses(self, path: str, access: int) -> bool:
        if not self.access & access:
            return False
        return bool(self.names.fullmatch(path)) is not self.rule.others

    def speaks_of(self, folder: str) -> bool:
        """Whether it may refuse anything that lies directly in it."""
        return bool(self.folders.fullmatch(folder)) is not self.rule.others


@dataclass(frozen=True, slots=True)
class _Folder:
    mount: Mount | None
    """That it lies on, by its name."""
    spoken_of: bool


class Files:
    """Answers the kernel. Nothing that a session does makes it wait."""

    def __init__(self, group: fanotify.Group, tell: Tell) -> None:
        self.group = group
        self._tell = tell
        self._mounts: list[Mount] = []
        self._mount_points: dict[str, Mount] = {}
        self._marked: dict[Mount, int] = {}
        self._rules: tuple[_Ready, ...] = ()
        self._folders: dict[str, _Folder] = {}
        """What the rules say to them."""
        self._by_folder = True
        self._pids = ""

    def connect(self, proc: int) -> None:
        """Find the session's mounts; *proc* as in ``session_mounts``."""
        self._mounts = session_mounts(proc)
        self._mount_points = {mount.path: mount for mount in self._mounts}
        self._pids = os.readlink("ns/pid", dir_fd=proc)

    def replace(self, rules: Iterable[FileRule]) -> None:
        """In force when it returns: what was cached of the former rules is forgotten."""
        self._rules = tuple(map(_ready, strictest(rules)))
        self._folders.clear()
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
        folder = self._folder(os.path.dirname(path))
        rule = self._refusing(path, event.access) if folder.spoken_of else None
        if rule is None:
            self._remember(event, path, folder)
            return True
        what = Access.EXECUTE if event.access & EXECUTE else Access.OPEN
        self._tell(rule, what, path, event.pid)
        if rule.answer is Answer.KILL:
            self._kill(event.pid)
        return rule.answer is Answer.LOG

    def _folder(self, path: str) -> _Folder:
        found = self._folders.get(path)
        if found is None:
            if len(self._folders) >= MAX_FOLDERS:
                self._folders.clear()
            spoken_of = any(each.speaks_of(path) for each in self._rules)
            found = self._folders[path] = _Folder(mount_under(self._mounts, path), spoken_of)
        return found

    def _refusing(self, path: str, access: int) -> FileRule | None:
        return next((each.rule for each in self._rules if each.refuses(path, access)), None)

    def _remember(self, event: Event, path: str, folder: _Folder) -> None:
        mount = self._mount_points.get(path, folder.mount)
        if mount is None or not mount.still:
            return
        if not folder.spoken_of and mount is folder.mount and self._ignore_all_beside(path, mount):
            return
        passing = [bit for bit in (OPEN, EXECUTE) if self._refusing(path, bit) is None]
        self.group.ignore(event.fd, sum(passing))

    def _ignore_all_beside(self, path: str, mount: Mount) -> bool:
        """False: this kernel can't, or there is no such folder any more."""
        if not self._by_folder:
            return False
        name = os.path.dirname(path)[len(mount.path) :].lstrip("/") or "."
        try:
            folder = syscalls.open_below(mount.place, os.fsencode(name), os.O_PATH)
        except OSError:
            return False
        try:
            self._by_folder = self.group.ignore_entries(folder)
        finally:
            os.close(folder)
        return self._by_folder

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
    folders_of = patterns.folders_held if rule.others else patterns.folders_of
    folders = patterns.compiled(each for name in names for each in folders_of(name))
    return _Ready(rule, access, patterns.compiled(names), folders)


def _logs(rule: FileRule) -> bool:
    return rule.answer is Answer.LOG


def _path_of(fd: int) -> str:
    """As the session sees it. Who has deleted a file has not changed its name for us."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    if path.endswith(_DELETED) and os.fstat(fd).st_nlink == 0:
        return path.removesuffix(_DELETED)
    return path
