"""What a kernel's sandbox policy has refused, as its keeper writes it down.

``io/main/refusals`` holds lines of JSON, a ``wire.policy.Refusal`` each. One that says the same but
for its number follows an older one and replaces it; keepers bound how many there can be.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Final

from madang.kit.codec import from_json
from madang.wire.errors import InvalidRequest
from madang.wire.policy import Refusal

REFUSALS: Final = "refusals"
MAX_BYTES: Final = 16 * 1024 * 1024
"""Read at once: more than a keeper ever writes."""

Key = tuple[str, int, str, str]


def key_of(refusal: Refusal) -> Key:
    """The rule, and what it refused."""
    return refusal.layer, refusal.line, refusal.what, refusal.object


class Reading:
    """One reader's place in one file, which grows and now and then is written anew."""

    def __init__(self, folder: str) -> None:
        self._path: Final = os.path.join(folder, REFUSALS)
        self._file: tuple[int, int] | None = None
        self._at = 0

    def news(self) -> list[Refusal]:
        """What was written since, perhaps known already, in its order. Blocks."""
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                which = found.st_dev, found.st_ino
                if which != self._file or found.st_size < self._at:
                    self._file, self._at = which, 0
                file.seek(self._at)
                data = file.read(MAX_BYTES)
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]  # what has no end is still being written
        self._at += len(whole)
        return list(_parsed(whole.splitlines()))


def _parsed(lines: Iterable[bytes]) -> Iterator[Refusal]:
    for line in lines:
        with contextlib.suppress(InvalidRequest):
            yield from_json(Refusal, line)


def read_refusals(folder: str) -> list[Refusal]:
    """Each once with its newest number, in the order in which they came first. Blocks."""
    return list({key_of(each): each for each in Reading(folder).news()}.values())


def were_any(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, REFUSALS))


class Counting:
    """How often each rule has refused anything."""

    def __init__(self, folder: str) -> None:
        self._reading: Final = Reading(folder)
        self._counts: Final[dict[Key, int]] = {}
        self._places: Final[dict[str, int]] = {}

    def now(self) -> dict[str, int]:
        """``site line 3`` → how often. Blocks."""
        for each in self._reading.news():
            key, place = key_of(each), f"{each.layer} line {each.line}"
            more = each.count - self._counts.get(key, 0)
            self._counts[key] = each.count
            self._places[place] = self._places.get(place, 0) + more
        return dict(self._places)
