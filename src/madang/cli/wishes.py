"""What ``madang run`` can ask of the place and the time of a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import click

from madang.wire.errors import InvalidRequest
from madang.wire.session import SessionSpec
from madang.wire.size import parse_duration

_OPTIONS = (
    click.option("--group", metavar="NAME", help="Group of machines to run on."),
    click.option("--priority", type=int, metavar="N", help="Higher comes first."),
    click.option("--after", multiple=True, metavar="NAME", help="Once that session ended well."),
    click.option("--after-any", is_flag=True, help="With --after: however it ended."),
    click.option("--at", metavar="TIME", help="Not before, like 22:30 or 2026-05-01T08:00."),
    click.option("--give-up", metavar="TIME", help="End it if it waited so long, like 2h."),
    click.option("--needs", multiple=True, metavar="K=V", help="Label of the machine; repeat."),
    click.option("--arch", metavar="NAME", help="Architecture, like x86_64."),
    click.option("--apart", metavar="WORD", help="Not on a machine with another of that word."),
    click.option("--preemptible", is_flag=True, help="It may give way to higher priorities."),
    click.option("--reservation", metavar="NAME", help="Use machines of a reservation."),
)


def wishes(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of them as options; the command takes them as ``**asked`` for ``with_wishes``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def with_wishes(
    spec: SessionSpec,
    *,
    group: str | None,
    priority: int | None,
    after: tuple[str, ...],
    after_any: bool,
    at: str | None,
    give_up: str | None,
    needs: tuple[str, ...],
    arch: str | None,
    apart: str | None,
    preemptible: bool,
    reservation: str | None,
) -> SessionSpec:
    return replace(
        spec,
        group=group or "",
        priority=priority,
        after=after,
        after_any=after_any,
        not_before=None if at is None else parse_time(at, datetime.now().astimezone()),
        give_up_after_s=None if give_up is None else parse_duration(give_up, field="give-up"),
        node_labels=needs,
        arch=arch or "",
        apart=apart or "",
        preemptible=preemptible,
        reservation=reservation or "",
    )


def parse_time(text: str, now: datetime, *, option: str = "at") -> float:
    """A time of day (the next one) or a date with a time, in our zone unless it names one."""
    try:
        if "T" in text or "-" in text:
            moment = datetime.fromisoformat(text)
            return (moment if moment.tzinfo else moment.astimezone(now.tzinfo)).timestamp()
        hour, minute = map(int, text.split(":"))
        moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    except (ValueError, OverflowError, OSError) as exc:
        raise InvalidRequest(
            f"--{option}: {text!r} is no time, like 22:30 or 2026-05-01T08:00."
        ) from exc
    return moment.timestamp() + (86400.0 if moment <= now else 0.0)
