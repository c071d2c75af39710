"""``madang preset …``"""

from __future__ import annotations

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.printable import printable
from madang.client.requests import size_request
from madang.wire.limits import Preset, PresetDraft
from madang.wire.size import format_bytes, format_duration


@click.group()
def preset() -> None:
    """Sizes with a name, for `madang run --preset NAME`."""


@preset.command("ls")
@json_option
def list_presets(as_json: bool) -> None:
    """List presets; what one leaves open (-) is the server's default."""
    with connect() as client:
        found = client.list_presets()
    if as_json:
        print_json(found)
        return
    print_table(
        ("PRESET", "CPU", "MEM", "DISK", "PIDS", "TIME", "ABOUT"), [_row(each) for each in found]
    )


def _row(found: Preset) -> tuple[str, ...]:
    size = found.size
    return (
        found.name,
        "-" if size.cpu is None else f"{size.cpu:g}",
        "-" if size.mem_bytes is None else format_bytes(size.mem_bytes),
        "-" if size.disk_bytes is None else format_bytes(size.disk_bytes),
        "-" if size.pids is None else str(size.pids),
        "-" if size.time_s is None else format_duration(size.time_s),
        found.about or "-",
    )


@preset.command("set")
@click.argument("name")
@click.option("--cpu", metavar="N", help="Cores, like 0.5 or 2.")
@click.option("--mem", metavar="SIZE", help="Memory, like 512m or 2g.")
@click.option("--pids", type=int, metavar="N", help="Processes and threads at once.")
@click.option("--disk", metavar="SIZE", help="Disk for everything it writes, like 10g.")
@click.option("--time", "time_limit", metavar="TIME", help="Stop it after this long, like 2h.")
@click.option("--about", default="", help="What it is for.")
@click.option("--version", type=int, metavar="N", help="Only if it is still at N; 0: not there.")
@json_option
def set_preset(
    name: str,
    cpu: str | None,
    mem: str | None,
    pids: int | None,
    disk: str | None,
    time_limit: str | None,
    about: str,
    version: int | None,
    as_json: bool,
) -> None:
    """Make a preset, or replace the one of that name."""
    size = size_request(cpu=cpu, mem=mem, pids=pids, disk=disk, time=time_limit)
    with connect() as client:
        done = client.set_preset(name, PresetDraft(size=size, about=about), version=version)
    if as_json:
        print_json(done)
    else:
        print(f"preset {printable(done.name)} is at version {done.version}")


@preset.command("rm")
@click.argument("name")
def remove_preset(name: str) -> None:
    """Remove a preset; sessions that were made with it stay as they are."""
    with connect() as client:
        client.remove_preset(name)
    print(f"removed {printable(name)}")
