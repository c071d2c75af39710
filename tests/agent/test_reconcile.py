"""One kernel's next step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent.reconcile import Actual, Phase, Step, plan
from madang.wire.kernel import Wanted

WANTED = st.sampled_from([None, *Wanted])
ACTUAL = st.builds(
    Actual,
    phase=st.sampled_from(Phase),
    gone=st.booleans(),
    condemned=st.booleans(),
    failed=st.booleans(),
    confirmed=st.booleans(),
    rival=st.booleans(),
    stopping=st.booleans(),
    freeze=st.booleans(),
    frozen=st.sampled_from([True, False, None]),
)


@given(wanted=WANTED, actual=ACTUAL)
def test_only_what_is_wanted_confirmed_and_alone_is_started(
    wanted: Wanted | None, actual: Actual
) -> None:
    if plan(wanted, actual) is Step.START:
        assert wanted is Wanted.RUN
        assert actual.phase is Phase.INTENDED
        assert actual.confirmed
        assert not actual.rival
        assert not actual.failed


@given(wanted=WANTED, actual=ACTUAL)
def test_the_forgotten_goes_as_soon_as_the_manager_has_spoken(
    wanted: Wanted | None, actual: Actual
) -> None:
    step = plan(wanted, actual)
    if actual.phase is Phase.REMOVING or (wanted is None and actual.confirmed):
        assert step is Step.REMOVE
    elif wanted is None:
        assert step is Step.REST


@given(wanted=st.sampled_from(Wanted), actual=ACTUAL)
def test_nothing_rests_before_it_is_as_wanted(wanted: Wanted, actual: Actual) -> None:
    if plan(wanted, actual) is not Step.REST:
        return
    if actual.phase is Phase.RUNNING:
        assert wanted is Wanted.RUN
        assert not actual.condemned
        assert not actual.gone
        assert actual.frozen is (actual.freeze and not actual.stopping)
    elif actual.phase is Phase.INTENDED:
        assert wanted is Wanted.RUN
        assert actual.rival or not actual.confirmed
    else:
        assert actual.phase is Phase.ENDED


@given(wanted=st.sampled_from(Wanted), actual=ACTUAL)
def test_what_is_to_end_is_thawed_first_and_never_frozen(wanted: Wanted, actual: Actual) -> None:
    step = plan(wanted, actual)
    if step is Step.STOP:
        assert actual.frozen is False
    if step is Step.FREEZE:
        assert wanted is Wanted.RUN
        assert not actual.condemned
        assert not actual.stopping


@pytest.mark.parametrize("wanted", Wanted)
def test_an_end_is_final(wanted: Wanted) -> None:
    assert plan(wanted, Actual(phase=Phase.ENDED)) is Step.REST


@pytest.mark.parametrize("wanted", Wanted)
def test_what_has_ended_by_itself_is_settled_whatever_is_wanted(wanted: Wanted) -> None:
    assert plan(wanted, Actual(phase=Phase.RUNNING, gone=True)) is Step.SETTLE


@pytest.mark.parametrize("wanted", [Wanted.STOP, Wanted.KEEP])
def test_what_the_manager_takes_for_ended_does_not_run(wanted: Wanted) -> None:
    assert plan(wanted, Actual(phase=Phase.RUNNING)) is Step.STOP
    assert plan(wanted, Actual(phase=Phase.INTENDED)) is Step.ABANDON
