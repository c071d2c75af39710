"""Refusals on their way: put together in the guard, written down by the keeper.

A session can be refused something a million times a second. What is kept is bounded, and so is how
often anybody hears of it; counts stay exact.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, Final

from madang.wire.policy import MAX_OBJECT, Answer, Placed, Refusal

FILE: Final = "refusals"
MAX_REFUSALS: Final = 1000
"""Distinct pairs of rule and object; later ones are counted by rule alone."""
MAX_LOGGED: Final = 20_000
"""The same of rules that only log."""
MAX_BATCH: Final = 60
_PERIOD_S: Final = 0.05
_SLACK_BYTES: Final = 1024 * 1024

_Key = tuple[str, int, str, str]


class Refusals:
    """The guard's side."""

    def __init__(self) -> None:
        self._known: dict[_Key, Refusal] = {}
        self._news: dict[_Key, None] = {}
        self._logged = 0
        self._next_at = 0.0

    def add(self, rule: Placed, what: str, about: str, pid: int, count: int = 1) -> None:
        """*pid* as we count."""
        about = shown(about)
        key = (rule.layer, rule.line, what, about)
        known = self._known.get(key)
        if known is None and self._is_full(rule):
            about = ""
            key = (rule.layer, rule.line, what, about)
            known = self._known.get(key)
        if known is None:
            logs = rule.answer is Answer.LOG
            self._logged += logs
            known = Refusal(
                at=time.time(), layer=rule.layer, line=rule.line, what=what, object=about,
                name=rule.name, why=rule.why, pid=_inner(pid), count=count, answer=_words(rule),
            )  # fmt: skip
        else:
            known = replace(known, at=time.time(), count=known.count + count)
        self._known[key] = known
        self._news[key] = None

    def _is_full(self, rule: Placed) -> bool:
        if rule.answer is Answer.LOG:
            return self._logged >= MAX_LOGGED
        return len(self._known) - self._logged >= MAX_REFUSALS

    def wait_s(self) -> float | None:
        """Until there is something to tell; None: nothing."""
        return max(0.0, self._next_at - time.monotonic()) if self._news else None

    def take(self, *, at_once: bool = False) -> list[dict[str, Any]]:
        """What is to be told now; often nothing."""
        now = time.monotonic()
        if not self._news or (now < self._next_at and not at_once):
            return []
        self._next_at = now + _PERIOD_S
        keys = list(self._news)[:MAX_BATCH]
        for key in keys:
            del self._news[key]
        return [asdict(self._known[key]) for key in keys]

    def put_back(self, told: Iterable[dict[str, Any]]) -> None:
        """It could not be told."""
        for each in told:
            self._news[each["layer"], each["line"], each["what"], each["object"]] = None


def shown(text: str) -> str:
    """Printable, and not longer than a refusal's object may be."""
    if not text.isprintable():
        text = "".join(char if char.isprintable() else _escaped(char) for char in text)
    return text if len(text) <= MAX_OBJECT else text[: MAX_OBJECT - 1] + "…"


def _escaped(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))


def _words(rule: Placed) -> str:
    if rule.answer is Answer.ERRNO:
        return rule.words
    return rule.answer.value if rule.answer is Answer.LOG else "SIGKILL"


def _inner(pid: int) -> int:
    """As the process itself counts; 0: it has gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("NSpid:"):
                    return int(line.split()[-1])
    except OSError:
        pass
    return 0


class Book:
    """The keeper's side: ``io/main/refusals``, a JSON object a line.

    The last line about the same rule, act and object counts.
    """

    def __init__(self, folder: str) -> None:
        self._path = f"{folder}/{FILE}"
        self._known: dict[_Key, str] = {}
        self._size = 0
        self._bytes = 0
        self.changes = 0
        """Grows with each change."""

    def write(self, refusals: Iterable[dict[str, Any]]) -> None:
        """A full disk loses lines until the next change is written."""
        lines = []
        for each in refusals:
            line = json.dumps(each) + "\n"
            key = (each["layer"], each["line"], each["what"], each["object"])
            self._bytes += len(line) - len(self._known.get(key, ""))
            self._known[key] = line
            lines.append(line)
        try:
            if self._size > 2 * self._bytes + _SLACK_BYTES:
                self._write_anew()
            else:
                self._append("".join(lines))
        except OSError:
            self._size = 4 * (self._bytes + _SLACK_BYTES)  # Anew, the next time.
        self.changes += len(lines)

    def _append(self, text: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        _put(os.open(self._path, flags, 0o600), text)
        self._size += len(text)

    def _write_anew(self) -> None:
        temporary = f"{self._path}.new"
        flags = os.O_WRONLY | os.O_TRUNC | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        _put(os.open(temporary, flags, 0o600), "".join(self._known.values()))
        os.rename(temporary, self._path)
        self._size = self._bytes


def _put(fd: int, text: str) -> None:
    try:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
