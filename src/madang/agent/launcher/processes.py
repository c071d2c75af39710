"""Processes named so that a reused number never stands for another."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process for ever: its number and when it began (clock ticks since boot)."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The living process *pid*, zombies left out."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in {b"Z", b"X"} else cls(pid, int(fields[19]))

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
