"""How a program ended, and why, in words. Pure: from what was seen to ``Ended``."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from madang.agent.launcher.cgroups import Counters
from madang.wire.session import Ended, Reason
from madang.wire.size import Size, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Everything that is known at the end of a program."""

    status: int | None
    """As ``waitpid`` gives it; None: it was killed together with its init."""
    counters: Counters
    size: Size | None
    """None for an exec: then limits are not blamed."""
    stop: tuple[Reason, str] | None = None
    """What was asked for, by whom."""
    failure: tuple[int, str] | None = None
    """The program could not be executed: exit code and words."""
    disk_full: bool = False
    disk_used_bytes: int | None = None
    has_outputs: bool | None = None
    deadly: str = ""
    """Rules of its sandbox policy that kill, in words."""
    dropped_bytes: int = 0
    """Output that could not be kept because the disk under the log was full."""
    at: float = 0.0
    duration_s: float = 0.0


def derive(seen: Seen) -> Ended:
    """Blame in this order: a stop that was asked for, memory, processes, disk, signal, exit."""
    code, number = _exit(seen)
    reason, text = _blame(seen, code, number)
    notes = [text, *_notes(seen, reason)]
    return Ended(
        reason=reason,
        exit_code=code,
        signal=number,
        text="; ".join(note for note in notes if note),
        at=seen.at,
        duration_s=seen.duration_s,
        cpu_s=seen.counters.cpu_s,
        mem_peak_bytes=seen.counters.mem_peak_bytes,
        oom_kills=seen.counters.oom_kills,
        pids_denied=seen.counters.pids_denied,
        disk_used_bytes=seen.disk_used_bytes,
        disk_full=seen.disk_full,
        has_outputs=seen.has_outputs,
    )


def _exit(seen: Seen) -> tuple[int, int | None]:
    if seen.failure is not None:
        return seen.failure[0], None
    if seen.status is None:
        return 128 + signal.SIGKILL, signal.SIGKILL
    code = os.waitstatus_to_exitcode(seen.status)
    return (code, None) if code >= 0 else (128 - code, -code)


def _blame(seen: Seen, code: int, number: int | None) -> tuple[Reason, str]:
    counters, size = seen.counters, seen.size
    if seen.stop is not None:
        return seen.stop
    if seen.failure is not None:
        return Reason.EXIT, seen.failure[1]
    if size is not None:
        if number == signal.SIGKILL and counters.oom_kills:
            return Reason.OOM, _memory(counters, size)
        if code and counters.pids_denied:
            text = f"processes limit {size.pids} reached, {counters.pids_denied} refused"
            return Reason.PIDS, f"failed: {text}; ask for more with --pids"
        if code and seen.disk_full:
            text = f"failed: disk limit {format_bytes(size.disk_bytes)} reached"
            return Reason.DISK, f"{text}; ask for more with --disk"
    if number == signal.SIGSYS and seen.deadly:
        text = f"ended by signal {signal_name(number)}: the sandbox policy kills for {seen.deadly}"
        return Reason.SIGNAL, text
    if number is not None:
        return Reason.SIGNAL, f"ended by signal {signal_name(number)}"
    return Reason.EXIT, f"exit code {code}" if code else ""


def _memory(counters: Counters, size: Size) -> str:
    peak = counters.mem_peak_bytes
    told = f", peak {format_bytes(peak)}" if peak is not None else ""
    limit = format_bytes(size.mem_bytes)
    return f"killed: memory limit {limit} reached{told}; ask for more with --mem"


def _notes(seen: Seen, reason: Reason) -> list[str]:
    notes = []
    kills = seen.counters.oom_kills - (reason is Reason.OOM)
    if seen.size is not None and kills > 0:
        children = "1 child process was" if kills == 1 else f"{kills} child processes were"
        limit = format_bytes(seen.size.mem_bytes)
        notes.append(f"{children} killed for the memory limit {limit}")
    if seen.dropped_bytes:
        lost = format_bytes(seen.dropped_bytes)
        notes.append(f"{lost} of output were lost: the disk under the state folder was full")
    return notes


def signal_name(number: int) -> str:
    """``9 (SIGKILL)``"""
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)
