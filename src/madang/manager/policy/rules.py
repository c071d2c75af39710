"""Decisions about policies, pure."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final, TypeVar

from madang.kit import policy
from madang.kit.codec import to_json
from madang.kit.judging import judge_live
from madang.manager.http import Caller
from madang.manager.identity.types import ProjectRole, Role
from madang.manager.policy.types import (
    GROUP_PREFIX,
    NODE_PREFIX,
    PROJECT_PREFIX,
    SESSION_PREFIX,
    Place,
    PolicyRow,
    ProjectRow,
    Scope,
    Seat,
)
from madang.wire.errors import Forbidden, InvalidRequest, NotFound, PolicyInvalid
from madang.wire.policies import PolicyReview, PolicyVerdict, ReplayVerdict
from madang.wire.policy import (
    BASE,
    GROUP,
    IMAGE,
    MAX_RULES,
    NODE,
    PROJECT,
    SESSION,
    SITE,
    UNENFORCED,
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
from madang.wire.policy_kept import kinds_of

T = TypeVar("T", bound=Placed | Widening)

MAX_NOTE: Final = 500
MAX_REPLAYED: Final = 5000
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}"
_NAMED: Final = re.compile(f"(group|node):{_NAME}|(project):(?:{_NAME}/)?{_NAME}")
_LABELLED: Final = re.compile(r"\b(site|group|node|project) ([0-9]{1,12})\b")
_PLACE: Final = re.compile(r"([a-z]{1,20}) line ([0-9]{1,9})")
_NO_VERSION: Final = "version = 1\n"


def layer_of(target: str) -> str:
    """Which layer a target's text is. Raises NotFound."""
    if target in {BASE, SITE, IMAGE, SESSION}:
        return target
    if (named := _NAMED.fullmatch(target)) is not None:
        return named[1] or named[2]
    known = "base, site, group:NAME, node:NAME and project:NAME"
    raise NotFound(f"no policy {target[:64]!r}: there are {known}.")


def targets_of(seat: Seat) -> dict[str, str]:
    """Layer → target as stored, of the layers that are in force at a place, in their order."""
    return {
        SITE: SITE,
        GROUP: GROUP_PREFIX + seat.group,
        NODE: NODE_PREFIX + seat.node,
        PROJECT: PROJECT_PREFIX + seat.project,
    }


def plain_place(target: str, *, administers: bool) -> Place:
    """Of a target that is no project's. Raises NotFound for what is none."""
    layer = layer_of(target)
    name = target.partition(":")[2]
    return Place(
        layer=layer,
        key=target,
        shown=target,
        scope=Scope(node=name or None) if layer != GROUP else Scope(group=name),
        changeable=administers,
    )


def project_place(caller: Caller, row: ProjectRow) -> Place:
    return Place(
        layer=PROJECT,
        key=PROJECT_PREFIX + row.id,
        shown=PROJECT_PREFIX + project_name(row, caller.domain_id),
        scope=Scope(project=row.id),
        changeable=caller.administers
        or row.role == ProjectRole.ADMIN
        or _administers_domain(caller, row),
    )


def project_name(row: ProjectRow, domain: str) -> str:
    """As somebody of *domain*, an id, names it."""
    return row.name if row.domain_id == domain else f"{row.domain}/{row.name}"


def sees_project(caller: Caller, row: ProjectRow) -> bool:
    """Whether the caller may know its policy: who works in it, and who administers it."""
    return (
        caller.sees_all
        or row.role is not None
        or row.id == caller.project_id
        or _administers_domain(caller, row)
    )


def _administers_domain(caller: Caller, row: ProjectRow) -> bool:
    return caller.role == Role.DOMAIN_ADMIN and row.domain_id == caller.domain_id


def told(refusal: Refusal, seat: Seat, project: str, admins: Sequence[str]) -> Refusal:
    """With whose policy it was, and who can change it; *project*: its name, *admins*: of it."""
    admin = "an administrator"
    match refusal.layer:
        case "site":
            return replace(refusal, ask=admin)
        case "group":
            return replace(refusal, of=seat.group, ask=admin)
        case "node":
            return replace(refusal, of=seat.node, ask=admin)
        case "project":
            return replace(refusal, of=project, ask=" or ".join(admins) or admin)
    return refusal


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


def accepted(text: str) -> tuple[str, ...]:
    """Of a scaling group's settings: kinds of rules that may go unkept where a machine can't.

    Nothing, where they can't be read: then such sessions do not start.
    """
    try:
        found = tomllib.loads(text).get("accept_unenforced", [])
    except tomllib.TOMLDecodeError:
        return ()
    return tuple(kind for kind in UNENFORCED if isinstance(found, list) and kind in found)


def sandbox_of(
    rows: Sequence[PolicyRow], image: str, session: str, accepts: tuple[str, ...] = ()
) -> Sandbox:
    """What a session gets: the administrators' layers, its image's text, then its own.

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
    return replace(merge(layers, ", ".join(labels)), accepts=accepts)


@lru_cache(maxsize=4096)
def kinds_in(text: str, layer: str) -> Mapping[str, str]:
    """The kinds of rules (``policy_kept``) in a layer's text → the first place of each.

    None of a text that can't be read any more: such a session is refused by its machine.
    """
    try:
        return kinds_of(policy.parse(text, layer)) if text else {}
    except PolicyInvalid:
        return {}


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
