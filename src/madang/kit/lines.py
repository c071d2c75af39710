"""TOML that knows its lines: a strict part of the language, for texts that people are to be told
about line by line.

Taken are tables, arrays of tables, bare keys, strings of one line, whole numbers, booleans, arrays
and inline tables. Not taken are dates, fractions, dotted and quoted keys, multi-line strings and
nested headers. Whatever is taken means the same in any TOML reader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

Value = str | int | float | bool | list["Item"] | dict[str, "Item"]


@dataclass(frozen=True, slots=True)
class Item:
    """A value and where it begins."""

    value: Value
    line: int


@dataclass(slots=True)
class Table:
    """A header with its keys."""

    name: str
    line: int
    repeated: bool = False
    """``[[name]]``"""
    keys: dict[str, Item] = field(default_factory=dict)


class BadLine(Exception):
    """In words, without the line, which comes beside."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"line {line}: {text}")
        self.line = line
        self.text = text


MAX_DEPTH: Final = 4
_SKIP: Final = re.compile(r"[ \t]*(?:#[^\n]*)?")
_SPACE: Final = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_HEADER: Final = re.compile(r"\[[ \t]*([A-Za-z0-9_-]+)[ \t]*\]")
_HEADERS: Final = re.compile(r"\[\[[ \t]*([A-Za-z0-9_-]+)[ \t]*\]\]")
_NUMBER: Final = re.compile(
    r"0x[0-9A-Fa-f](?:_?[0-9A-Fa-f])*|0o[0-7](?:_?[0-7])*|0b[01](?:_?[01])*"
    r"|[+-]?(?:0|[1-9](?:_?[0-9])*)"
)
_FRACTION: Final = re.compile(r"(?:0|[1-9][0-9]{0,8})\.[0-9]{1,9}")
_LONGEST_NUMBER: Final = 40
_WORD: Final = re.compile(r"true|false")
_LITERAL: Final = re.compile(r"'([^'\n]*)'")
_BASIC: Final = re.compile(r'"((?:[^"\\\n]|\\[^\n])*)"')
_ESCAPE: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_ESCAPES: Final = {'"': '"', "\\": "\\", "b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}
_AFTER: Final = frozenset("=,]}# \t\n")
"""What may follow a number or a word."""


def read(text: str) -> list[Table]:
    """The tables in their order; keys before the first header are in one without a name.

    Raises BadLine.
    """
    return _Reader(text.replace("\r\n", "\n")).tables()


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._depth = 0

    def tables(self) -> list[Table]:
        self._check_characters()
        found = [Table("", 1)]
        singles: set[str] = set()
        repeated: set[str] = set()
        self._blank()
        while self._at < len(self._text):
            if self._peek() == "[":
                table = self._header()
                taken = singles | repeated if not table.repeated else singles
                if table.name in taken or table.name in found[0].keys:
                    raise self._bad(f"{table.name!r} stands here a second time")
                (repeated if table.repeated else singles).add(table.name)
                found.append(table)
            else:
                self._pair(found[-1].keys)
            self._end_line()
            self._blank()
        return found

    def _check_characters(self) -> None:
        for number, line in enumerate(self._text.split("\n"), 1):
            for character in line:
                if (character < " " and character != "\t") or character == "\x7f":
                    raise BadLine(number, "a control character can't stand in a text")
                if "\ud800" <= character <= "\udfff":
                    raise BadLine(number, "half of a character can't stand in a text")

    def _bad(self, text: str) -> BadLine:
        return BadLine(self._line, text)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
            self._line += found[0].count("\n")
        return found

    def _blank(self) -> None:
        self._match(_SPACE)

    def _end_line(self) -> None:
        self._match(_SKIP)
        if self._at < len(self._text) and self._peek() != "\n":
            raise self._bad(f"{self._rest()!r} is too much: one key or header a line")

    def _rest(self) -> str:
        return self._text[self._at : self._at + 20].split("\n")[0]

    def _header(self) -> Table:
        line = self._line
        if found := self._match(_HEADERS):
            return Table(found[1], line, repeated=True)
        if found := self._match(_HEADER):
            return Table(found[1], line)
        raise self._bad(f"{self._rest()!r} is no header like [name] or [[name]]")

    def _pair(self, keys: dict[str, Item]) -> None:
        found = self._match(_KEY)
        if found is None:
            raise self._bad(f"{self._rest()!r} is no key like name = value")
        key = found[0]
        if key in keys:
            raise self._bad(f"{key!r} stands here a second time")
        self._match(_SKIP_BLANKS)
        if self._peek() != "=":
            raise self._bad(f"after {key!r} comes = and a value")
        self._at += 1
        self._match(_SKIP_BLANKS)
        keys[key] = self._value()

    def _value(self) -> Item:
        line, first = self._line, self._peek()
        if first == "[":
            return Item(self._array(), line)
        if first == "{":
            return Item(self._inline(), line)
        if first in {'"', "'"} and first:
            return Item(self._string(), line)
        return Item(self._plain(), line)

    def _plain(self) -> int | float | bool:
        rest = self._rest() or "nothing"
        if found := self._match(_WORD):
            value: int | float | bool = found[0] == "true"
        elif found := self._match(_FRACTION):
            value = float(found[0])
        elif found := self._match(_NUMBER):
            if len(found[0]) > _LONGEST_NUMBER:
                raise self._bad("a number is too long")
            value = int(found[0], 0 if found[0][:2] in {"0x", "0o", "0b"} else 10)
        else:
            raise self._bad(f"{rest!r} is no text in quotes, no number and no list")
        if self._peek() and self._peek() not in _AFTER:
            raise self._bad(f"{rest!r} is no text in quotes, no number and no list")
        return value

    def _string(self) -> str:
        if self._text.startswith(('"""', "'''"), self._at):
            raise self._bad("a text of several lines is not taken here")
        if found := self._match(_LITERAL):
            return found[1]
        if found := self._match(_BASIC):
            return _ESCAPE.sub(self._unescape, found[1])
        raise self._bad("a text has no end: its closing quote is missing")

    def _unescape(self, found: re.Match[str]) -> str:
        if found[3] is not None:
            if found[3] not in _ESCAPES:
                raise self._bad(f"\\{found[3]} means nothing in a text; write \\\\ for a backslash")
            return _ESCAPES[found[3]]
        code = int(found[1] or found[2], 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self._bad(f"{found[0]} is no character")
        return chr(code)

    def _array(self) -> list[Item]:
        self._enter()
        items: list[Item] = []
        while True:
            self._blank()
            if self._peek() == "]":
                break
            items.append(self._value())
            self._blank()
            if self._peek() != ",":
                break
            self._at += 1
        if self._peek() != "]":
            raise self._bad("a list has no end: a comma or its closing ] is missing")
        self._leave()
        return items

    def _inline(self) -> dict[str, Item]:
        self._enter()
        keys: dict[str, Item] = {}
        self._match(_SKIP_BLANKS)
        while self._peek() != "}":
            self._pair(keys)
            self._match(_SKIP_BLANKS)
            if self._peek() != ",":
                break
            self._at += 1
            self._match(_SKIP_BLANKS)
            if self._peek() == "}":
                raise self._bad("after a comma in { … } comes another key")
        if self._peek() != "}":
            raise self._bad("{ … } has no end on its line")
        self._leave()
        return keys

    def _enter(self) -> None:
        self._at += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._bad(f"lists are nested more than {MAX_DEPTH} deep")

    def _leave(self) -> None:
        self._at += 1
        self._depth -= 1


_SKIP_BLANKS: Final = re.compile(r"[ \t]*")
