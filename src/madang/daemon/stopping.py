"""``madang down``: ends a platform by what its state folder says, and makes sure of it."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Final

import click

from madang.agent.launcher.processes import ProcessId, kill
from madang.client import Client
from madang.daemon.state import read_running
from madang.daemon.sweeping import kernel_processes
from madang.wire.errors import Conflict, Forbidden, NotFound, PlatformError
from madang.wire.session import SessionStatus

SUPERVISOR_S: Final = 25.0
"""More than the supervisor gives its own children."""
KILL_S: Final = 5.0


def down(state: str, *, keep_sessions: bool, timeout_s: float) -> int:
    """Stop everything that runs on the state folder; exit code 1 if something is left."""
    running = read_running(state)
    if running is not None:
        _check_may(state)
        if running.url and not keep_sessions:
            _stop_sessions(state, running.url, timeout_s)
        _end(ProcessId(running.pid, running.born), signal.SIGTERM, SUPERVISOR_S)
        for pid, started in running.children:
            _end(ProcessId(pid, started), signal.SIGKILL, KILL_S)
    if not keep_sessions:
        for process in kernel_processes(state):
            _end(process, signal.SIGKILL, KILL_S)
    return _verdict(state, started=running is not None, keep_sessions=keep_sessions)


def _check_may(state: str) -> None:
    owner = os.stat(state).st_uid
    if os.geteuid() not in {0, owner}:
        raise Forbidden(f"{state} belongs to user {owner}; only they and root may stop it.")


def _stop_sessions(state: str, url: str, timeout_s: float) -> None:
    """Through the API, so that each session ends in order and its end is recorded."""
    late = time.monotonic() + timeout_s
    try:
        with open(os.path.join(state, "token"), encoding="ascii") as file:
            token = file.read().strip()
        with Client(url, token, patience_s=min(timeout_s, 10.0)) as client:
            live = list(client.list_sessions())
            asked = [s for s in live if _stop_session(client, s.id, None, late)]
            for session in asked:
                _wait_session(client, session.id, late)
            if asked:
                click.echo(f"✓ {len(asked)} session{'s' if len(asked) > 1 else ''} stopped")
            if len(asked) < len(live):
                more = len(live) - len(asked)
                text = "what runs is killed, what waits starts after the next `madang up`"
                click.echo(f"! no time for {more} more: {text}", err=True)
    except (PlatformError, OSError) as exc:
        click.echo(f"! sessions can't be stopped in order ({exc}); they are killed", err=True)


def _stop_session(client: Client, session: str, grace_s: float | None, late: float) -> bool:
    """Whether there was time to ask."""
    if time.monotonic() > late:
        return False
    try:
        client.stop(session, grace_s=grace_s)
    except (NotFound, Conflict):
        pass  # it ended meanwhile
    return True


def _wait_session(client: Client, session: str, late: float) -> None:
    try:
        left = max(0.1, late - time.monotonic())
        found = client.wait_session(session, timeout_s=left)
        if found.status is not SessionStatus.TERMINATED and time.monotonic() < late + KILL_S:
            client.stop(session, grace_s=0)
            client.wait_session(session, timeout_s=KILL_S)
    except (NotFound, Conflict):
        pass


def _end(process: ProcessId, signum: int, patience_s: float) -> None:
    """Signal exactly this process; SIGKILL if it does not leave."""
    fd = process.open()
    if fd is None:
        return
    try:
        kill(fd, signum)
        if not select.select([fd], [], [], patience_s)[0]:
            kill(fd)
            select.select([fd], [], [], KILL_S)
    finally:
        os.close(fd)


def _verdict(state: str, *, started: bool, keep_sessions: bool) -> int:
    running = read_running(state)
    left = [] if running is None else [running.pid, *(pid for pid, _ in running.children)]
    kernels = [process.pid for process in kernel_processes(state)]
    if left or (kernels and not keep_sessions):
        click.echo(f"✗ still there: processes {[*left, *kernels]}", err=True)
        return 1
    if kernels:
        click.echo("✓ Madang is stopped; sessions go on, `madang up` finds them again.")
    elif started:
        click.echo("✓ Madang is stopped, nothing is left running.")
    else:
        click.echo(f"✓ Nothing was started on {state}.")
    return 0
