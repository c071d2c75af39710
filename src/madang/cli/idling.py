"""``madang protect``."""

from __future__ import annotations

import click

from madang.cli.context import connect, json_option, print_json
from madang.cli.phases import clock_time
from madang.cli.printable import printable
from madang.wire.size import parse_duration


@click.command()
@click.argument("name")
@click.option("--for", "length", metavar="TIME", help="From now, like 4h. Default: the longest.")
@click.option("--off", is_flag=True, help="End the protection.")
@json_option
def protect(name: str, length: str | None, off: bool, as_json: bool) -> None:
    """Keep a session from being stopped for being idle, for long work that looks like nothing.

    Limits say for how long that is possible at once; it can be done again before it is over. Who
    did it, and until when, is written down. Time limits (--time) count all the same.

    \b
    madang protect calm-otter --for 4h
    """
    if off and length is not None:
        raise click.UsageError("--off and --for don't go together.")
    for_s = 0.0 if off else None if length is None else parse_duration(length, field="for")
    with connect() as client:
        session = client.protect(name, for_s=for_s)
    if as_json:
        print_json(session)
    elif session.protected_until is None:
        print(f"{printable(session.name)} is not protected")
    else:
        print(f"{printable(session.name)} is protected until {clock_time(session.protected_until)}")
