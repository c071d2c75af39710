"""``madang group`` and ``node``: groups of machines and what is in them."""

from __future__ import annotations

import os
import sys
import tempfile

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.options import read_text
from madang.cli.policylive import open_editor
from madang.cli.printable import print_error_text, printable
from madang.client.sync import Client
from madang.wire.api import Node
from madang.wire.errors import GroupInvalid
from madang.wire.queue import Group
from madang.wire.size import format_bytes

FIRST = """\
# Settings of this group of machines; what is left out has its default.
# order = "fifo"            # fifo, drf, fair or short
# placement = "pack"        # pack, spread or fragments
# priority_max = 10         # the highest that users may ask for
# half_life = "7d"          # how fast the past is forgotten under order = "fair"
# projects = ["lab"]        # who may use it; everybody
# [weights]
# "project:lab" = 2
# [preempt]
# from_priority = 5         # from here on preemptible sessions give way
# grace = "30s"
# min_run = "10m"
"""


@click.group()
def group() -> None:
    """Groups of machines: which there are, and how their queues are run."""


@group.command()
@json_option
def ls(as_json: bool) -> None:
    """List the groups that you may use."""
    with connect() as client:
        found = client.list_groups()
    if as_json:
        print_json(found)
        return
    print_table(("GROUP", "MACHINES", "CPU", "MEM", "SETTINGS"), [_row(each) for each in found])


def _row(each: Group) -> tuple[str, ...]:
    lines = [line.strip() for line in each.text.splitlines()]
    settings = [line for line in lines if line and not line.startswith("#")]
    return (
        each.name,
        ", ".join(each.nodes) or "-",
        f"{each.capacity.cpu:g}",
        format_bytes(each.capacity.mem_bytes),
        "; ".join(settings) or "-",
    )


@group.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Print a group's settings."""
    with connect() as client:
        found = client.get_group(name)
    if as_json:
        print_json(found)
    else:
        sys.stdout.write(
            found.text if found.text.endswith("\n") or not found.text else f"{found.text}\n"
        )


@group.command()
@click.argument("name")
@click.option("--file", "path", metavar="FILE", help="Its settings; - is stdin.")
def add(name: str, path: str | None) -> None:
    """Make a group; without settings it has the defaults. For administrators."""
    with connect() as client:
        made = client.put_group(name, "" if path is None else read_text(path))
    print(f"group {made.name} is there; `madang node set NODE --group {made.name}` fills it")


@group.command()
@click.argument("name")
@click.option("--file", "path", metavar="FILE", help="Take the settings from there; - is stdin.")
def edit(name: str, path: str | None) -> int:
    """Edit a group's settings in $VISUAL or $EDITOR. For administrators."""
    with connect() as client:
        found = client.get_group(name)
        if path is not None:
            client.put_group(name, read_text(path), version=found.version)
            return 0
        return _edit(client, found)


def _edit(client: Client, found: Group) -> int:
    with tempfile.NamedTemporaryFile("w", prefix="madang-", suffix=".toml", delete=False) as file:
        file.write(found.text or FIRST)
    try:
        while True:
            open_editor(file.name)
            text = read_text(file.name)
            if text in (found.text, FIRST):
                print("nothing was changed")
                break
            try:
                done = client.put_group(found.name, text, version=found.version)
            except GroupInvalid as exc:
                print_error_text(exc.text)
                if click.confirm("Edit it again?", default=True, err=True):
                    continue
                print_error_text(f"your text is kept in {file.name}")
                return 1
            print(f"group {done.name} is at version {done.version}")
            break
    except BaseException:
        print_error_text(f"your text is kept in {file.name}")
        raise
    os.unlink(file.name)
    return 0


@group.command()
@click.argument("name")
def rm(name: str) -> None:
    """Remove a group that has no machines. For administrators."""
    with connect() as client:
        client.remove_group(name)


@click.group()
def node() -> None:
    """Machines: what they have and where they belong."""


@node.command("ls")
@json_option
def list_nodes(as_json: bool) -> None:
    """List machines."""
    with connect() as client:
        nodes, groups = client.list_nodes(), client.list_groups()
    if as_json:
        print_json(nodes)
        return
    group_of = {name: each.name for each in groups for name in each.nodes}
    rows = [_node_row(each, group_of.get(each.name, "-")) for each in nodes]
    print_table(("MACHINE", "STATUS", "GROUP", "CPU", "MEM", "SESSIONS", "LABELS"), rows)


def _node_row(each: Node, group_name: str) -> tuple[str, ...]:
    has, given = each.capacity, each.allocated
    return (
        each.name,
        each.status,
        group_name,
        f"{given.cpu:g} of {has.cpu:g}",
        f"{format_bytes(given.mem_bytes)} of {format_bytes(has.mem_bytes)}",
        str(each.sessions),
        printable(each.facts.get("labels", "-")),
    )


@node.command("set")
@click.argument("name")
@click.option("--group", "group_name", required=True, metavar="NAME", help="Group to put it into.")
def set_node(name: str, group_name: str) -> None:
    """Put a machine into another group; what runs on it goes on. For administrators."""
    with connect() as client:
        client.move_node(name, group_name)
