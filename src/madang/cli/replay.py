"""``madang replay``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.wishes import parse_time
from madang.wire.errors import InvalidRequest
from madang.wire.queue import NewNodes, ReplayFigures, ReplayReport, ReplayRequest
from madang.wire.size import format_duration, parse_bytes, parse_cpu, parse_duration


@click.command()
@click.option("--from", "since", required=True, metavar="TIME", help="A date, or an age like 7d.")
@click.option("--to", "until", metavar="TIME", help="The same. Default: now.")
@click.option("--group", default="default", show_default=True, metavar="NAME", help="Which queue.")
@click.option("--set", "changes", multiple=True, metavar="K=V", help="A setting of the group.")
@click.option(
    "--add-node", "nodes", multiple=True, metavar="SPEC", help="Machines: cpu=64,mem=256g,count=2."
)
@json_option
def replay(
    since: str,
    until: str | None,
    group: str,
    changes: tuple[str, ...],
    nodes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Plan the past once more under other settings, and compare with what happened.

    Sessions that have ended ask at the same times and run as long as they did. Passes that were
    written down are also planned again as they were: they must come out the same.

    \b
    madang replay --from 7d --set order=fair
    madang replay --from 7d --set weights.project:lab=2 --add-node cpu=64,mem=256g
    """
    now = time.time()
    request = ReplayRequest(
        since=_moment(since, now, "from"),
        until=now if until is None else _moment(until, now, "to"),
        group=group,
        set=dict(map(_pair, changes)),
        add_nodes=tuple(map(parse_nodes, nodes)),
    )
    with connect() as client:
        found = client.replay_queue(request)
    if as_json:
        print_json(found)
    else:
        _print(found)


def _moment(text: str, now: float, option: str) -> float:
    if "-" in text or "T" in text:
        return parse_time(text, datetime.now().astimezone(), option=option)
    return now - parse_duration(text, field=option)


def _pair(text: str) -> tuple[str, str]:
    key, given, value = text.rpartition("=")
    if not given or not key:
        raise InvalidRequest(f"--set: {text!r} must look like KEY=VALUE.")
    return key, value


def parse_nodes(text: str) -> NewNodes:
    """``cpu=64,mem=256g,count=2``"""
    given = dict(part.partition("=")[::2] for part in text.split(","))
    if not {"cpu", "mem"} <= given.keys() <= {"cpu", "mem", "count"}:
        raise InvalidRequest(f"--add-node: {text!r} must look like cpu=64,mem=256g,count=2.")
    count = given.get("count", "1")
    if not count.isdecimal() or len(count) > 4:
        raise InvalidRequest(f"--add-node: {count!r} is no number of machines.")
    cpu, mem_bytes = parse_cpu(given["cpu"]), parse_bytes(given["mem"])
    return NewNodes(cpu=cpu, mem_bytes=mem_bytes, count=int(count))


SHOWN: Final[Mapping[str, Callable[[ReplayFigures], str]]] = {
    "sessions": lambda f: f"{f.started} of {f.jobs} started",
    "mean wait": lambda f: format_duration(f.mean_wait_s),
    "p50 wait": lambda f: format_duration(f.p50_wait_s),
    "p90 wait": lambda f: format_duration(f.p90_wait_s),
    "in use": lambda f: f"{f.utilisation:.1%}",
    "fairness": lambda f: f"{f.fairness:.3f}",
    "preempted": lambda f: str(f.preemptions),
    "given up": lambda f: str(f.given_up),
}


def _print(found: ReplayReport) -> None:
    rows = [
        (label, show(found.happened), show(found.unchanged), show(found.changed))
        for label, show in SHOWN.items()
    ]
    print_table(("", "HAPPENED", "SIMULATED", "CHANGED"), rows)
    if found.left_out:
        print(f"\n{found.left_out} sessions are left out: no machine of today could hold them")
    print(f"\n{found.decisions} passes planned again, {found.different} came out otherwise")
