"""The tightest limit counts, and is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.manager.limits.rules import counting
from madang.manager.limits.types import KINDS, Asked, Check, Counts, IdleKind, InForce, Limits
from madang.wire.errors import Conflict, LimitExceeded, LimitRefused

SLOTS = ("cpu_milli", "mem_bytes", "disk_bytes", "pids")


def in_force(account: str, **limits: object) -> InForce:
    return InForce(
        account=account,
        shown=account.replace(":", " "),
        name=f"of-{account.partition(':')[0]}",
        version=1,
        target=account,
        text="",
        limits=Limits(**limits),  # type: ignore[arg-type]
    )


amounts = st.dictionaries(st.sampled_from(SLOTS), st.integers(0, 20))
several = st.lists(st.sampled_from(KINDS), unique=True).flatmap(
    lambda kinds: st.tuples(*[st.tuples(st.just(kind), amounts, amounts) for kind in kinds])
)


@given(amounts, several)
def test_what_is_over_is_over_and_nothing_leaves_less(
    asked: Mapping[str, int], accounts: tuple[tuple[str, Mapping[str, int], Mapping[str, int]], ...]
) -> None:
    rules = [in_force(f"{kind}:x", at_once=limits) for kind, limits, _ in accounts]
    held = {f"{kind}:x": slots for kind, _, slots in accounts}
    found = counting.over(asked, rules, held)
    parts = [
        (max(0, limit - held[by.account].get(slot, 0)) / asked[slot], by.account, slot)
        for by in rules
        for slot, limit in by.limits.at_once.items()
        if asked.get(slot, 0) > 0
    ]
    too_little = [part for part in parts if part[0] < 1]
    assert (found is None) == (not too_little)
    if found is not None:
        assert (found.left / found.asked, found.by.account, found.slot) in too_little
        assert found.left / found.asked == min(part[0] for part in parts)
        assert found.by.shown in found.text
        assert found.code.startswith(f"limit.{found.by.account.partition(':')[0]}.")


def test_the_text_names_whose_limit_and_what_is_left() -> None:
    rules = [
        in_force("user:ann", at_once={"cpu_milli": 64_000}),
        in_force("project:lab", at_once={"cpu_milli": 8000}),
    ]
    held = {"project:lab": {"cpu_milli": 6500}}
    found = counting.over({"cpu_milli": 2000}, rules, held)
    assert found is not None
    assert found.code == "limit.project.cpu"
    assert found.text == (
        "project lab: cpu 8 at once, 6.5 used, asks 2 → 1.5 left. Stop a session (`madang ps`), or "
        "ask an administrator for more (limits of-project: `madang limits of`)."
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS), st.none() | st.integers(0, 5), st.none() | st.integers(0, 5),
            st.integers(0, 5), st.integers(0, 5),
        ),
        unique_by=lambda item: item[0],
    )
)  # fmt: skip
def test_nobody_gets_one_session_more_than_any_limit(
    accounts: list[tuple[str, int | None, int | None, int, int]],
) -> None:
    rules = [in_force(f"{k}:x", sessions=most, pending=wait) for k, most, wait, _, _ in accounts]
    held = {f"{k}:x": Counts(sessions=has, pending=waits) for k, _, _, has, waits in accounts}
    error = counting.refusal(Asked(slots={}, time_s=None), rules, held, {})
    lefts = {
        (what, by.account): limit - count
        for by in rules
        for what, limit, count in (
            ("sessions", by.limits.sessions, held[by.account].sessions),
            ("pending", by.limits.pending, held[by.account].pending),
        )
        if limit is not None
    }
    assert (error is None) == all(left > 0 for left in lefts.values())
    if error is not None:
        assert isinstance(error, LimitExceeded)
        what, account = error.details["what"], error.details["account"]
        assert lefts[what, account] == min(n for (w, _), n in lefts.items() if w == what)


def test_a_session_larger_than_a_limit_is_refused_for_good() -> None:
    rules = [
        in_force("user:ann", session={"mem_bytes": 4 << 30}),
        in_force("project:lab", at_once={"mem_bytes": 2 << 30}),
    ]
    error = counting.refusal(Asked(slots={"mem_bytes": 8 << 30}, time_s=None), rules, {}, {})
    assert isinstance(error, LimitRefused)
    assert error.details["account"] == "project:lab"
    assert error.text.startswith("project lab: mem 2 GiB at once, asked 8 GiB. Ask for less")


def test_the_shortest_time_is_given_and_a_longer_one_refused() -> None:
    rules = [in_force("user:ann", time_s=7200.0), in_force("project:lab", time_s=3600.0)]
    assert counting.time_limit(Asked(slots={}, time_s=None), rules) == 3600.0
    assert counting.time_limit(Asked(slots={}, time_s=60.0), rules) == 60.0
    assert counting.time_limit(Asked(slots={}, time_s=None), []) is None
    error = counting.refusal(Asked(slots={}, time_s=5400.0), rules, {}, {})
    assert isinstance(error, LimitRefused)
    assert error.text.startswith("project lab: a session runs at most 1h, asked 1h30m.")


def test_who_has_spent_the_month_waits_for_the_next() -> None:
    rules = [in_force("user:ann", cpu_hours=10), in_force("project:lab", cpu_hours=100)]
    asked = Asked(slots={}, time_s=None)
    hours = {"user:ann": 9.9, "project:lab": 101.5}
    error = counting.refusal(asked, rules, {}, hours)
    assert isinstance(error, LimitExceeded)
    assert error.details["account"] == "project:lab"
    assert "100 CPU-hours a month, 101.5 used" in error.text
    assert counting.refusal(asked, rules[:1], {}, hours) is None


def test_the_month_is_that_of_utc() -> None:
    now = datetime(2026, 3, 1, 0, 30, tzinfo=UTC).timestamp()
    assert counting.month_of(now) == datetime(2026, 3, 1, tzinfo=UTC).timestamp()
    assert counting.month_of(now - 3600) == datetime(2026, 2, 1, tzinfo=UTC).timestamp()


def test_protection_is_as_long_as_the_tightest_allows() -> None:
    check = (Check(kind=IdleKind.CPU, after_s=60.0),)
    rules = [
        in_force("user:ann", idle=check, protect_s=7200.0),
        in_force("project:lab", idle=check, protect_s=3600.0),
        in_force("domain:d", protect_s=60.0),
    ]
    assert counting.protection(rules, "s", None) == 3600.0
    assert counting.protection(rules, "s", 10.0) == 10.0
    assert counting.protection(rules, "s", 0.0) == 0.0
    with pytest.raises(LimitRefused, match="project lab"):
        counting.protection(rules, "s", 3601.0)
    with pytest.raises(Conflict, match="nothing stops s"):
        counting.protection([replace(rules[2])], "s", None)
