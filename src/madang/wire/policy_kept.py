"""What a machine must be able to do so that it keeps a policy.

For each of its runtimes a machine says which *kinds* of rules it keeps. A session goes only where
all kinds of its layers are kept, but for those that its scaling group does without.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from madang.wire.policy import UNENFORCED, Answer, Layer

RULES: Final = "rules"
"""Any rule at all needs it, and widening, too: nobody does without."""
LOGS: Final = "logs"
KINDS: Final[Mapping[str, str]] = {
    RULES: "rules about system calls",
    LOGS: "rules that only log system calls",
    "files": "rules about files",
    "writes": "rules about changing files",
    "nets": "rules about addresses",
    "counts": "rules about numbers of calls",
    "answers": "rules about what calls answer",
    "watches": "rules that watch calls",
}
"""Fields of a ``Sandbox``, and those of its rules that only log, in words."""
KEEPS_FACT: Final = "keeps."
"""Of a machine, with the name of a runtime behind: the kinds that it keeps."""
UNKEPT_FACT: Final = "unkept"
ACCEPTED: Final = "accepted"
"""Its root does without those that it can't keep."""


def kinds_of(layer: Layer) -> dict[str, str]:
    """The kinds that *layer* has → the place of the first rule of each."""
    found = {kind: getattr(layer, kind) for kind in KINDS if kind not in {RULES, LOGS}}
    found[LOGS] = [rule for rule in layer.rules if rule.answer is Answer.LOG]
    places = {kind: rules[0].place for kind, rules in found.items() if rules}
    if layer:
        lines = [each.line for each in (*layer.every, *layer.widen)]
        places[RULES] = f"{layer.layer} line {min(lines)}"
    return {kind: places[kind] for kind in KINDS if kind in places}


def accepted_as(kind: str) -> str:
    """What ``accept_unenforced`` calls it; empty: nobody can do without."""
    if kind == LOGS:
        return RULES
    return kind if kind in UNENFORCED and kind != RULES else ""


def first_places(found: Iterable[Mapping[str, str]], accepts: Collection[str]) -> dict[str, str]:
    """Of several layers, in their order, without the kinds that a group does without."""
    places: dict[str, str] = {}
    for layer in found:
        for kind, place in layer.items():
            if accepted_as(kind) not in accepts:
                places.setdefault(kind, place)
    return places
