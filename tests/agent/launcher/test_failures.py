"""What failed is tried again: soon, then ever more rarely, never never."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from madang.agent.launcher.failures import FIRST_S, LAST_S, Failures, wait_s


class _Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 10_000))
def test_each_wait_is_as_long_as_the_one_before_or_longer(times: int) -> None:
    assert FIRST_S <= wait_s(times) <= wait_s(times + 1) <= LAST_S


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 2 * LAST_S)), max_size=30))
def test_whoever_waits_long_enough_may_try_again(failures: list[tuple[str, float]]) -> None:
    time = _Time()
    found: Failures[str] = Failures(time)
    for key, later in failures:
        waits = found.note(key)
        assert found.holds(key)
        time.now += waits
        assert not found.holds(key)
        time.now += later


def test_one_failure_after_a_success_counts_as_the_first() -> None:
    found: Failures[str] = Failures(_Time())
    assert found.note("a") < found.note("a")
    assert not found.holds("b")

    found.forgive("a")
    assert not found.holds("a")
    assert found.note("a") == FIRST_S
