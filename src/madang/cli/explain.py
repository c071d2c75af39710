"""``madang explain``: works without a server."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import click

from madang.cli.context import json_option, print_json, print_table
from madang.wire import exits
from madang.wire.api import Explanation
from madang.wire.errors import NotFound, PlatformError, catalogue


@click.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Explain an error code, an exit code or all `exit-codes`; without any, list error codes."""
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
    if code not in known:
        near = get_close_matches(code, [*known, "exit-codes"], n=1)
        guess = f" Do you mean {near[0]}?" if near else ""
        raise NotFound(f"no error code {code!r}.{guess} `madang explain` lists all.")
    found = _explanation(known[code])
    if as_json:
        print_json(found)
        return
    print(f"{found.code} (HTTP {found.status}; try again: {found.retry})\n\n{found.text}")


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
