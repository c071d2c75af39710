"""When the machine's memory is short."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent.launcher import cgroups, pressure
from madang.agent.launcher.pressure import few_left, stalled


@pytest.mark.parametrize(("available", "short"), [(49, True), (50, False)])
def test_memory_is_short_below_a_twentieth(available: int, short: bool) -> None:
    text = f"MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n"
    assert few_left(text) is short


@pytest.mark.parametrize(("full", "short"), [("9.99", False), ("10.00", True), ("0.00", False)])
def test_it_is_short_where_everybody_waits_for_it(full: str, short: bool) -> None:
    text = f"some avg10=99.00 avg60=0.00 total=7\nfull avg10={full} avg60=50.00 total=7\n"
    assert stalled(text) is short


def test_kernels_that_do_not_tell_of_stalls_have_none() -> None:
    assert not stalled("")
    assert not stalled("some avg10=99.00 avg60=0.00 avg300=0.00 total=7\n")


@given(st.floats(0, 100), st.floats(0, 100))
def test_more_waiting_is_never_less_short(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert stalled(f"full avg10={low:.2f}") <= stalled(f"full avg10={high:.2f}")


def test_this_machine_s_own_words_are_understood() -> None:
    assert few_left(cgroups.read(pressure.MEMINFO)) in {True, False}
    if os.path.exists(pressure.STALLS):
        assert "full avg10=" in cgroups.read(pressure.STALLS)
