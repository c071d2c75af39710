"""``madang usage …``"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Final, TypeVar

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.printable import printable
from madang.cli.times import parse_time, show_time
from madang.wire.size import GIB, format_bytes
from madang.wire.usage import Bill, Interval, Price, UsageLine, UsageReport

KEYS: Final = ("user", "project", "domain", "group", "month", "session", "node")
_SLOTS: Final = ("cpu", "mem", "disk", "pids")
F = TypeVar("F", bound=Callable[..., Any])


def _filters(command: F) -> F:
    """Options of a report and of a list."""
    options = (
        click.option("--since", metavar="TIME", help="Like 2h, 2026-11 or 2026-11-28 (UTC)."),
        click.option("--until", metavar="TIME", help="As --since."),
        click.option("--user", metavar="NAME", help="Only of this user."),
        click.option("--project", metavar="NAME", help="Only of this project."),
        click.option("--group", metavar="NAME", help="Only in this group of machines."),
        click.option("--node", metavar="NAME", help="Only on this machine."),
        click.option("--session", metavar="NAME", help="Only of this session."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@click.option(
    "--by", type=click.Choice(KEYS), multiple=True, help="Default: user. May be repeated."
)
@_filters
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, exact figures.")
@json_option
@click.pass_context
def usage(
    ctx: click.Context,
    /,
    by: tuple[str, ...],
    since: str | None,
    until: str | None,
    as_csv: bool,
    as_json: bool,
    **where: str | None,
) -> None:
    """Sum up what was allocated and used, and what it costs; what goes on counts until now.

    \b
    madang usage --by project --by month --since 2026-11
    madang usage --user ann --csv
    """
    if ctx.invoked_subcommand is not None:
        return
    with connect() as client:
        report = client.get_usage(
            by or ("user",),
            since=parse_time(since, field="since"),
            until=parse_time(until, field="until"),
            **where,
        )
    if as_json:
        print_json(report)
    elif as_csv:
        _print_csv(report)
    else:
        _print_report(report)


def _print_report(report: UsageReport) -> None:
    rows = [_row(report.by, line) for line in report.lines]
    if len(rows) > 1:
        rows.append(_row(report.by, report.total))
    headings = (*(key.upper() for key in report.by), "RUNS", "OPEN", "HOURS", "CPU H", "MEM GIB H",
                "DISK GIB H", "CPU USED H", "MEM PEAK", "RECEIVED", "SENT", "COST")  # fmt: skip
    print_table(headings, rows)


def _row(by: Sequence[str], line: UsageLine) -> tuple[str, ...]:
    names = [line.by.get(key, "total" if at == 0 else "") for at, key in enumerate(by)]
    return (
        *names,
        str(line.intervals),
        str(line.open),
        _hours(line.time_s),
        _hours(line.cpu_core_s),
        _hours(line.mem_byte_s / GIB),
        _hours(line.disk_byte_s / GIB),
        _hours(line.cpu_used_s),
        format_bytes(line.mem_peak_bytes),
        format_bytes(line.received_bytes),
        format_bytes(line.sent_bytes),
        _costs(line) or "-",
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3f}"


def _costs(line: UsageLine) -> str:
    return " + ".join(f"{float(amount):.2f} {name}" for name, amount in line.cost.items())


def _print_csv(report: UsageReport) -> None:
    names = [each.name for each in fields(UsageLine) if each.name not in {"by", "cost"}]
    currencies = sorted(report.total.cost)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow([*report.by, *names, *(f"cost_{currency}" for currency in currencies)])
    for line in report.lines:
        values = [getattr(line, name) for name in names]
        costs = [line.cost.get(currency, "0") for currency in currencies]
        out.writerow([*(_cell(line.by[key]) for key in report.by), *values, *costs])


def _cell(text: str) -> str:
    """No spreadsheet shall take a name for a formula."""
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else text


@usage.command()
@_filters
@click.option("--corrected", is_flag=True, help="With rows that others have taken the place of.")
@click.option("-n", "--limit", type=click.IntRange(1, 500), default=50, show_default=True)
@json_option
def ls(
    since: str | None,
    until: str | None,
    corrected: bool,
    limit: int,
    as_json: bool,
    **where: str | None,
) -> None:
    """List rows of the ledger, newest sessions first."""
    with connect() as client:
        page = client.list_intervals(
            since=parse_time(since, field="since"),
            until=parse_time(until, field="until"),
            corrected=corrected,
            limit=limit,
            **where,
        )
    if as_json:
        print_json(page.items)
        return
    print_table(
        ("ID", "SESSION", "USER", "PROJECT", "NODE", "CPU", "MEM", "FROM (UTC)", "FOR", "CPU USED",
         "CLOSED BY", "NOTE"),
        [_interval(each) for each in page.items],
    )  # fmt: skip


def _interval(each: Interval) -> tuple[str, ...]:
    over = time.time() if each.ended_at is None else each.ended_at
    note = f"corrects {each.corrects}: {each.reason}" if each.corrects else each.reason
    return (
        each.id,
        each.session,
        each.user,
        each.project,
        each.node,
        f"{each.cpu:g}",
        format_bytes(each.mem_bytes),
        show_time(each.started_at),
        f"{max(0.0, over - each.started_at):.1f} s",
        "-" if each.cpu_s is None else f"{each.cpu_s:.1f} s",
        each.closed_by or "(goes on)",
        note,
    )


@usage.command()
@click.argument("id")
@click.option("--reason", required=True, help="Why; kept with it.")
@click.option("--ended", metavar="TIME", help="When it really ended, as 2026-11-28T14:05 (UTC).")
@click.option("--void", is_flag=True, help="It shall not be charged at all.")
@json_option
def correct(id: str, reason: str, ended: str | None, void: bool, as_json: bool) -> None:  # noqa: A002
    """Put another row in the place of one, for administrators. The old one stays to be seen."""
    if (ended is None) is not void:
        raise click.UsageError("give either --ended TIME or --void.")
    at = parse_time(ended, field="ended")
    with connect() as client:
        done = client.correct_interval(id, reason=reason, ended_at=at)
    if as_json:
        print_json(done)
    else:
        print(printable(f"{done.id} stands in the place of {done.corrects}"))


@usage.group(invoke_without_command=True)
@json_option
@click.pass_context
def prices(ctx: click.Context, as_json: bool) -> None:
    """List what an hour of a slot costs in each group, and since when."""
    if ctx.invoked_subcommand is not None:
        return
    with connect() as client:
        found = client.list_prices()
    if as_json:
        print_json(found)
        return
    rows = [
        (each.group, each.slot, each.price, each.currency, _unit(each.slot),
         show_time(each.valid_from), each.author)
        for each in found
    ]  # fmt: skip
    print_table(("GROUP", "SLOT", "PRICE", "CURRENCY", "OF", "FROM (UTC)", "BY"), rows)


def _unit(slot: str) -> str:
    return {"cpu": "core-hour", "pids": "process-hour"}.get(slot, "GiB-hour")


@prices.command("set")
@click.argument("group")
@click.argument("slot", type=click.Choice(_SLOTS))
@click.argument("price")
@click.option("--currency", default="EUR", show_default=True)
@click.option("--from", "valid_from", metavar="TIME", help="Default: now.")
@json_option
def set_price(
    group: str, slot: str, price: str, currency: str, valid_from: str | None, as_json: bool
) -> None:
    """Set the price of a core-hour or GiB-hour in GROUP ("*": in all without one of their own).

    \b
    madang usage prices set default cpu 0.045
    madang usage prices set default mem 0.005 --from 2026-12
    """
    wanted = Price(
        group=group,
        slot=slot,
        price=price,
        currency=currency,
        valid_from=parse_time(valid_from, field="from") or 0.0,
    )
    with connect() as client:
        done = client.set_price(wanted)
    if as_json:
        print_json(done)
    else:
        line = f"{done.group} {done.slot}: {done.price} {done.currency} a {_unit(done.slot)}"
        print(printable(f"{line} from {show_time(done.valid_from)} on (UTC)"))


@usage.command()
@click.option("--project", required=True, metavar="NAME")
@click.option("--month", metavar="YYYY-MM", help="In UTC. Default: this one.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
def bill(project: str, month: str | None, as_csv: bool, as_json: bool) -> None:
    """Print what a project's use of a month costs."""
    with connect() as client:
        found = client.get_bill(project, month or time.strftime("%Y-%m", time.gmtime()))
    if as_json:
        print_json(found)
    elif as_csv:
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow(("user", "group", "slot", "unit_hours", "price", "amount"))
        for each in found.lines:
            who = (_cell(each.user), _cell(each.group))
            out.writerow((*who, each.slot, each.unit_hours, each.price, each.amount))
    else:
        _print_bill(found)


def _print_bill(found: Bill) -> None:
    print(printable(f"project {found.project}, {found.month} (UTC)"))
    rows = [
        (each.user, each.group, each.slot, each.unit_hours, each.price, each.amount)
        for each in found.lines
    ]
    rows.append(("total", "", "", "", "", f"{found.total} {found.currency}".rstrip()))
    print_table(("USER", "GROUP", "SLOT", "UNIT HOURS", "PRICE", "AMOUNT"), rows)
    if found.open:
        print(f"{found.open} runs go on: the bill will grow")
    if found.unpriced:
        print(printable(f"without a price: {', '.join(found.unpriced)}"))
