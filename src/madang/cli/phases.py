"""Telling how a session comes to life and how it ended, in lines for people."""

from __future__ import annotations

import time

from madang.cli.terminal import Notes
from madang.wire import exits
from madang.wire.session import Ended, Idle, Pending, Reason, Result, Session, SessionStatus
from madang.wire.size import Size, format_bytes, format_duration

_WAITED_S = 0.15
_NOT_STARTED = frozenset({126, 127})
"""Exit codes of programs that can't be executed, as shells have them."""


def describe_size(size: Size) -> str:
    """``1 CPU · 512 MiB · 256 processes · 10 GiB disk · ends after 2h``."""
    parts = [
        f"{size.cpu:g} CPU",
        f"{format_bytes(size.mem_bytes)} memory",
        f"{size.pids} processes",
        f"{format_bytes(size.disk_bytes)} disk",
    ]
    if size.time_s is not None:
        parts.append(f"at most {format_duration(size.time_s)}")
    return " · ".join(parts)


def describe_idle(name: str, idle: Idle) -> str:
    """``no output or input for 50m: will be stopped at 13:40; `madang protect …` keeps it``."""
    at = clock_time(idle.stop_at)
    return f"{idle.text}: will be stopped at {at}; `madang protect {name}` keeps it"


def clock_time(at: float) -> str:
    """``13:40:05``, with the day where it is not today."""
    when = time.localtime(at)
    today = when[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M", when)


class Phases:
    """Prints each step of a session's start once, and draws what it waits for."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._session: Session | None = None
        self._since = time.monotonic()
        self._told: set[str] = set()
        self._started = False
        self._warned = False

    def show(self, session: Session) -> None:
        """Take a new state of the session."""
        if self._session is None:
            self._notes.line(
                "plan", f"{session.name} · {session.image} · {describe_size(session.size)}"
            )
        self._session = session
        if session.pending is not None and session.status is SessionStatus.PENDING:
            self._once("queue", session.pending.text)
        if session.started_at is not None and not self._started:
            self._started = True
            self._show_start(session)
        for warning in session.warnings:
            self._once("note", warning)
        self._show_idle(session)

    def tick(self) -> None:
        """Redraw the live line."""
        session = self._session
        if session is None or self._started or session.ended is not None:
            return
        what = "waits" if session.status is SessionStatus.PENDING else "is being set up"
        reason = (
            f" for: {session.pending.text}{_starts(session.pending)}" if session.pending else ""
        )
        elapsed = format_duration(time.monotonic() - self._since)
        self._notes.live("start", f"{session.name} {what}{reason} · {elapsed}")

    def _show_idle(self, session: Session) -> None:
        if session.idle is not None:
            self._once("idle", describe_idle(session.name, session.idle))
        elif self._warned and session.ended is None:
            until = session.protected_until
            kept = f"protected until {clock_time(until)}" if until else "in use again"
            self._notes.line("idle", f"{session.name} is {kept}: it goes on")
        self._warned = session.idle is not None

    def _once(self, label: str, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._notes.line(label, text)

    def _show_start(self, session: Session) -> None:
        waited = sum(
            (phase.ended_at or phase.started_at) - phase.started_at
            for phase in session.phases
            if phase.name == "queue"
        )
        if waited > _WAITED_S:
            self._notes.line("queue", f"✓ {format_duration(waited)}")
        assert session.started_at is not None
        took = max(0.0, session.started_at - session.created_at - waited)
        self._notes.line("start", f"{session.image} ✓ {format_duration(took)}")


def _starts(pending: Pending) -> str:
    from madang.cli.queue import describe_estimate  # only who waits needs it

    estimate = describe_estimate(pending)
    return "" if estimate is None else f" Starts {estimate}"


def describe_end(ended: Ended, size: Size | None = None) -> str:
    """``exit 0 · 3m12s · CPU 2m · memory peak 5.1 GiB of 8 GiB``."""
    parts = [_how(ended), format_duration(ended.duration_s)]
    if ended.cpu_s is not None:
        parts.append(f"CPU {format_duration(ended.cpu_s)}")
    if ended.mem_peak_bytes is not None:
        limit = f" of {format_bytes(size.mem_bytes)}" if size is not None else ""
        parts.append(f"memory peak {format_bytes(ended.mem_peak_bytes)}{limit}")
    return " · ".join(parts)


def _how(ended: Ended) -> str:
    if ended.reason is Reason.EXIT and ended.exit_code is not None:
        return f"exit {ended.exit_code}"
    words = ended.reason.value.replace("_", " ")
    return words if ended.exit_code is None else f"{words} (exit {ended.exit_code})"


def show_end(notes: Notes, session: Session) -> None:
    """The closing lines."""
    ended = session.ended
    if ended is None:
        notes.line("ended", f"{session.name} was stopped before it began.")
        return
    labels = {Result.SUCCESS: "done", Result.CANCELLED: "ended", Result.LOST: "lost"}
    fine = exits.of_ended(ended) == 0
    label = labels.get(session.result, "failed") if session.result else "done" if fine else "failed"
    notes.line(label, describe_end(ended, session.size))
    if explanation := explain_end(ended):
        notes.line("why", explanation)
    elif ended.exit_code in _NOT_STARTED and not ended.text.startswith("exit code"):
        notes.error(ended.text)


def explain_end(ended: Ended) -> str:
    """The end in words, where it was more than the program's own exit."""
    limited = ended.oom_kills or ended.pids_denied or ended.disk_full
    return ended.text if ended.reason is not Reason.EXIT or limited else ""
