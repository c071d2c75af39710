"""``madang why`` and ``queue``."""

from __future__ import annotations

import time

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.printable import printable
from madang.wire.queue import Forecast, Queue, QueueEntry, Why
from madang.wire.session import Pending
from madang.wire.size import format_duration


@click.command()
@click.argument("name")
@json_option
def why(name: str, as_json: bool) -> None:
    """Say why a session waits, until when it probably does, and what would let it start.

    What would help was tried with the scheduler before it is said.
    """
    with connect() as client:
        found = client.why(name)
    if as_json:
        print_json(found)
        return
    for label, text in describe(found):
        print(f"{label:<9} {printable(text)}")


def describe(found: Why) -> list[tuple[str, str]]:
    """Lines for people, each with its label."""
    if found.pending is None:
        where = "waits for its first look" if found.node is None else f"has its place: {found.node}"
        return [("place", f"{where} (group {found.group})")]
    lines = [("queue", found.pending.text), ("reason", found.pending.code)]
    if found.place is not None:
        lines.append(("place", f"{found.place} of {found.waiting} in group {found.group}"))
    if (estimate := describe_estimate(found.pending)) is not None:
        lines.append(("starts", estimate))
        lines.append(("forecast", describe_forecast(found.forecast)))
    lines += [("option", option.text) for option in found.options]
    return lines


def describe_estimate(pending: Pending) -> str | None:
    """``in about 4m, nine times in ten within 12m``."""
    if pending.start_p50 is None or pending.start_p90 is None:
        return None
    now = time.time()
    middle, late = (max(0.0, at - now) for at in (pending.start_p50, pending.start_p90))
    return f"in about {_coarse(middle)}, nine times in ten within {_coarse(late)}"


def describe_forecast(forecast: Forecast) -> str:
    if forecast.coverage is None or forecast.median_error_s is None:
        return "no estimate of this group has been compared with a start yet"
    return (
        f"{forecast.coverage:.0%} of {forecast.told} starts came in time, half of them within "
        f"{_coarse(forecast.median_error_s)} of what was said"
    )


def _coarse(seconds: float) -> str:
    """As exact as a forecast can be."""
    unit = 1.0 if seconds < 60 else 60.0 if seconds < 7200 else 600.0
    return format_duration(max(1.0, round(seconds / unit) * unit)).replace(".0 s", "s")


@click.command()
@click.option("--group", metavar="NAME", help="Of one group. Default: all.")
@json_option
def queue(group: str | None, as_json: bool) -> None:
    """List waiting sessions in order, each with its reason and when it probably starts."""
    with connect() as client:
        found = client.get_queue(group)
        items = found.items
        while found.items and not as_json:
            found = client.get_queue(group, after=found.items[-1].place)
            items += found.items
    if as_json:
        print_json(found)
        return
    _print(found, items)


def _print(found: Queue, items: tuple[QueueEntry, ...]) -> None:
    rows = [_row(entry) for entry in items]
    print_table(("PLACE", "NAME", "OWNER", "GROUP", "PRIORITY", "WAITED", "STARTS IN", "WHY"), rows)
    if (hidden := found.waiting - len(items)) > 0:
        print(f"\n{hidden} more of others")


def _row(entry: QueueEntry) -> tuple[str, ...]:
    pending, now = entry.pending, time.time()
    starts = "-"
    if pending is not None and pending.start_p50 is not None and pending.start_p90 is not None:
        ends = (_coarse(max(0.0, at - now)) for at in (pending.start_p50, pending.start_p90))
        starts = " to ".join(ends)
    return (
        str(entry.place),
        entry.name,
        entry.owner,
        entry.group,
        str(entry.priority),
        _coarse(max(0.0, now - entry.created_at)),
        starts,
        "" if pending is None else pending.text,
    )
