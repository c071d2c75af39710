"""Processes named so that a reused number never stands for another."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from typing import Final

_STAT_BYTES: Final = 4096


def say(text: str) -> None:
    """To the launcher's log, if it can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def stat_fields(pid: int) -> list[bytes] | None:
    """What ``/proc/PID/stat`` has after the name: state, parent, …; None if there is no such."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, _STAT_BYTES).rpartition(b")")[2].split()
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)


def children(pid: int) -> list[int]:
    """Of a process with one thread."""
    with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
        return [int(child) for child in file.read().split()]


def pss_bytes(pid: int) -> int:
    """Its memory, with its share of what others map too; slow for a large one."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            found = [line.split()[1] for line in file if line.startswith("Pss:")]
    except OSError:
        return 0
    return int(found[0]) * 1024 if found else 0


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process for ever: its number and when it began (clock ticks since boot)."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The living process *pid*, zombies left out."""
        fields = stat_fields(pid)
        if fields is None or fields[0] in {b"Z", b"X"}:
            return None
        return cls(pid, int(fields[19]))

    def open(self) -> int | None:
        """A pidfd of exactly this process, or None if it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if ProcessId.of(self.pid) == self:
            return fd
        os.close(fd)
        return None


def kill(pidfd: int, number: int = signal.SIGKILL) -> None:
    """Signal a process; no error if it is gone."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
