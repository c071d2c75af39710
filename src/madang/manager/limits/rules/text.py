"""Limits as text: docs/reference/limits.md. What is not understood is an error with its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, TypeVar

from madang.kit.lines import BadLine, Item, Table, read
from madang.manager.limits.types import (
    DEFAULT_BELOW,
    DEFAULT_GRACE_S,
    DEFAULT_PROTECT_S,
    Amounts,
    Check,
    IdleKind,
    Limits,
)
from madang.wire.errors import LimitsInvalid, SizeInvalid
from madang.wire.size import parse_bytes, parse_cpu, parse_duration

T = TypeVar("T")

VERSION: Final = 1
MAX_TEXT_BYTES: Final = 16 * 1024
MAX_CHECKS: Final = 8
MAX_GROUPS: Final = 64
MAX_COUNT: Final = 10**9
MIN_IDLE_S: Final = 1.0
_GROUP: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TOP: Final = (
    "version", "sessions", "pending", "time", "cpu_hours", "idle_grace", "protect",
)  # fmt: skip
_TABLES: Final = {"at_once": False, "session": False, "folders": False,
                  "deserved": True, "idle": True}  # fmt: skip
"""Name → whether it may be repeated."""
_AMOUNTS: Final = {"cpu": "cpu_milli", "mem": "mem_bytes", "disk": "disk_bytes", "pids": "pids"}


@lru_cache(maxsize=256)
def parse(text: str) -> Limits:
    """Raises LimitsInvalid, which names the line."""
    try:
        if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise BadLine(1, f"limits are longer than {MAX_TEXT_BYTES} bytes")
        return _parse(read(text))
    except BadLine as exc:
        raise LimitsInvalid(f"limits, line {exc.line}: {exc.text}.", line=exc.line) from exc


def _parse(tables: list[Table]) -> Limits:
    top, *others = tables
    _only(top, _TOP)
    version = top.keys.get("version")
    if version is None:
        raise BadLine(1, f"limits begin with version = {VERSION}")
    if version.value is True or version.value != VERSION:
        raise BadLine(version.line, f"version is {VERSION}; this Madang knows no other")
    for table in others:
        if _TABLES.get(table.name) is not table.repeated:
            known = ", ".join(f"[[{n}]]" if many else f"[{n}]" for n, many in _TABLES.items())
            written = f"[[{table.name}]]" if table.repeated else f"[{table.name}]"
            raise BadLine(table.line, f"{written} is unknown; known: {known}")
    single = {table.name: table for table in others if not table.repeated}
    folders = single.get("folders", Table("folders", 1))
    _only(folders, ("count", "size"))
    return Limits(
        at_once=_amounts(single.get("at_once")),
        session=_amounts(single.get("session")),
        sessions=_count(top, "sessions"),
        pending=_count(top, "pending"),
        time_s=_of(top, "time", _duration),
        cpu_hours=_count(top, "cpu_hours"),
        folders=_count(folders, "count"),
        folder_bytes=_of(folders, "size", _bytes),
        deserved=_deserved([table for table in others if table.name == "deserved"]),
        idle=_checks([table for table in others if table.name == "idle"]),
        idle_grace_s=_or(_of(top, "idle_grace", _duration), DEFAULT_GRACE_S),
        protect_s=_or(_of(top, "protect", _duration), DEFAULT_PROTECT_S),
    )


def _only(table: Table, known: tuple[str, ...]) -> None:
    for key, item in table.keys.items():
        if key not in known:
            where = f"[{table.name}]" if table.name else "the beginning"
            raise BadLine(item.line, f"{key!r} is unknown in {where}; known: {', '.join(known)}")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _of(table: Table, key: str, read_item: Callable[[Item, str], T]) -> T | None:
    """None: not given."""
    item = table.keys.get(key)
    return None if item is None else read_item(item, key)


def _count(table: Table, key: str) -> int | None:
    return _of(table, key, _whole)


def _whole(item: Item, key: str) -> int:
    value = item.value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise BadLine(item.line, f"{key} takes a whole number from 0 to {MAX_COUNT}")
    return value


def _sized(item: Item, key: str, example: str, read_text: Callable[[str], T]) -> T:
    if not isinstance(item.value, str):
        raise BadLine(item.line, f"{key} takes a text in quotes, like {example}")
    try:
        return read_text(item.value)
    except SizeInvalid as exc:
        raise BadLine(item.line, exc.text.rstrip(".")) from exc


def _duration(item: Item, key: str) -> float:
    return _sized(item, key, '"2h"', lambda text: parse_duration(text, field=key))


def _bytes(item: Item, key: str) -> int:
    return _sized(item, key, '"32g"', lambda text: parse_bytes(text, field=key))


def _cores(item: Item, key: str) -> float:
    if isinstance(item.value, int) and not isinstance(item.value, bool):
        return float(_whole(item, key))
    value = _sized(item, key, '"0.5"', parse_cpu)
    if value > MAX_COUNT:
        raise BadLine(item.line, f"{key} is out of range")
    return value


def _amounts(table: Table | None, *, also: tuple[str, ...] = ()) -> Amounts:
    if table is None:
        return {}
    _only(table, (*also, *_AMOUNTS))
    found: dict[str, int] = {}
    for key, item in table.keys.items():
        match key:
            case "cpu":
                found["cpu_milli"] = round(_cores(item, key) * 1000)
            case "mem" | "disk":
                found[_AMOUNTS[key]] = _bytes(item, key)
            case "pids":
                found["pids"] = _whole(item, key)
    return found


def _deserved(tables: list[Table]) -> Mapping[str, Amounts]:
    found: dict[str, Amounts] = {}
    if len(tables) > MAX_GROUPS:
        raise BadLine(tables[MAX_GROUPS].line, f"at most {MAX_GROUPS} groups")
    for table in tables:
        amounts = _amounts(table, also=("group",))
        item = table.keys.get("group", Item("default", table.line))
        if not isinstance(item.value, str) or not _GROUP.fullmatch(item.value):
            raise BadLine(item.line, 'group takes the name of a group, like "default"')
        if item.value in found:
            raise BadLine(item.line, f"group {item.value!r} stands here a second time")
        found[item.value] = amounts
    return found


def _checks(tables: list[Table]) -> tuple[Check, ...]:
    if len(tables) > MAX_CHECKS:
        raise BadLine(tables[MAX_CHECKS].line, f"at most {MAX_CHECKS} of [[idle]]")
    return tuple(map(_check, tables))


def _check(table: Table) -> Check:
    _only(table, ("kind", "after", "below"))
    item = table.keys.get("kind", Item("", table.line))
    if item.value not in set(IdleKind):
        raise BadLine(item.line, f"kind is one of {', '.join(IdleKind)}")
    kind = IdleKind(str(item.value))
    after_s = _of(table, "after", _duration)
    if after_s is None or after_s < MIN_IDLE_S:
        raise BadLine(table.line, '[[idle]] needs after, at least "1s"')
    below = DEFAULT_BELOW.get(kind, 0.0)
    if (given := table.keys.get("below")) is not None:
        if kind is IdleKind.CPU:
            below = _cores(given, "below")
        elif kind is IdleKind.NETWORK:
            below = float(_bytes(given, "below"))
        else:
            raise BadLine(given.line, f"below has no meaning for {kind}")
    return Check(kind=kind, after_s=after_s, below=below)
