"""``madang limits …``"""

from __future__ import annotations

import difflib
import os
import tempfile
import time

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.options import read_text
from madang.cli.policylive import open_editor
from madang.cli.printable import print_error_text, printable
from madang.wire.errors import NotFound
from madang.wire.limits import Limited, LimitsDraft, LimitsOf, LimitsText
from madang.wire.size import format_bytes

_FIRST = """version = 1
# sessions = 10        # at once, waiting ones included
# pending = 20         # waiting at once
# time = "24h"         # the longest time limit of a session
# cpu_hours = 1000     # allocated in a calendar month

# [at_once]            # all sessions together
# cpu = 8
# mem = "32g"

# [session]            # one session
# cpu = 4

# [[idle]]             # all of these must agree
# kind = "cpu"
# after = "1h"
"""


@click.group()
def limits() -> None:
    """Say who may have how much: slots and sessions at once, size, time, CPU-hours, idling.

    A text of limits has a name, and is assigned to users, projects, domains or tokens. A session
    keeps the limits of all four; the tightest counts. (What a session may do is its sandbox
    policy: `madang policy`.)
    """


@limits.command("ls")
@json_option
def list_limits(as_json: bool) -> None:
    """List limits; without administration, those that count for you."""
    with connect() as client:
        found = client.list_limits()
    if as_json:
        print_json(found)
        return
    rows = [
        (each.name, str(each.version), each.author, _when(each), ", ".join(each.targets) or "-",
         each.note or "-")
        for each in found
    ]  # fmt: skip
    print_table(("LIMITS", "VERSION", "BY", "AT", "FOR", "NOTE"), rows)


def _when(found: LimitsText) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(found.at)) if found.at else "-"


@limits.command()
@click.argument("name")
@click.option("--history", is_flag=True, help="Its versions: who, when, why.")
@json_option
def show(name: str, history: bool, as_json: bool) -> None:
    """Print a text of limits."""
    with connect() as client:
        if not history:
            found = client.get_limits(name)
            if as_json:
                print_json(found)
            else:
                _print(found.text)
            return
        versions = client.get_limits_history(name)
    if as_json:
        print_json(versions)
        return
    rows = [
        (str(each.version), _when(each), each.author, each.digest[:12],
         "removed" if each.removed else each.note or "-")
        for each in versions
    ]  # fmt: skip
    print_table(("VERSION", "AT", "BY", "DIGEST", "NOTE"), rows)


def _print(text: str) -> None:
    for line in text.splitlines():
        print(printable(line.expandtabs()))


@limits.command()
@click.argument("name")
@click.argument("file")
@click.option("--note", default="", help="Why; kept with it.")
@click.option("--version", type=int, metavar="N", help="Only if N is in force; 0: none is yet.")
@json_option
def apply(name: str, file: str, note: str, version: int | None, as_json: bool) -> None:
    """Write limits, or change them; they count at once, for whoever has them.

    \b
    madang limits apply students students.toml --note "new term"
    madang limits assign students user:*
    """
    draft = LimitsDraft(text=read_text(file), note=note)
    with connect() as client:
        done = client.apply_limits(name, draft, version=version)
    _print_done(done, as_json=as_json)


def _print_done(done: LimitsText, *, as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    print(f"limits {printable(done.name)} are at version {done.version}")
    if not done.targets:
        print(f"nobody has them yet: madang limits assign {printable(done.name)} TARGET")


@limits.command()
@click.argument("name")
@click.option("--note", default="", help="Why; kept with it.")
@click.option("-y", "--yes", is_flag=True, help="Put it in force without asking.")
def edit(name: str, note: str, yes: bool) -> int:
    """Edit limits in $VISUAL or $EDITOR, look at the difference, and put them in force."""
    with connect() as client:
        try:
            known = client.get_limits(name)
        except NotFound:
            known = LimitsText(name=name, version=0, text="", digest="")
        with tempfile.NamedTemporaryFile("w", prefix="madang-", suffix=".toml", delete=False) as to:
            to.write(known.text or _FIRST)
        try:
            text = _edited(to.name, known, yes=yes)
            if text is not None:
                draft = LimitsDraft(text=text, note=note)
                done = client.apply_limits(name, draft, version=known.version)
                _print_done(done, as_json=False)
        except BaseException:
            print_error_text(f"your text is kept in {to.name}")
            raise
    os.unlink(to.name)
    return 0


def _edited(path: str, known: LimitsText, *, yes: bool) -> str | None:
    """None: nothing is to be changed."""
    open_editor(path)
    text = read_text(path)
    if text == (known.text or _FIRST):
        print("nothing was changed")
        return None
    names = (f"{printable(known.name)} version {known.version}", "edited")
    lines = difflib.unified_diff(known.text.splitlines(), text.splitlines(), *names, lineterm="")
    for line in lines:
        print(printable(line.expandtabs()))
    if yes or click.confirm("Put it in force?", default=True, err=True):
        return text
    print("nothing was changed")
    return None


@limits.command("rm")
@click.argument("name")
def remove(name: str) -> None:
    """Remove limits that nobody has; their versions stay in the history."""
    with connect() as client:
        client.remove_limits(name)
    print(f"removed {printable(name)}")


@limits.command()
@click.argument("name")
@click.argument("target")
@json_option
def assign(name: str, target: str, as_json: bool) -> None:
    """Give limits to user:NAME, project:NAME, domain:NAME or token:USER/NAME.

    KIND:* are all of that kind that have none of their own. In shells, quote the star.

    \b
    madang limits assign basic 'user:*'
    madang limits assign lab project:physics
    """
    with connect() as client:
        found = client.assign_limits(target, name)
    _print_of(found, as_json=as_json)


@limits.command()
@click.argument("target")
@json_option
def unassign(target: str, as_json: bool) -> None:
    """Take the limits of its own from a user, project, domain or token; those of KIND:* remain."""
    with connect() as client:
        found = client.assign_limits(target, None)
    _print_of(found, as_json=as_json)


@limits.command()
@click.argument("target", default="me")
@json_option
def of(target: str, as_json: bool) -> None:
    """Show the limits of you (me), a user, project, domain or token, and what is left."""
    with connect() as client:
        found = client.limits_of(target)
    _print_of(found, as_json=as_json)


def _print_of(found: LimitsOf, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    if not found.accounts:
        print(f"{printable(found.target)}: no limits")
        return
    rows: list[tuple[str, ...]] = []
    for each in found.accounts:
        by = f"{each.name} (default)" if each.default else each.name
        for one in each.counted:
            figures = [_amount(one, value) for value in (one.limit, one.used, one.left)]
            rows.append((each.shown, by, one.what, *figures))
        if not each.counted:
            rows.append((each.shown, by, "-", "-", "-", "-"))
    print_table(("WHOSE", "LIMITS", "WHAT", "MOST", "USED", "LEFT"), rows)


def _amount(one: Limited, value: float) -> str:
    return format_bytes(int(value)) if one.what in {"mem", "disk"} else f"{round(value, 3):g}"
