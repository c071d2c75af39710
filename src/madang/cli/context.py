"""What every command needs: a client, and output in both forms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from madang.cli.config import ClientConfig, load
from madang.cli.printable import printable
from madang.client.sync import Client
from madang.kit.codec import to_json

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def connect(config: ClientConfig | None = None) -> Client:
    """A client of the configured server."""
    config = config or load()
    return Client(config.url, config.key or config.token)


def print_json(value: Any) -> None:
    """One JSON document on stdout, indented for people if they look at it."""
    data = to_json(value)
    if sys.stdout.isatty():
        import msgspec

        data = msgspec.json.format(data, indent=2)
    sys.stdout.write(data.decode() + "\n")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On stdout; see ``table``."""
    for line in table(headings, rows):
        sys.stdout.write(line + "\n")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as they need to be; the last one is not padded."""
    cells = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings) - 1)]
    lines = []
    for row in cells:
        padded = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*padded, row[-1]]).rstrip())
    return lines
