"""``madang reserve``: machines by calendar."""

from __future__ import annotations

from datetime import datetime

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.wishes import parse_time
from madang.wire.queue import ReservationDraft
from madang.wire.size import parse_duration


@click.group()
def reserve() -> None:
    """Keep machines for a project for some time; `madang run --reservation NAME` uses them."""


@reserve.command()
@json_option
def ls(as_json: bool) -> None:
    """List reservations of your project."""
    with connect() as client:
        found = client.list_reservations()
    if as_json:
        print_json(found)
        return
    rows = [
        (one.name, one.project, one.group, _when(one.starts_at), _when(one.ends_at),
         ", ".join(one.nodes))
        for one in found
    ]  # fmt: skip
    print_table(("RESERVATION", "PROJECT", "GROUP", "FROM", "TO", "MACHINES"), rows)


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "minutes")[:16]


@reserve.command()
@click.argument("name")
@click.option("--from", "start", required=True, metavar="TIME", help="Like 2026-05-01T08:00.")
@click.option("--to", "end", required=True, metavar="TIME", help="The same, or a span like 8h.")
@click.option("--project", default="", metavar="NAME", help="Whose. Default: yours.")
@click.option("--group", default="default", show_default=True, metavar="NAME")
@click.option("--node", "nodes", multiple=True, metavar="NAME", help="This machine; repeat.")
@click.option("--count", default=1, show_default=True, metavar="N", help="So many, any of them.")
@click.option("--no-show", default="15m", show_default=True, help="Give back if nobody comes.")
def add(
    name: str, start: str, end: str, project: str, group: str, nodes: tuple[str, ...],
    count: int, no_show: str,
) -> None:  # fmt: skip
    """Reserve machines of a group. For administrators."""
    now = datetime.now().astimezone()
    starts_at = parse_time(start, now, option="from")
    timed = "-" in end or ":" in end
    ends_at = parse_time(end, now, option="to") if timed else starts_at + parse_duration(end)
    draft = ReservationDraft(
        name=name, starts_at=starts_at, ends_at=ends_at, project=project, group=group,
        nodes=nodes, count=count, no_show_s=parse_duration(no_show, field="no-show"),
    )  # fmt: skip
    with connect() as client:
        made = client.add_reservation(draft)
    print(f"reservation {made.name}: {', '.join(made.nodes)} for project {made.project}")


@reserve.command()
@click.argument("name")
def rm(name: str) -> None:
    """Give the machines back; what runs goes on. For administrators."""
    with connect() as client:
        client.remove_reservation(name)
