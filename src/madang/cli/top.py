"""``madang top``."""

from __future__ import annotations

import sys
import time

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.terminal import is_terminal
from madang.client.sync import Client
from madang.wire.session import Session, SessionStatus
from madang.wire.size import format_bytes, format_duration

_PERIOD_S = 2.0


@click.command()
@click.option("--once", is_flag=True, help="Print one table and stop.")
@json_option
def top(once: bool, as_json: bool) -> None:
    """Watch what running sessions use."""
    with connect() as client:
        before = _running(client)
        if as_json:
            print_json(list(before.values()))
            return
        if once or not is_terminal(1):
            _print(before, {})
            return
        _print(before, {})
        while True:
            time.sleep(_PERIOD_S)
            now = _running(client)
            sys.stdout.write("\x1b[H\x1b[2J")
            _print(now, before)
            sys.stdout.flush()
            before = now


def _running(client: Client) -> dict[str, Session]:
    return {session.id: session for session in client.list_sessions(status=SessionStatus.RUNNING)}


def _print(sessions: dict[str, Session], before: dict[str, Session]) -> None:
    rows = [_row(session, before.get(key)) for key, session in sessions.items()]
    print_table(("NAME", "CPU", "CPU TIME", "MEMORY", "PEAK", "PROCESSES", "DISK"), rows)


def _row(session: Session, before: Session | None) -> tuple[str, ...]:
    usage, size = session.usage, session.size
    if usage is None:
        return session.name, _standing(session) or "-", "-", "-", "-", "-", "-"
    return (
        session.name,
        _standing(session) or f"{_cores(session, before)} of {size.cpu:g}",
        "-" if usage.cpu_s is None else format_duration(usage.cpu_s),
        f"{_bytes(usage.mem_bytes)} of {format_bytes(size.mem_bytes)}",
        _bytes(usage.mem_peak_bytes),
        f"{'-' if usage.pids is None else usage.pids} of {size.pids}",
        f"{_bytes(usage.disk_bytes)} of {format_bytes(size.disk_bytes)}",
    )


def _standing(session: Session) -> str:
    """Since when it is frozen; empty if it is not."""
    if session.frozen_since is None:
        return ""
    return f"frozen {format_duration(max(0, round(time.time() - session.frozen_since)))}"


def _cores(session: Session, before: Session | None) -> str:
    """CPU in use between two looks, else since the start."""
    usage = session.usage
    if usage is None or usage.cpu_s is None:
        return "-"
    since, used = session.started_at or usage.at, 0.0
    if before is not None and before.usage is not None and before.usage.at < usage.at:
        since, used = before.usage.at, before.usage.cpu_s or 0.0
    passed = usage.at - since
    return f"{(usage.cpu_s - used) / passed:.2f}" if passed > 0 else "-"


def _bytes(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)
