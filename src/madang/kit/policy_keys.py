"""Reading a rule's keys: what is common to all kinds of rules of a policy."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Final

from madang.kit.lines import BadLine, Item, Table
from madang.wire.policy import MAX_ERRNO, MAX_WORDS, Answer, Placed

COMMON: Final = ("with", "name", "why")
CODES: Final = {name: code for code, name in errno.errorcode.items() if 0 < code <= MAX_ERRNO}


def only_keys(table: Table, known: Iterable[str]) -> None:
    for key, item in table.keys.items():
        if key not in known:
            where = f"[[{table.name}]]" if table.name else "the beginning"
            raise BadLine(item.line, f"{key!r} is unknown in {where}; known: {', '.join(known)}")


def texts(item: Item, key: str) -> list[Item]:
    if not isinstance(item.value, list):
        raise BadLine(item.line, f"{key} takes a list of texts")
    for each in item.value:
        if not isinstance(each.value, str):
            raise BadLine(each.line, f"{key} takes texts in quotes")
    return item.value


def words(table: Table, key: str) -> str:
    item = table.keys.get(key)
    if item is None:
        return ""
    if not isinstance(item.value, str) or len(item.value) > MAX_WORDS:
        raise BadLine(item.line, f"{key} takes a text of at most {MAX_WORDS} characters")
    if not item.value.isprintable():
        raise BadLine(item.line, f"{key} takes printable characters on one line")
    return item.value


def answer(table: Table) -> tuple[Answer, int]:
    item = table.keys.get("with")
    if item is None:
        return Answer.ERRNO, errno.EPERM
    if item.value in {Answer.LOG.value, Answer.KILL.value}:
        return Answer(item.value), errno.EPERM
    if not isinstance(item.value, str) or item.value not in CODES:
        raise BadLine(item.line, 'with takes "log", "kill" or an error like "EPERM"')
    return Answer.ERRNO, CODES[item.value]


def whole(table: Table, key: str, least: int, most: int) -> int | None:
    """None: not given."""
    item = table.keys.get(key)
    if item is None:
        return None
    value = item.value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadLine(item.line, f"{key} takes a whole number from {least} to {most}")
    return value


def number(table: Table, key: str, least: float, most: float) -> float | None:
    """Whole or with a fraction; None: not given."""
    item = table.keys.get(key)
    if item is None:
        return None
    value = item.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BadLine(item.line, f"{key} takes a number from {least:g} to {most:.15g}")
    return value


def render_common(rule: Placed) -> Iterator[str]:
    """``with`` and ``why``; a name comes first, for those who look for it."""
    if rule.answer is not Answer.ERRNO:
        yield f"with = {quoted(rule.answer.value)}"
    elif rule.code != errno.EPERM:
        yield f"with = {quoted(errno.errorcode[rule.code])}"
    if rule.why:
        yield f"why = {quoted(rule.why)}"


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
