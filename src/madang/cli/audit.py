"""``madang audit …``"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.printable import printable
from madang.cli.times import parse_time, show_time
from madang.wire import exits
from madang.wire.audit import AuditRecord, parse_head, verify
from madang.wire.errors import InvalidRequest

_PAGE = 500


@click.group()
def audit() -> None:
    """Who did what, from where: list, check and export the log of logins and changes.

    Each record has a hash of the one before it. For administrators and monitors.
    """


@audit.command()
@click.option("--actor", metavar="USER", help="Only what this user did.")
@click.option("--action", metavar="NAME", help="Like session.created, or session for all of them.")
@click.option("--object", "subject", metavar="NAME", help="Only of this object: its name or id.")
@click.option("--since", metavar="TIME", help="Like 2h, 2026-11-28 or 2026-11-28T14:05 (UTC).")
@click.option("--until", metavar="TIME", help="As --since.")
@click.option("-n", "--limit", type=click.IntRange(1), default=50, show_default=True)
@json_option
def ls(
    actor: str | None,
    action: str | None,
    subject: str | None,
    since: str | None,
    until: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List records, newest first."""
    where: dict[str, Any] = {
        "actor": actor,
        "action": action,
        "subject": subject,
        "since": parse_time(since, field="since"),
        "until": parse_time(until, field="until"),
    }
    found = list(_newest(where, limit))
    if as_json:
        print_json(found)
        return
    rows = [
        (str(each.seq), show_time(each.at_us / 1e6), each.actor or "-", each.source or "-",
         each.action, each.name or each.id, _change(each))
        for each in found
    ]  # fmt: skip
    print_table(("NO", "AT (UTC)", "BY", "FROM", "ACTION", "OBJECT", "CHANGE"), rows)


def _newest(where: dict[str, Any], limit: int) -> Iterator[AuditRecord]:
    cursor: int | None = None
    with connect() as client:
        while limit > 0:
            page = client.list_audit(**where, limit=min(limit, _PAGE), cursor=cursor)
            yield from page.items
            limit -= len(page.items)
            cursor = page.next
            if cursor is None:
                return


def _change(record: AuditRecord) -> str:
    """``status=RUNNING→TERMINATING program=python``"""
    before, after = record.before or {}, record.after or {}
    words = []
    for name in {**before, **after}:
        if name in before and name in after:
            words.append(f"{name}={before[name]}→{after[name]}")
        else:
            words.append(f"{name}={after.get(name, before.get(name))}")
    return " ".join(words)


@audit.command()
@json_option
def head(as_json: bool) -> None:
    """Print the number and digest of the last record, to be kept elsewhere.

    Whoever can write to the server's database can write the log anew. `madang audit verify --head`
    with what was kept finds it.
    """
    with connect() as client:
        found = client.get_audit_head()
    if as_json:
        print_json(found)
    else:
        print(printable(str(found)))


@audit.command()
@click.option("--jsonl", "file", metavar="FILE", default="-", help="Where to; - is stdout.")
def export(file: str) -> None:
    """Write the whole log, a line a record, in the form that `verify FILE` reads."""
    with connect() as client:
        if file == "-":
            _write(sys.stdout.buffer, client.export_audit())
            return
        try:
            with open(file, "wb") as target:
                _write(target, client.export_audit())
        except OSError as exc:
            raise InvalidRequest(f"{file} can't be written ({exc.strerror}).") from exc


def _write(target: BinaryIO, chunks: Iterable[bytes]) -> None:
    target.writelines(chunks)
    target.flush()


@audit.command("verify")
@click.argument("file", required=False)
@click.option(
    "--head", "heads", multiple=True, metavar="N:DIGEST", help="What `audit head` once printed."
)
@json_option
def verify_log(file: str | None, heads: tuple[str, ...], as_json: bool) -> int:
    """Check that no record was changed, removed, put in or moved.

    Of the server's log, or of an exported FILE (- is stdin), which needs no server. Ends with exit
    code 122 if something was. The end of the log, and all of it by somebody who can compute, can be
    replaced unnoticed unless a --head that was kept elsewhere is given.
    """
    try:
        kept = [parse_head(text) for text in heads]
    except ValueError as exc:
        raise InvalidRequest(f"--head: {exc}") from exc
    if file is None:
        with connect() as client:
            found = verify(_lines(client.export_audit()), kept)
    elif file == "-":
        found = verify(sys.stdin.buffer, kept)
    else:
        try:
            with open(file, "rb") as lines:
                found = verify(lines, kept)
        except OSError as exc:
            raise InvalidRequest(f"{file} can't be read ({exc.strerror}).") from exc
    if as_json:
        print_json(found)
    else:
        upto = f"{found.records} records, up to {found.count}:{found.digest}"
        if found.problem:
            print(printable(f"NOT intact: {found.problem}"))
        print(printable(f"good are {upto}" if found.problem else f"intact: {upto}"))
    return exits.REFUSED if found.problem else 0


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest
