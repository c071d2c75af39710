"""Decisions about policies, pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from madang.kit import policy
from madang.manager.policy.types import NODE_PREFIX, PolicyRow
from madang.wire.errors import InvalidRequest, NotFound, PolicyInvalid
from madang.wire.policies import PolicyReview, PolicyVerdict
from madang.wire.policy import (
    BASE,
    NODE,
    SESSION,
    SITE,
    Answer,
    Layer,
    Rule,
    Sandbox,
    judge,
    merge,
    rules_of,
)
from madang.wire.policy_base import known_calls

MAX_NOTE: Final = 500
_NODE: Final = re.compile(r"node:[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_NO_VERSION: Final = "version = 1\n"


def layer_of(target: str) -> str:
    """Which layer a target's text is. Raises NotFound."""
    if target in {BASE, SITE, SESSION}:
        return target
    if _NODE.fullmatch(target):
        return NODE
    raise NotFound(f"no policy {target[:64]!r}: there are base, site and node:NAME.")


def node_target(node: str) -> str:
    return NODE_PREFIX + node


def check_widen(layer: Layer, allowed: Collection[str]) -> Layer:
    """Raises PolicyInvalid for what root of this server does not let anybody widen."""
    for widening in layer.widen:
        if widening.name not in allowed:
            text = f"policy, line {widening.line}: {widening.name!r} may not be widened here"
            raise PolicyInvalid(
                f"{text}; root can allow it with `sandbox.widen` in the settings.",
                line=widening.line,
            )
    return layer


def check_note(note: str) -> str:
    if len(note) > MAX_NOTE or not (note.isprintable() or not note):
        raise InvalidRequest(f"note: one line of at most {MAX_NOTE} characters.", field="note")
    return note


def sandbox_of(rows: Sequence[PolicyRow], session: str) -> Sandbox:
    """What a session gets: the administrator's layers, then its own text.

    A text that can't be read any more is passed on as broken: such a session does not start.
    """
    layers, labels = [], []
    try:
        for row in rows:
            layers.append(policy.parse(row.text, layer_of(row.target)))
            if layers[-1]:
                labels.append(f"{layers[-1].layer} {row.version}")
        if session:
            layers.append(policy.parse(session, SESSION))
            labels.append(SESSION)
    except PolicyInvalid as exc:
        return Sandbox(broken=exc.text[:200])
    return merge(layers, ", ".join(labels))


def review(target: str, row: PolicyRow | None, draft: Layer) -> PolicyReview:
    """Compare with what is in force."""
    current = row.text if row is not None else _NO_VERSION
    numbers: dict[Rule, int] = {}
    before = _spread(policy.parse(current, draft.layer), numbers)
    after = _spread(draft, numbers)
    stricter, wider, other = [], [], []
    for call in sorted(known_calls()):
        old, new = before[call], after[call]
        if new > old:
            stricter.append(call)
        elif new < old:
            wider.append(call)
        elif new != old:
            other.append(call)
    return PolicyReview(
        target=target,
        version=0 if row is None else row.version,
        rules=len(draft.every),
        stricter=tuple(stricter),
        wider=tuple(wider),
        other=tuple(other),
        current=row.text if row is not None else "",
    )


def _spread(layer: Layer, numbers: dict[Rule, int]) -> dict[str, set[int]]:
    """Call → what is said about it, wherever and in whatever words, what is left of the base too.

    *numbers* gives equal statements the same number; it grows.
    """
    found: dict[str, set[int]] = {call: set() for call in known_calls()}
    for rule in rules_of(merge([layer]), policy.base_rules()):
        stripped = replace(rule, layer="", line=0, name="", why="", calls=(), others=False)
        number = numbers.setdefault(stripped, len(numbers))
        calls = known_calls().intersection(rule.calls)
        for call in known_calls() - calls if rule.others else calls:
            found[call].add(number)
    return found


def verdict(layers: Sequence[Layer], call: str, arguments: Sequence[int]) -> PolicyVerdict:
    """Raises InvalidRequest for what is no call."""
    if call not in known_calls():
        raise InvalidRequest(f"call: {call[:60]!r} is no system call.", field="call")
    if len(arguments) > 6 or not all(0 <= value < 2**64 for value in arguments):
        raise InvalidRequest("arguments: at most six, unsigned 64-bit.", field="arguments")
    full = [*arguments, *[0] * 6][:6]
    rule = judge(rules_of(merge(layers), policy.base_rules()), call, full)
    if rule is None:
        return PolicyVerdict(passes=True)
    return PolicyVerdict(
        passes=rule.answer is Answer.LOG,
        answer=rule.words,
        layer=rule.layer,
        line=rule.line,
        name=rule.name,
        why=rule.why,
    )
