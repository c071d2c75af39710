"""What a kernel's sandbox policy has refused, as its keeper writes it down.

``io/main/refusals`` holds lines of JSON, a ``wire.policy.Refusal`` each. One that says the same but
for its number follows an older one and replaces it; keepers bound how many there can be.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from madang.kit.codec import from_json
from madang.wire.errors import InvalidRequest
from madang.wire.policy import Refusal

REFUSALS: Final = "refusals"
MAX_BYTES: Final = 16 * 1024 * 1024
"""Read of one file; what lies beyond was written by nobody that we know."""

Key = tuple[str, int, str, str]


def key_of(refusal: Refusal) -> Key:
    """The rule, and what it refused."""
    return refusal.layer, refusal.line, refusal.what, refusal.object


def read_refusals(folder: str) -> list[Refusal]:
    """Each once with its newest number, in the order in which they came first. Blocks."""
    try:
        with open(os.path.join(folder, REFUSALS), "rb") as file:
            lines = file.read(MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    found: dict[Key, Refusal] = {}
    for line in lines[:-1]:  # what has no end is still being written
        try:
            refusal = from_json(Refusal, line)
        except InvalidRequest:
            continue
        found[key_of(refusal)] = refusal
    return list(found.values())


def count_by_place(refusals: Iterable[Refusal]) -> dict[str, int]:
    """``site line 3`` → how often that rule has refused anything."""
    counts: dict[str, int] = {}
    for each in refusals:
        place = f"{each.layer} line {each.line}"
        counts[place] = counts.get(place, 0) + each.count
    return counts
