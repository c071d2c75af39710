"""Options that several commands have."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import click

from madang.wire.errors import InvalidRequest
from madang.wire.size import parse_duration

environment = click.option(
    "-e", "--env", "env", multiple=True, metavar="K=V", help="Environment; a bare K takes ours."
)


def parse_environment(items: Iterable[str], *, terminal: str | None) -> dict[str, str]:
    """*terminal*: the value of ``TERM`` where the program gets a terminal."""
    env = {} if terminal is None else {"TERM": terminal}
    for item in items:
        key, given, value = item.partition("=")
        if given:
            env[key] = value
        elif key in os.environ:
            env[key] = os.environ[key]
    return env


def parse_labels(items: Iterable[str]) -> dict[str, str]:
    labels = {}
    for item in items:
        key, given, value = item.partition("=")
        if not given:
            raise InvalidRequest(f"--label: {item!r} must look like KEY=VALUE.")
        labels[key] = value
    return labels


def parse_grace(text: str | None) -> float | None:
    """Unlike other durations it may be zero."""
    if text is None:
        return None
    return 0.0 if text.strip() in {"0", "0s"} else parse_duration(text, field="grace")


def read_policy(path: str) -> str:
    """The text of a sandbox policy."""
    return read_text(path)


def read_text(path: str) -> str:
    """Of a file; ``-`` is stdin. Raises InvalidRequest."""
    if path == "-":
        return sys.stdin.read()
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as exc:
        raise InvalidRequest(f"{path} can't be read ({exc.strerror}).") from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"{path} can't be read: it is not UTF-8 text.") from exc
