"""Parts of guards on their own: patterns, the filter that hands calls over, refusals, patience."""

from __future__ import annotations

import json
import os
import platform
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.agent.launcher.test_seccomp import interpret

from madang.agent.launcher import channel, landlock, notify
from madang.agent.launcher.filters import Filters
from madang.agent.launcher.keeper_guard import SILENCE_S, Ward
from madang.agent.launcher.pace import Pace
from madang.agent.launcher.patterns import (
    compiled,
    folders_held,
    folders_of,
    holds_all_of,
    may_lie_under,
)
from madang.agent.launcher.refusals import MAX_REFUSALS, Book, Refusals, shown
from madang.kit.policy import parse
from madang.testing.policies import PATIENT
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import SITE, Answer, FileRule, Sandbox, merge
from madang.wire.policy_live import UNCOUNTED
from madang.wire.syscalls import numbers

ARCH = platform.machine()
NAMES = st.sampled_from(["a", "b", "ab", "secret", "x.y"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
PARTS = st.sampled_from(["a", "b", "*", "a*", "*b", "**", "x.y", "secret"])
PATTERNS = st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))


def rules(text: str) -> Sandbox:
    return merge([parse(f"version = 1\n{text}", SITE)])


def matches(parts: list[str], names: list[str]) -> bool:
    """By brute force, apart from the code under test."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(matches(parts[1:], names[at:]) for at in range(len(names) + 1))
    return bool(names) and _name(parts[0], names[0]) and matches(parts[1:], names[1:])


def _name(part: str, name: str) -> bool:
    if part == "*":
        return True
    if part.endswith("*"):
        return name.startswith(part[:-1])
    return name.endswith(part[1:]) if part.startswith("*") else name == part


@PATIENT
@given(pattern=PATTERNS, path=PATHS)
def test_patterns_mean_what_they_say(pattern: str, path: str) -> None:
    found = bool(compiled([pattern]).fullmatch(path))

    assert found == matches(pattern[1:].split("/"), path[1:].split("/"))


@PATIENT
@given(pattern=PATTERNS, folder=PATHS, below=PATHS)
def test_a_mount_that_is_not_asked_about_has_nothing_to_judge(
    pattern: str, folder: str, below: str
) -> None:
    for path in (folder, folder + below):
        named = bool(compiled([pattern]).fullmatch(path))
        assert may_lie_under(pattern, folder) or not named
        assert not holds_all_of(pattern, folder) or named


@PATIENT
@example(pattern="/*/*", folder="/", name="z")
@given(pattern=PATTERNS, folder=st.one_of(st.just("/"), PATHS), name=st.one_of(NAMES, st.just("z")))
def test_what_is_known_of_a_folder_is_true_of_all_in_it(
    pattern: str, folder: str, name: str
) -> None:
    named = bool(compiled([pattern]).fullmatch(folder.rstrip("/") + "/" + name))

    assert compiled(folders_of(pattern)).fullmatch(folder) or not named
    assert not compiled(folders_held(pattern)).fullmatch(folder) or named


def test_folders_that_a_rule_does_not_speak_of_are_most() -> None:
    folders = compiled([*folders_of("/usr/bin/gcc"), *folders_of("/opt/**")])

    assert [
        f for f in ("/", "/usr", "/usr/bin", "/opt", "/opt/a", "/o") if folders.fullmatch(f)
    ] == [
        "/",
        "/usr/bin",
        "/opt",
        "/opt/a",
    ]


def test_no_pattern_names_nothing() -> None:
    assert not compiled([]).fullmatch("/")
    assert compiled(["/**"]).fullmatch("/any/thing")


@pytest.mark.parametrize("calls", [{"execve"}, {"clone", "execve", "openat"}, set(numbers(ARCH))])
def test_a_filter_hands_over_what_is_named_and_no_thread(calls: set[str]) -> None:
    calls = set(sorted(calls)[: notify.MAX_CALLS])
    program = notify.program(calls)
    for name, number in numbers(ARCH).items():
        data = struct.pack("<IIQ6Q", number, notify._ARCH[ARCH], 0, *[0] * 6)
        assert (interpret(program, data) == notify._NOTIFY) == (name in calls), name
    thread = [notify.CLONE_THREAD | 0x100, *[0] * 5]
    data = struct.pack("<IIQ6Q", numbers(ARCH)["clone"], notify._ARCH[ARCH], 0, *thread)
    assert interpret(program, data) == notify._ALLOW


COUNTED = sorted(set(numbers("x86_64")) - UNCOUNTED)[: notify.MAX_CALLS + 1]
MANY_CALLS = f"[[count]]\ncalls = {json.dumps(COUNTED)}\nlimit = 1"
MANY_DOMAINS = "[[write]]\nonly = ['/tmp']\n" * (landlock.MAX_DOMAINS + 1)


@pytest.mark.parametrize("text", [MANY_CALLS, MANY_DOMAINS])
def test_more_than_the_kernel_takes_is_said_before_a_session_starts(text: str) -> None:
    asked = rules(text)
    with pytest.raises(PolicyInvalid, match="more than"):
        Filters((), accept_unkept=True).of(asked)


def rule(line: int = 1, answer: Answer = Answer.ERRNO) -> FileRule:
    return FileRule(layer=SITE, line=line, patterns=("/a",), answer=answer, why="x")


def test_refusals_are_bounded_and_counted() -> None:
    found = Refusals()
    for number in range(MAX_REFUSALS + 500):
        found.add(rule(), "open", f"/a/{number}", 0)
    found.add(rule(), "open", "/a/0", 0)
    told: list[dict[str, Any]] = []
    while news := found.take(at_once=True):
        told += news

    assert len(told) == MAX_REFUSALS + 1
    assert sum(each["count"] for each in told) == MAX_REFUSALS + 501
    assert max(told, key=lambda each: each["count"])["object"] == ""
    assert found.wait_s() is None


def test_what_could_not_be_told_is_told_later() -> None:
    found = Refusals()
    found.add(rule(), "open", "/a", 0)
    news = found.take()
    assert news
    assert found.take() == []
    found.put_back(news)
    assert found.take(at_once=True) == news


def test_names_can_do_nothing_to_who_reads_them() -> None:
    assert shown("/a\x1b[2J\udcff\n") == "/a\\x1b[2J\\xff\\x0a"
    assert len(shown("x" * 4000)) == 300


def test_a_book_is_written_anew_when_it_has_grown(tmp_path: Path) -> None:
    book = Book(str(tmp_path))
    path = tmp_path / "refusals"
    line = {"layer": SITE, "line": 1, "what": "open", "object": "/a", "why": "x" * 150}
    for count in range(10_000):
        book.write([line | {"count": count}])
        assert path.stat().st_size < 1.2 * 1024 * 1024
    assert json.loads(path.read_text().splitlines()[-1])["count"] == 9_999
    assert book.changes == 10_000


class Times:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_guard_that_is_silent_is_lost_and_one_that_answers_is_not(tmp_path: Path) -> None:
    ours, theirs = channel.pair()
    clock = Times()
    ward = Ward(
        ours, str(tmp_path), begin=lambda: None, fail=lambda _: None, news=lambda _: None,
        clock=clock,
    )  # fmt: skip
    with theirs:
        for _ in range(20):
            clock.now += 10
            ward.keep_time()
            assert channel.receive(theirs) == ({"ping": True}, [])
            channel.send(theirs, {"pong": True})
            ward.hear()
        assert not ward.lost
        began = clock.now
        while not ward.lost:
            clock.now += ward.wait_s()
            ward.keep_time()
        assert SILENCE_S <= clock.now - began <= SILENCE_S + 20
    ward.close()


def test_a_guard_that_hangs_up_is_lost_at_once(tmp_path: Path) -> None:
    ours, theirs = channel.pair()
    held, writer = os.pipe()
    told: list[int] = []
    ward = Ward(
        ours, str(tmp_path), begin=lambda: None, fail=lambda _: None, news=told.append
    )  # fmt: skip
    refusal = {"layer": SITE, "line": 1, "what": "open", "object": "/a", "count": 1}
    channel.send(theirs, {"set": True}, [held])
    channel.send(theirs, {"refused": [refusal]})
    theirs.close()
    os.close(held)
    ward.hear()

    assert ward.lost
    assert told == [1]
    with pytest.raises(BlockingIOError):  # It is held: who writes has a reader.
        os.set_blocking(writer, False)
        while True:
            os.write(writer, b"x" * 4096)
    os.close(writer)
    for fd in ward._held:
        os.close(fd)
    ward.close()


def test_a_session_gets_half_a_processor_of_its_guard() -> None:
    clock, used = Times(), Times()
    pace = Pace(clock, used)
    answered = rested = 0.0
    while clock.now < 10:
        rest = pace.rest_s()
        clock.now += rest or 0.001
        rested += rest
        if not rest:
            used.now += 0.001
            answered += 0.001
    assert 4 < answered < 6
    assert 4 < rested < 6
