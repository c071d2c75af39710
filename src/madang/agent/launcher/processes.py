"""Processes named so that a reused number never stands for another."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass


def say(text: str) -> None:
    """To the launcher's log, if it can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


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
