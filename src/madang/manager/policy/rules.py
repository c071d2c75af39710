"""Decisions about policies, pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from madang.kit import policy
from madang.kit.codec import to_json
from madang.kit.judging import judge_live
from madang.manager.policy.types import NODE_PREFIX, SESSION_PREFIX, PolicyRow
from madang.wire.errors import Forbidden, InvalidRequest, NotFound, PolicyInvalid
from madang.wire.policies import PolicyReview, PolicyVerdict, ReplayVerdict
from madang.wire.policy import (
    BASE,
    IMAGE,
    MAX_RULES,
    NODE,
    SESSION,
    SITE,
    Answer,
    Layer,
    Placed,
    Refusal,
    Rule,
    Sandbox,
    Widening,
    WriteRule,
    judge,
    merge,
    rules_of,
)
from madang.wire.policy_base import known_calls

T = TypeVar("T", bound=Placed | Widening)

MAX_NOTE: Final = 500
MAX_REPLAYED: Final = 5000
_NODE: Final = re.compile(r"node:[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LABELLED: Final = re.compile(r"\b(site|node) ([0-9]{1,12})\b")
_PLACE: Final = re.compile(r"([a-z]{1,20}) line ([0-9]{1,9})")
_NO_VERSION: Final = "version = 1\n"


def layer_of(target: str) -> str:
    """Which layer a target's text is. Raises NotFound."""
    if target in {BASE, SITE, IMAGE, SESSION}:
        return target
    if _NODE.fullmatch(target):
        return NODE
    raise NotFound(f"no policy {target[:64]!r}: there are base, site and node:NAME.")


def node_target(node: str) -> str:
    return NODE_PREFIX + node


def session_target(session: str) -> str:
    """*session*: its id."""
    return SESSION_PREFIX + session


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


def sandbox_of(rows: Sequence[PolicyRow], image: str, session: str) -> Sandbox:
    """What a session gets: the administrator's layers, its image's text, then its own.

    A text that can't be read any more is passed on as broken: such a session does not start.
    """
    layers, labels = [], []
    try:
        for row in rows:
            layers.append(policy.parse(row.text, layer_of(row.target)))
            if layers[-1]:
                labels.append(f"{layers[-1].layer} {row.version}")
        for layer, text in ((IMAGE, image), (SESSION, session)):
            if text:
                layers.append(policy.parse(text, layer))
                labels.append(layer)
    except PolicyInvalid as exc:
        return Sandbox(broken=exc.text[:200])
    return merge(layers, ", ".join(labels))


def live_digest(sandbox: Sandbox) -> str:
    """Names the live rules of *sandbox*; none: empty. A broken one has some that nobody knows."""
    if sandbox.broken:
        return "broken"
    return hashlib.sha256(to_json(sandbox.live)).hexdigest()[:16] if sandbox.live else ""


def _words(rule: T) -> T:
    """What it says, wherever it stands."""
    return replace(rule, line=0)


def later(before: Layer, after: Layer) -> tuple[str, ...]:
    """Places of what changed and can't while sessions run: rules about system calls and writing."""
    old, new = _static(before), _static(after)
    known, kept = set(map(_words, old)), set(map(_words, new))
    added = [rule for rule in new if _words(rule) not in known]
    gone = [rule for rule in old if _words(rule) not in kept]
    return (
        *(f"{after.layer} line {rule.line}" for rule in added),
        *(f"former {before.layer} line {rule.line}" for rule in gone),
    )


def _static(layer: Layer) -> tuple[Rule | WriteRule | Widening, ...]:
    return (*layer.rules, *layer.writes, *layer.widen)


def later_than(row: PolicyRow | None, after: Layer) -> tuple[str, ...]:
    """``later``, compared with what is in force; all, where that can't be read any more."""
    try:
        before = policy.parse(_NO_VERSION if row is None else row.text, after.layer)
    except PolicyInvalid:
        before = Layer(layer=after.layer)
    return later(before, after)


def check_stricter(before: Layer, after: Layer) -> None:
    """Raises Forbidden unless *after* has all rules of *before*: then nothing becomes wider."""
    kept = {_words(rule) for rule in after.every}
    for rule in before.every:
        if _words(rule) not in kept:
            text = f"the rule of line {rule.line} is gone or says something else"
            raise Forbidden(
                f"a session's policy can only get more rules while it lives: {text}. "
                "An administrator may replace it."
            )


def check_total(sandbox: Sandbox) -> None:
    """Raises PolicyInvalid where the layers together have more than a machine takes."""
    count = len(sandbox.rules) + len(sandbox.writes) + len(sandbox.live)
    if count > MAX_RULES:
        text = f"all layers together would have {count} rules; the most is {MAX_RULES}."
        raise PolicyInvalid(f"policy: {text}", line=1)


def versions_of(label: str) -> dict[str, int]:
    """Layer → version, of a sandbox's label like ``site 3, session``."""
    return {match[1]: int(match[2]) for match in _LABELLED.finditer(label)}


def news_of(before: Mapping[str, int], after: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """(layer, line) → how much more its rule has refused, of counts by place; bad places: none."""
    found = {}
    for place, refused in after.items():
        match = _PLACE.fullmatch(place)
        if match is not None and refused > before.get(place, 0):
            found[match[1], int(match[2])] = refused - before.get(place, 0)
    return found


def replayed(sandbox: Sandbox, refusal: Refusal) -> ReplayVerdict:
    """What the live rules of *sandbox* say to what a session did."""
    judged, rule = judge_live(sandbox, refusal.what, refusal.object)
    return ReplayVerdict(
        refusal=refusal,
        judged=judged,
        passes=rule is None or rule.answer is Answer.LOG,
        place="" if rule is None else rule.place,
        why="" if rule is None else rule.why,
    )


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
