"""The language of sandbox policies."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.kit.policy import BASE_TEXT, base_rules, parse, render
from madang.testing.policies import PATIENT, layers
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import BASE, NODE, SESSION, SITE, Answer, Check, Layer, Look, When
from madang.wire.policy_base import BASE_RULES, FIXED, NAMES

EXAMPLE = """\
version = 1
widen = [
  "perf",
]

[[deny]]
calls = ["ptrace", "process_vm_readv"]   # no debuggers
with = "EACCES"
why = "no debuggers"

[[check]]
calls = ["socket"]
argument = 0
allow = ["AF_UNIX", 2]
when_argument = 1
when = [-1]
wide = true

[[only]]
calls = ["socket"]
with = "kill"
"""


def test_a_policy_becomes_rules_that_know_their_place() -> None:
    found = parse(EXAMPLE, SITE)

    assert [(w.name, w.line) for w in found.widen] == [("perf", 3)]
    deny, check, only = found.rules
    assert (deny.calls, deny.code, deny.place) == (
        ("ptrace", "process_vm_readv"), errno.EACCES, "site line 6",
    )  # fmt: skip
    assert check.check == Check(argument=0, test=Look.ALLOW, values=(1, 2), wide=True)
    assert check.when == When(argument=1, values=(0xFFFFFFFF,))
    assert only.others
    assert only.answer is Answer.KILL
    assert "execve" in only.calls


def test_the_base_is_written_in_the_language() -> None:
    lines = BASE_TEXT.splitlines()
    for ours, written in zip(BASE_RULES, base_rules(), strict=True):
        assert replace(written, line=0) == ours
        assert lines[written.line] == f'name = "{ours.name}"'


@PATIENT
@given(layers())
def test_what_is_rendered_parses_to_the_same(layer: Layer) -> None:
    again = parse(render(layer.rules), layer.layer)
    assert [replace(r, line=0) for r in again.rules] == [replace(r, line=0) for r in layer.rules]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "version = 1"),
        ("version = 2", 1, "version is 1"),
        ("version = true", 1, "version is 1"),
        ("version = 1\nnet = 1", 2, "'net' is unknown.*known: version, widen"),
        ("version = 1\n[deny]\ncalls = []", 2, r"\[deny\] is unknown"),
        ("version = 1\n\n[[file]]", 3, r"\[\[file\]\] is unknown"),
        ("version = 1\n[[deny]]", 2, "needs calls"),
        ("version = 1\n[[deny]]\ncalls = []", 2, "names 1 to"),
        ("version = 1\n[[deny]]\ncalls = 'ptrace'", 3, "list of texts"),
        ("version = 1\n[[deny]]\ncalls = [\n'ptrace',\n'ptrase']", 5, "did you mean ptrace"),
        ("version = 1\n[[deny]]\ncalls = ['ptrace', 3]", 3, "texts in quotes"),
        ("version = 1\n[[deny]]\ncalls = ['read']", 3, "read is needed by every program"),
        ("version = 1\n[[deny]]\ncalls = ['ptrace']\nwith = 'EWHAT'", 4, "with takes"),
        ("version = 1\n[[deny]]\ncalls = ['ptrace']\nwith = 1", 4, "with takes"),
        ("version = 1\n[[deny]]\ncalls = ['ptrace']\nallow = [1]", 4, "'allow' is unknown"),
        ("version = 1\n[[check]]\ncalls = ['socket']\nargument = 0", 2, "one of allow"),
        ("version = 1\n[[check]]\ncalls = ['socket']\nallow = 1", 2, "needs argument"),
        ("version = 1\n[[check]]\ncalls = ['socket']\nargument = 6\nallow = 1", 4, "0 to 5"),
        ("version = 1\n[[check]]\ncalls = ['socket']\nargument = 0\nallow = 'AF_X'", 5, "AF_X"),
        ("version = 1\n[[check]]\ncalls=['socket']\nargument=0\nallow=4294967296", 5, "32 bits"),
        ("version = 1\n[[check]]\ncalls=['socket']\nargument=0\nallow=[]", 5, "1 to 64"),
        ("version = 1\n[[check]]\ncalls=['socket']\nargument=0\nallow=1\nwhen=2", 2, "together"),
        ("version = 1\n[[check]]\ncalls=['openat']\nargument=1\nallow=1", 3, "an address"),
        (
            "version = 1\n[[check]]\ncalls=['mmap']\nargument=2\nallow=1\nwith='kill'",
            3,
            "can't kil",
        ),
        ("version = 1\n[[check]]\ncalls=['socket']\nargument=0\ndeny=1\nwide=true", 6, "wide goes"),
        ("version = 1\n[[deny]]\ncalls = ['ptrace']\nwhy = 'a\\\\'\nname = 1", 5, "takes a text"),
        ('version = 1\n[[deny]]\ncalls = ["ptrace"]\nwhy = "a\\nb"', 4, "printable"),
        ("version = 1\nwiden = ['perf', 'none']", 2, "no rule of the base"),
        ("version = 1\nwiden = ['io-uring']", 2, "other rules stand on it"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(PolicyInvalid, match=words) as caught:
        parse(text, SITE)
    assert caught.value.details == {"line": line}
    assert f"line {line}:" in caught.value.text


def test_who_starts_a_session_can_not_widen() -> None:
    with pytest.raises(PolicyInvalid, match="only an administrator"):
        parse("version = 1\nwiden = ['perf']", SESSION)
    for layer in (SITE, NODE):
        assert parse("version = 1\nwiden = ['perf']", layer).widen


def test_every_rule_that_the_others_stand_on_is_one_of_the_base() -> None:
    assert set(NAMES) > FIXED


def test_a_policy_has_a_largest_size() -> None:
    with pytest.raises(PolicyInvalid, match="longer than"):
        parse("#" * 70_000, SITE)
    with pytest.raises(PolicyInvalid, match="at most 256 rules"):
        parse("version = 1\n" + "[[deny]]\ncalls = ['ptrace']\n" * 257, SITE)


WORDS = st.sampled_from(
    ["version = 1\n", "[[deny]]\n", "[[check]]\n", "[[only]]\n", "calls = ['ptrace']\n",
     "calls = ['socket', 'mmap']\n", "with = 'kill'\n", "with = 'EPERM'\n", "argument = 0\n",
     "allow = [1, 2]\n", "deny = 'AF_INET'\n", "deny_bits = 4\n", "wide = true\n", "when = 1\n",
     "when_argument = 1\n", "widen = ['perf']\n", "why = 'x'\n", "name = 'n'\n", "x = [", "\n"]
)  # fmt: skip


@PATIENT
@given(st.lists(WORDS, max_size=12).map("".join) | st.text(max_size=100))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    for layer in (BASE, SITE, SESSION):
        try:
            assert parse(text, layer).layer == layer
        except PolicyInvalid as exc:
            assert exc.details["line"] >= 1
