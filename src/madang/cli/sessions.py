"""``madang ps``, ``show``, ``freeze``, ``thaw``, ``stop`` and ``rm``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.options import parse_grace
from madang.cli.phases import clock_time, describe_end, describe_idle, describe_size
from madang.cli.printable import print_error_text, printable
from madang.cli.refusals import print_refusals, refusals_of
from madang.cli.terminal import is_terminal
from madang.client.sync import Client
from madang.wire import exits
from madang.wire.api import Page
from madang.wire.errors import PlatformError
from madang.wire.network import NetworkUse
from madang.wire.session import HistoryEntry, Session, SessionStatus
from madang.wire.size import format_bytes, format_duration

_MOST_REFUSED = 8
_FAR = 60
"""Longest command shown in a table."""


@click.command()
@click.option("-a", "--all", "ended", is_flag=True, help="Ended sessions too.")
@click.option("-w", "--watch", is_flag=True, help="Print the list again at each change.")
@json_option
def ps(ended: bool, watch: bool, as_json: bool) -> None:
    """List sessions."""
    with connect() as client:
        _list(client, ended=ended, as_json=as_json)
        if not watch:
            return
        for _ in client.events():
            if is_terminal(1) and not as_json:
                sys.stdout.write("\x1b[H\x1b[2J")
            _list(client, ended=ended, as_json=as_json)
            sys.stdout.flush()


def _list(client: Client, *, ended: bool, as_json: bool) -> None:
    sessions = list(client.list_sessions(ended=ended))
    if as_json:
        print_json(Page(items=tuple(sessions)))
        return
    several = len({session.owner for session in sessions}) > 1
    rows = [_row(session, owner=several) for session in sessions]
    print_table(("NAME", "STATUS", "IMAGE", "CPU", "MEM", "AGE", "COMMAND"), rows)


def _row(session: Session, *, owner: bool) -> tuple[str, ...]:
    """*owner*: names are told with whose they are."""
    return (
        f"{session.owner}/{session.name}" if owner else session.name,
        _state(session),
        session.image,
        f"{session.size.cpu:g}",
        format_bytes(session.size.mem_bytes),
        _ago(session.created_at),
        command_line(session)[:_FAR] or "(idle)",
    )


def _state(session: Session) -> str:
    if session.frozen_since is not None:
        return f"frozen {_ago(session.frozen_since)}"
    if session.status is not SessionStatus.TERMINATED:
        return session.status.value.lower()
    result = session.result.value if session.result else "ended"
    code = session.ended.exit_code if session.ended else None
    return f"{result} ({code})" if code is not None and code != 0 else result


def _ago(at: float) -> str:
    seconds = max(0.0, time.time() - at)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def command_line(session: Session) -> str:
    """The command as a shell would take it, in printable characters."""
    import shlex

    raw = (arg.encode(session.argv_encoding, "replace") for arg in session.argv)
    return printable(" ".join(shlex.quote(arg.decode("utf-8", "replace")) for arg in raw))


@click.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one session: state, size, how limits are held, use, history."""
    with connect() as client:
        session = client.get_session(name)
        if as_json:
            print_json(session)
            return
        history = client.get_history(session.id)
        refusals = refusals_of(client, session)
    for label, value in _facts(session):
        if value:
            print(f"{label:<9} {printable(value)}")
    print_refusals(refusals, session)
    print("history")
    for entry in history:
        print(f"  {printable(_moment(entry))}")


def _facts(session: Session) -> list[tuple[str, str]]:
    held = ", ".join(f"{limit} by {how}" for limit, how in _held(session))
    ended = session.ended
    return [
        ("name", f"{session.name}  ({session.id})"),
        ("status", _status(session)),
        ("frozen", _frozen(session)),
        ("idle", describe_idle(session.name, session.idle) if session.idle else ""),
        ("protected", _protected(session)),
        ("why", ended.text if ended else session.pending.text if session.pending else ""),
        ("ended", describe_end(ended, session.size) if ended else ""),
        ("command", command_line(session) or "(idle)"),
        ("image", " ".join((session.image, session.image_digest[:12])).strip()),
        ("size", describe_size(session.size)),
        ("runtime", session.runtime),
        ("network", str(session.network) if session.network else ""),
        ("traffic", _traffic(session)),
        ("refused", _refused(session)),
        ("limits", held),
        ("uses", _usage(session) if ended is None else ""),
        ("node", session.node or ""),
        ("owner", session.owner),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(session.labels.items()))),
        *(("warning", warning) for warning in session.warnings),
    ]


def _protected(session: Session) -> str:
    until = session.protected_until
    return f"until {clock_time(until)}" if until is not None and until > time.time() else ""


def _held(session: Session) -> list[tuple[str, str]]:
    """Limit and what holds it."""
    return sorted((key, how) for key, how in session.enforced.items() if key != "runtime")


def _network_use(session: Session) -> NetworkUse | None:
    source = session.ended or session.usage
    return source.network if source is not None else None


def _traffic(session: Session) -> str:
    use = _network_use(session)
    if use is None:
        return ""
    received, sent = format_bytes(use.received_bytes), format_bytes(use.sent_bytes)
    return f"{received} received, {sent} sent"


def _refused(session: Session) -> str:
    """What it tried to reach and may not, most often tried first."""
    use = _network_use(session)
    if use is None or not use.refused_count:
        return ""
    shown = [f"{found.target} ({found.count})" for found in use.refused[:_MOST_REFUSED]]
    more = ["…"] * (len(use.refused) > _MOST_REFUSED)
    return f"{use.refused_count} times: {', '.join([*shown, *more])}"


def _status(session: Session) -> str:
    state = "running" if session.frozen_since is not None else _state(session)
    parts = [state, f"for {_ago(session.status_since)}"]
    if session.deadline is not None and session.status_owner:
        left = format_duration(max(0.0, session.deadline - time.time()))
        parts.append(f"moved on by the {session.status_owner} within {left}")
    return " · ".join(parts)


def _frozen(session: Session) -> str:
    if session.frozen_since is None:
        return ""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(session.frozen_since))
    return f"since {stamp} · input or `madang thaw {session.name}` wakes it"


def _usage(session: Session) -> str:
    usage = session.usage
    if usage is None:
        return ""
    parts = [
        f"CPU {format_duration(usage.cpu_s)}" if usage.cpu_s is not None else "",
        f"memory {format_bytes(usage.mem_bytes)}" if usage.mem_bytes is not None else "",
        f"{usage.pids} processes" if usage.pids is not None else "",
        f"disk {format_bytes(usage.disk_bytes)}" if usage.disk_bytes is not None else "",
    ]
    return " · ".join(part for part in parts if part)


def _moment(entry: HistoryEntry) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
    millis = int(entry.at % 1 * 1000)
    cause = f" ({entry.cause})" if entry.cause else ""
    return f"{stamp}.{millis:03d}  {entry.target.value.lower():<12} {entry.actor}{cause}"


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--grace", metavar="TIME", help="Between SIGTERM and SIGKILL; 0: SIGKILL at once.")
@click.option("--wait/--no-wait", default=True, help="Return when they have ended (default).")
@json_option
def stop(names: Sequence[str], grace: str | None, wait: bool, as_json: bool) -> int:
    """Stop sessions. Stopping one that has ended is fine."""
    grace_s = parse_grace(grace)
    with connect() as client:
        asked: list[Session] = []

        def ask(name: str) -> None:
            asked.append(client.stop(name, grace_s=grace_s))

        code = _for_each(names, ask)
        ended = [client.wait_session(session.id) if wait else session for session in asked]
    if as_json:
        print_json(ended)
        return code
    for session in ended:
        print(f"{session.name} {_state(session)}")
    return code


@click.command()
@click.argument("names", nargs=-1, required=True)
@json_option
def freeze(names: Sequence[str], as_json: bool) -> int:
    """Freeze running sessions: their programs stand still and use no CPU.

    Memory and slots are kept, and time limits (--time) go on counting. A session wakes by itself
    when input comes: bytes on stdin, a key or another window size, a signal, an exec. Reading its
    output does not wake it, nor do put and get.
    """
    return _change_each(names, Client.freeze, as_json)


@click.command()
@click.argument("names", nargs=-1, required=True)
@json_option
def thaw(names: Sequence[str], as_json: bool) -> int:
    """Let frozen sessions go on. Thawing one that runs is fine."""
    return _change_each(names, Client.thaw, as_json)


def _change_each(
    names: Sequence[str], change: Callable[[Client, str], Session], as_json: bool
) -> int:
    changed: list[Session] = []
    with connect() as client:
        code = _for_each(names, lambda name: changed.append(change(client, name)))
    if as_json:
        print_json(changed)
        return code
    for session in changed:
        print(f"{session.name} {_state(session)}")
    return code


@click.command()
@click.argument("names", nargs=-1)
@click.option("-f", "--force", is_flag=True, help="Stop them first if they run.")
@click.option("--all-ended", is_flag=True, help="Every session that has ended.")
def rm(names: Sequence[str], force: bool, all_ended: bool) -> int:
    """Remove ended sessions with their files and output."""
    if bool(names) == all_ended:
        raise click.UsageError("give names, or --all-ended.")
    with connect() as client:
        if all_ended:
            found = client.list_sessions(status=SessionStatus.TERMINATED, ended=True)
            names = [session.id for session in found]

        def remove(name: str) -> None:
            session = client.get_session(name)
            client.remove(session.id, force=force)
            print(session.name)

        return _for_each(names, remove)


def _for_each(names: Sequence[str], do: Callable[[str], None]) -> int:
    """Do all; print what fails and go on. The exit code of the last failure."""
    code = 0
    for name in names:
        try:
            do(name)
        except PlatformError as exc:
            print_error_text(exc.text)
            code = exits.of_error(exc)
    return code
