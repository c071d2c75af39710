"""Random sandbox policies, for property tests."""

from __future__ import annotations

from typing import Any, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from madang.wire.errors import PolicyInvalid
from madang.wire.policy import (
    GROUP,
    MAX_ERRNO,
    NODE,
    PROJECT,
    SESSION,
    SITE,
    WIDENING,
    WORD,
    Answer,
    Check,
    Layer,
    Rule,
    When,
    Widening,
)
from madang.wire.policy import Look as ArgumentTest
from madang.wire.policy_base import FIXED, NAMES, NEEDED, check_rule, known_calls

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that have much else to do."""
FEW_CALLS = ("ptrace", "socket", "mmap", "clone", "prctl", "ioctl", "bpf", "kill", "mbind")
WORDS = st.sampled_from([0, 1, 2, 3, 4, 10, 16, WORD, 0x20000, 2**31]) | st.integers(0, WORD)
"""Mostly few: so that rules meet."""
ARGUMENTS = st.lists(
    WORDS | WORDS.map(lambda low: low | 1 << 32) | st.integers(0, 2**64 - 1),
    min_size=6,
    max_size=6,
)
CALLS = st.sampled_from(FEW_CALLS) | st.sampled_from(sorted(known_calls()))


@st.composite
def checks(draw: Any) -> Check:
    test = draw(st.sampled_from(list(ArgumentTest)))
    most = 1 if test is ArgumentTest.DENY_BITS else draw(st.sampled_from([3, 64]))
    return Check(
        argument=draw(st.integers(0, 5)),
        test=test,
        values=tuple(draw(st.lists(WORDS, min_size=1, max_size=most))),
        wide=test is not ArgumentTest.DENY and draw(st.booleans()),
    )


@st.composite
def rules(draw: Any, layer: str, line: int = 0) -> Rule:
    kind = draw(st.sampled_from(["deny", "only", "check"]))
    calls = draw(st.lists(CALLS, min_size=1, max_size=8, unique=True))
    if kind == "only":
        calls = list(dict.fromkeys([*calls, *sorted(NEEDED)]))
    check = draw(checks()) if kind == "check" else None
    values = st.lists(WORDS, min_size=1, max_size=3).map(tuple)
    when = st.none() | st.builds(When, argument=st.integers(0, 5), values=values)
    answer = draw(st.sampled_from(list(Answer)))
    return Rule(
        layer=layer,
        line=line,
        calls=tuple(calls),
        others=kind == "only",
        answer=answer,
        code=draw(st.sampled_from([1, 13, 38, 97])) if answer is Answer.ERRNO else 1,
        check=check,
        when=draw(when) if kind == "check" else None,
        name=draw(st.sampled_from(["", "n"])),
        why=draw(st.sampled_from(["", 'a "reason" \\ this'])),
    )


def _valid(rule: Rule) -> bool:
    try:
        check_rule(rule)
    except PolicyInvalid:
        return False
    return rule.code <= MAX_ERRNO


STACKED: Final = (SITE, GROUP, NODE, PROJECT, SESSION)


@st.composite
def layers(draw: Any, names: tuple[str, ...] = STACKED) -> Layer:
    """One valid layer."""
    name = draw(st.sampled_from(names))
    found = draw(st.lists(rules(name).filter(_valid), max_size=6))
    widen: list[str] = []
    if name in WIDENING:
        widen = draw(st.lists(st.sampled_from(sorted({*NAMES} - FIXED)), max_size=2, unique=True))
    return Layer(
        layer=name,
        rules=tuple(found),
        widen=tuple(Widening(name=each, line=1) for each in widen),
    )


def stacks() -> st.SearchStrategy[list[Layer]]:
    """Layers as they are merged, each at most once."""
    each = [st.lists(layers((name,)), max_size=1) for name in STACKED]
    return st.tuples(*each).map(lambda found: [layer for few in found for layer in few])
