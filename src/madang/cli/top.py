"""``madang top``."""

from __future__ import annotations

import time
from typing import Final

import click

from madang.cli.config import load
from madang.cli.context import connect, json_option, print_json, table
from madang.cli.terminal import full_screen, is_terminal, window, write_all
from madang.client.sync import Client
from madang.wire.api import Node
from madang.wire.kernel import WarmLoad
from madang.wire.session import Session, SessionStatus
from madang.wire.size import format_bytes, format_duration

_PERIOD_S: Final = 2.0
_QUIT: Final = frozenset(b"qQ")


@click.command()
@click.option("--once", is_flag=True, help="Print one table and stop.")
@json_option
def top(once: bool, as_json: bool) -> None:
    """Watch what running sessions use, and the machines; q or Ctrl-C ends it."""
    config = load()
    with connect(config) as client:
        if as_json:
            print_json(list(_running(client).values()))
        elif once or config.plain or not is_terminal(1):
            for line in _page(client, _running(client), {}):
                print(line)
        else:
            _watch(client)


def _watch(client: Client) -> None:
    before: dict[str, Session] = {}
    with full_screen() as wait_keys:
        while True:
            now = _running(client)
            _draw([*_page(client, now, before), "", "q quits"])
            if not _QUIT.isdisjoint(wait_keys(_PERIOD_S)):
                return
            before = now


def _draw(lines: list[str]) -> None:
    """As much as fits, each line on one row of the window."""
    rows, columns = window(1)
    shown = lines if len(lines) <= rows else [*lines[: rows - 1], f"… {len(lines) - rows + 1} more"]
    text = "\n".join(f"{line[:columns]}\x1b[K" for line in shown)
    write_all(1, f"\x1b[H{text}\x1b[J".encode("utf-8", "replace"))


def _running(client: Client) -> dict[str, Session]:
    return {session.id: session for session in client.list_sessions(status=SessionStatus.RUNNING)}


def _page(client: Client, sessions: dict[str, Session], before: dict[str, Session]) -> list[str]:
    machines = [_node(node) for node in client.list_nodes()]
    lines = table(
        ("NODE", "CPU IN USE", "MEMORY IN USE", "ALLOCATED", "SESSIONS", "WARM"), machines
    )
    rows = [_row(session, before.get(key)) for key, session in sessions.items()]
    headings = ("NAME", "CPU", "CPU TIME", "MEMORY", "PEAK", "PROCESSES", "DISK")
    return [*lines, "", *(table(headings, rows) if rows else ["No session is running."])]


def _node(node: Node) -> tuple[str, ...]:
    """What is in use on the machine by anybody, and what is allocated to sessions."""
    load, allocated = node.load, node.allocated
    return (
        node.name,
        node.status if load is None else f"{load.cpu:.2f} of {load.cpus}",
        "-"
        if load is None
        else f"{format_bytes(load.mem_bytes)} of {format_bytes(load.mem_total_bytes)}",
        f"{allocated.cpu:g} CPU, {format_bytes(allocated.mem_bytes)}",
        str(node.sessions),
        "-" if load is None or load.warm is None else _warm(load.warm),
    )


def _warm(warm: WarmLoad) -> str:
    """What interpreters for warm starts use, and may."""
    count = f"{warm.interpreters} interpreter{'s' if warm.interpreters != 1 else ''}"
    return f"{count}, {format_bytes(warm.used_bytes)} of {format_bytes(warm.budget_bytes)}"


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
