"""What a session did becomes a policy: it covers all of it, and no more than it must."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from madang.agent.launcher import patterns
from madang.kit import policy
from madang.kit.judging import _pattern, judge_live
from madang.kit.learning import LEARN, propose, with_learning
from madang.wire.policy import (
    MAX_PATTERNS,
    SESSION,
    Answer,
    Layer,
    Refusal,
    Sandbox,
    merge,
)
from madang.wire.policy_base import NEEDED, known_calls
from madang.wire.policy_live import FILES_NEEDED

NAMES = st.sampled_from(
    ["usr", "lib", "work", "tmp", "a", "b", "c d", "e*", "é", "x.so.1", "\\x0a"]
)
PATHS = st.lists(NAMES, min_size=1, max_size=5).map(lambda names: "/" + "/".join(names))
PORTS = st.integers(0, 65535)
ADDRESSES = st.one_of(
    st.builds(lambda a, p: f"{a}:{p}", st.ip_addresses(v=4), PORTS),
    st.builds(lambda a, p: f"[{a}]:{p}", st.ip_addresses(v=6), PORTS),
)
THINGS = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(sorted(known_calls()))),
    st.tuples(st.sampled_from(["open", "execute"]), PATHS),
    st.tuples(st.sampled_from(["connect", "bind"]), ADDRESSES),
)


def records(used: Iterable[tuple[str, str]]) -> list[Refusal]:
    return [
        Refusal(at=0.0, layer=SESSION, line=1, what=what, object=thing, name=LEARN, answer="log")
        for what, thing in used
    ]


def learned(used: Iterable[tuple[str, str]]) -> Layer:
    return policy.parse(propose(records(used), "trial"), SESSION)


def passes(sandbox: Sandbox, what: str, thing: str) -> bool:
    judged, rule = judge_live(sandbox, what, thing)
    assert judged
    return rule is None


@given(st.lists(THINGS, max_size=300))
def test_all_that_was_used_passes(used: list[tuple[str, str]]) -> None:
    sandbox = merge([learned(used)])
    for what, thing in used:
        assert passes(sandbox, what, thing), thing


@given(st.lists(THINGS, max_size=12))
def test_what_was_not_used_is_refused(used: list[tuple[str, str]]) -> None:
    assume(not any("\\x0a" in thing for _, thing in used))  # It becomes a star: any name.
    sandbox = merge([learned(used)])
    for what in ("open", "execute"):
        assert not passes(sandbox, what, "/never/used")
    for what in ("connect", "bind"):
        assert not passes(sandbox, what, "203.0.113.9:7") or ("203.0.113.9" in str(used))


@given(st.sets(st.sampled_from(sorted(known_calls())), max_size=400))
def test_calls_that_were_not_made_are_refused_but_for_those_that_every_program_makes(
    used: set[str],
) -> None:
    sandbox = merge([learned(("call", name) for name in used)])
    refused = {name for name in known_calls() if not passes(sandbox, "call", name)}

    assert refused == (known_calls() - used - NEEDED if used else set())


@pytest.mark.parametrize("used", [[], [("call", "")], [("call", ""), ("call", "mount")]])
def test_where_calls_were_not_all_written_down_none_is_refused(used: list[tuple[str, str]]) -> None:
    assert learned(used).rules == ()
    assert "# System calls were not written down" in propose(records(used), "trial")


def test_many_files_become_folders_and_never_the_whole_machine() -> None:
    used = [("open", f"/usr/lib/python3.11/m{n}.py") for n in range(900)]
    used += [("open", f"/usr/lib/d{n}/f") for n in range(3)]
    used += [("open", f"/work/{n}") for n in range(50)]
    rule = next(r for r in learned(used).files if r.access == ("open",))
    assert rule.patterns == (
        "/usr/lib/d0/f", "/usr/lib/d1/f", "/usr/lib/d2/f", "/usr/lib/python3.11/**", "/work/**",
    )  # fmt: skip


def test_thousands_of_places_still_fit_into_a_rule() -> None:
    used = [("open", f"/opt/p{n}/q{n}/file") for n in range(4000)]
    used += [("connect", f"{ipaddress.ip_address(0x0A000000 + n * 999)}:443") for n in range(4000)]
    layer = learned(used)
    assert all(len(rule.patterns) <= MAX_PATTERNS for rule in layer.files)
    assert all(len(rule.targets) <= MAX_PATTERNS for rule in layer.nets)
    assert "/opt/**" in layer.files[0].patterns


def test_what_could_not_be_written_down_is_let_pass() -> None:
    sandbox = merge([learned([("open", ""), ("connect", "")])])
    assert passes(sandbox, "open", "/etc/anything")
    assert passes(sandbox, "connect", "192.0.2.1:5")
    assert not passes(sandbox, "bind", "0.0.0.0:80")


@pytest.mark.parametrize("own", ["", "version = 1\n\n[[deny]]\ncalls = ['ptrace']\n"])
def test_learning_adds_rules_that_refuse_nothing(own: str) -> None:
    layer = policy.parse(with_learning(own), SESSION)
    added = [rule for rule in layer.every if rule.name == LEARN]
    assert len(added) == 4
    assert {rule.answer for rule in added} == {Answer.LOG}
    assert all(not getattr(rule, "patterns", getattr(rule, "targets", ())) for rule in added)
    assert len(layer.rules) == bool(own)


PATTERNS = st.one_of(
    st.sampled_from(FILES_NEEDED),
    st.lists(
        st.sampled_from(["**", "*", "a", "usr", "*.so*", "x.so.1"]), min_size=1, max_size=4
    ).map(lambda parts: "/" + "/".join(parts)),
)


@given(PATTERNS, PATHS)
def test_patterns_are_judged_as_the_guard_judges_them(pattern: str, path: str) -> None:
    guard = patterns.compiled([pattern]).fullmatch(path)
    assert bool(_pattern(pattern).fullmatch(path)) is bool(guard)
