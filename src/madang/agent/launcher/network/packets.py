"""DNS messages (RFC 1035): questions of sessions, answers of resolvers. All of it is hostile.

Each function raises ValueError for what makes no sense.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

MAX_PLAIN: Final = 512
"""Bytes of a UDP answer to who does not say that it takes more."""
MAX_ANSWER: Final = 1232
"""What we take from a resolver: passes every link in one piece."""
MAX_TCP: Final = 65535
NO_ERROR, SERVER_FAILED, NO_SUCH_NAME, NOT_IMPLEMENTED = 0, 2, 3, 4
ADDRESS: Final = 1
_ALIAS, _OPTIONS, _INTERNET = 5, 41, 1
_HEADER: Final = struct.Struct("!HHHHHH")
_RECORD: Final = struct.Struct("!HHIH")
_ANSWER, _OPCODE, _CUT, _RECURSE, _CAN_RECURSE = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080
_MAX_NAME: Final = 253
_MAX_JUMPS: Final = 32
_MAX_RECORDS: Final = 512


@dataclass(frozen=True, slots=True)
class Question:
    number: int
    name: str
    """Lower case, without the last dot; what is not printable ASCII stands as ``?``."""
    kind: int
    plain: bytes
    """As it was asked."""
    room: int
    """Largest answer that the asker takes by UDP."""


@dataclass(frozen=True, slots=True)
class Found:
    """A resolver's answer."""

    addresses: tuple[tuple[int, int], ...]
    """(IPv4 address, seconds that it holds) of the name itself, aliases followed."""
    body: bytes
    """Without the header, as far as it is of use to the asker."""
    counts: tuple[int, int, int]
    flags: int


def read_question(data: bytes) -> Question:
    number, flags, questions, answers, _, more = _unpack(_HEADER, data, 0)
    if flags & (_ANSWER | _OPCODE) or questions != 1 or answers:
        raise ValueError("no plain question")
    name, end = _read_name(data, 12)
    kind, family = _unpack(struct.Struct("!HH"), data, end)
    if family != _INTERNET:
        raise ValueError("not of the internet")
    end += 4
    room = MAX_PLAIN
    if more and data[end : end + 3] == b"\0\0\x29":
        room = max(MAX_PLAIN, min(MAX_ANSWER, int.from_bytes(data[end + 3 : end + 5])))
    return Question(number, name, kind, data[12:end], room)


def ask(question: Question, number: int) -> bytes:
    """The question for a resolver."""
    options = b"\0" + struct.pack("!HHIH", _OPTIONS, MAX_ANSWER, 0, 0)
    return _HEADER.pack(number, _RECURSE, 1, 0, 0, 1) + question.plain + options


def refuse(question: Question, code: int) -> bytes:
    """An answer without records."""
    flags = _ANSWER | _RECURSE | _CAN_RECURSE | code
    return _HEADER.pack(question.number, flags, 1, 0, 0, 0) + question.plain


def read_answer(data: bytes, question: Question, number: int) -> Found:
    """A resolver's answer to ``ask(question, number)``."""
    told, flags, questions, answers, authorities, more = _unpack(_HEADER, data, 0)
    start = 12 + len(question.plain)
    asked = data[12:start]
    if told != number or not flags & _ANSWER or questions != 1:
        raise ValueError("no answer to this")
    if asked.lower() != question.plain.lower():
        raise ValueError("an answer to another question")
    if answers + authorities + more > _MAX_RECORDS:
        raise ValueError("too many records")
    names, addresses, at = {question.name}, [], start
    for _ in range(answers):
        name, kind, seconds, value, at = _read_record(data, at)
        if name in names and kind == _ALIAS:
            names.add(_read_name(data, value)[0])
        elif name in names and kind == ADDRESS and at - value == 4:
            addresses.append((int.from_bytes(data[value:at]), seconds))
    # What lies behind the answers helps nobody here.
    return Found(tuple(addresses), data[start:at], (answers, 0, 0), flags)


def answer(found: Found, question: Question, room: int) -> bytes:
    """For the asker; only the word that it was cut where there is no room for it."""
    flags = found.flags & ~_CUT | _CAN_RECURSE
    whole = _HEADER.pack(question.number, flags, 1, *found.counts) + question.plain + found.body
    if len(whole) <= room and not (found.flags & _CUT and room < MAX_TCP):
        return whole
    return _HEADER.pack(question.number, flags | _CUT, 1, 0, 0, 0) + question.plain


def _read_record(data: bytes, at: int) -> tuple[str, int, int, int, int]:
    """(name, kind, seconds, where its value begins, where it ends)"""
    name, at = _read_name(data, at)
    kind, _, seconds, length = _unpack(_RECORD, data, at)
    value = at + _RECORD.size
    if value + length > len(data):
        raise ValueError("it ends too early")
    return name, kind, seconds if seconds < 1 << 31 else 0, value, value + length


def _read_name(data: bytes, at: int) -> tuple[str, int]:
    """(the name, where what follows begins)"""
    labels: list[str] = []
    end, jumps, length = 0, 0, 0
    while True:
        if at >= len(data):
            raise ValueError("it ends too early")
        size = data[at]
        if size & 0xC0 == 0xC0:
            jumps += 1
            if jumps > _MAX_JUMPS or at + 1 >= len(data):
                raise ValueError("a name without an end")
            end = end or at + 2
            at = (size & 0x3F) << 8 | data[at + 1]
            continue
        at += 1
        if size & 0xC0 or at + size > len(data):
            raise ValueError("no name")
        if size == 0:
            return ".".join(labels), end or at
        length += size + 1
        if length > _MAX_NAME + 1:
            raise ValueError("too long a name")
        labels.append(_label(data[at : at + size]))
        at += size


def _label(raw: bytes) -> str:
    """A dot inside of a label must not look like one between two."""
    return "".join(chr(c) if 0x21 <= c < 0x7F and c != 0x2E else "?" for c in raw.lower())


def _unpack(form: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
    if at + form.size > len(data):
        raise ValueError("it ends too early")
    return form.unpack_from(data, at)
