"""``madang explain``: error codes and exit codes, without a server; and a session's troubles."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.phases import describe_end, explain_end
from madang.cli.printable import printable
from madang.cli.refusals import print_refusals, refusals_of
from madang.kit.ids import valid_name
from madang.wire import exits
from madang.wire.api import Explanation
from madang.wire.errors import NotFound, PlatformError, catalogue


@click.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Explain an error code, an exit code, all `exit-codes`, or a session by its name.

    Of a session: how it ended, what it lacks, and what its sandbox policy refused it. Without any,
    list error codes.
    """
    if code == "exit-codes":
        _exit_codes(exits.MEANING, as_json=as_json)
        return
    if code is not None and code.isdecimal() and (text := exits.meaning(int(code[:4]))):
        _exit_codes({code: text}, as_json=as_json)
        return
    known = catalogue()
    if code is None:
        _list(known, as_json=as_json)
        return
    if code not in known and valid_name(code) and _explain_session(code, as_json=as_json):
        return
    if code not in known:
        near = get_close_matches(code, [*known, "exit-codes"], n=1)
        guess = f" Do you mean {near[0]}?" if near else ""
        raise NotFound(f"no error code {code!r}.{guess} `madang explain` lists all.")
    found = _explanation(known[code])
    if as_json:
        print_json(found)
        return
    print(f"{found.code} (HTTP {found.status}; try again: {found.retry})\n\n{found.text}")


def _explain_session(name: str, *, as_json: bool) -> bool:
    """False: there is none of that name, or nobody to ask."""
    try:
        with connect() as client:
            session = client.get_session(name)
            refused = refusals_of(client, session)
    except PlatformError:
        return False
    if as_json:
        print_json(refused)
        return True
    ended = session.ended
    if session.pending is not None:
        print(f"{session.name} waits: {printable(session.pending.text)}")
    elif ended is None:
        print(f"{session.name} is {session.status.value.lower()}")
    else:
        text = explain_end(ended)
        print(f"{session.name}: {describe_end(ended, session.size)}")
        if text:
            print(printable(text))
    for warning in session.warnings:
        print(printable(warning))
    print_refusals(refused, session)
    return True


def _explanation(kind: type[PlatformError]) -> Explanation:
    return Explanation(
        code=kind.code, status=kind.http_status, retry=kind.retry.value, text=kind.help_text
    )


def _list(known: dict[str, type[PlatformError]], *, as_json: bool) -> None:
    if as_json:
        print_json([_explanation(kind) for kind in known.values()])
        return
    rows = [(code, str(kind.http_status), kind.retry.value) for code, kind in known.items()]
    print_table(("CODE", "HTTP", "TRY AGAIN"), rows)
    print("\nmadang explain CODE says more; madang explain exit-codes lists exit codes.")


def _exit_codes(meanings: Mapping[str, str], *, as_json: bool) -> None:
    if as_json:
        print_json(meanings)
    else:
        print_table(("EXIT CODE", "MEANING"), list(meanings.items()))
