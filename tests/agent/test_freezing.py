"""Who decides whether a kernel stands still: two writers, messages lost, late and twice."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent import freezing
from madang.agent.freezing import Activity, Frost
from madang.manager.session.rules import frost_news
from madang.testing.simulation import SPEC, assignment
from madang.wire.kernel import Assignment, KernelReport, KernelState
from madang.wire.session import Usage


@dataclass
class Pair:
    """A row and a kernel, and all messages ever sent between them."""

    frozen_at: int | None = None
    revision: int = 0
    frost: Frost = field(default_factory=Frost)
    orders: list[Assignment] = field(default_factory=list)
    reports: list[KernelReport] = field(default_factory=list)
    last_word: bool = False
    """What user or machine said last, as the agent saw it."""
    clock: int = 0

    def order(self, *, frozen: bool) -> None:
        self.clock += 1
        self.revision += 1
        self.frozen_at = self.clock if frozen else None
        self.orders.append(self._assignment())

    def _assignment(self) -> Assignment:
        frozen = self.frozen_at is not None
        return replace(assignment("s"), frozen=frozen, freeze_revision=self.revision)

    def hear(self, order: Assignment) -> None:
        if order.freeze_revision > self.frost.revision:
            self.last_word = order.frozen
        self.frost = freezing.follow(self.frost, order)
        self._report()

    def wake(self) -> None:
        self.frost, self.last_word = freezing.woken(self.frost), False
        self._report()

    def leave_alone(self) -> None:
        self.frost, self.last_word = freezing.left_alone(self.frost), True
        self._report()

    def _report(self) -> None:
        self.clock += 1
        self.reports.append(
            KernelReport(
                kernel=assignment("s").kernel,
                nonce="n",
                state=KernelState.RUNNING,
                frozen_since=float(self.clock) if self.frost.frozen else None,
                freeze_revision=self.frost.revision,
            )
        )

    def note(self, report: KernelReport) -> None:
        news = frost_news(self.frozen_at, self.revision, report)
        if news is not None:
            self.frozen_at, self.revision = news

    def settle(self) -> None:
        """The link holds: the row is told whole, then the kernel says what is."""
        self.hear(self._assignment())
        self.note(self.reports[-1])


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["freeze", "thaw", "wake", "alone", "hear", "note", "late note"]),
        st.integers(0, 30),
    ),
    max_size=30,
)


def play(acts: list[tuple[str, int]]) -> Pair:
    pair = Pair()
    for act, number in acts:
        if act in {"freeze", "thaw"}:
            pair.order(frozen=act == "freeze")
        elif act == "wake":
            pair.wake()
        elif act == "alone":
            pair.leave_alone()
        elif act == "hear" and pair.orders:  # any order, also an old one, also again
            pair.hear(pair.orders[number % len(pair.orders)])
        elif act == "note" and pair.reports:
            pair.note(pair.reports[-1])
        elif act == "late note" and pair.reports and number < 15:
            # A link keeps the order of reports: one that is late was made before the newest order.
            older = [r for r in pair.reports if r.freeze_revision < pair.revision]
            if older:
                pair.note(older[number % len(older)])
    return pair


@given(ACTS)
def test_row_and_kernel_agree_once_the_link_holds(acts: list[tuple[str, int]]) -> None:
    pair = play(acts)
    pair.settle()
    assert (pair.frozen_at is not None) == pair.frost.frozen
    assert pair.revision == pair.frost.revision


@given(ACTS, st.booleans())
def test_the_newest_order_is_followed_whatever_came_before(
    acts: list[tuple[str, int]], frozen: bool
) -> None:
    pair = play(acts)
    pair.order(frozen=frozen)
    for report in pair.reports:  # all of them late
        pair.note(report)
    pair.settle()
    assert pair.frost.frozen is frozen
    assert (pair.frozen_at is not None) is frozen


@given(ACTS)
def test_what_input_woke_stays_awake_whatever_is_repeated(acts: list[tuple[str, int]]) -> None:
    pair = play(acts)
    pair.settle()
    pair.wake()
    for order in pair.orders:
        pair.hear(order)
    pair.settle()
    assert not pair.frost.frozen
    assert pair.frozen_at is None


@given(ACTS)
def test_the_last_word_that_reached_the_kernel_counts_there(acts: list[tuple[str, int]]) -> None:
    pair = play(acts)
    assert pair.frost.frozen is pair.last_word


@pytest.mark.parametrize(
    ("argv", "tty", "build", "waits"),
    [((), False, False, True), (("bash",), True, False, True), (("train",), False, False, False),
     ((), False, True, False)],
)  # fmt: skip
def test_only_what_waits_for_people_is_frozen_by_itself(
    argv: tuple[str, ...], tty: bool, build: bool, waits: bool
) -> None:
    spec = replace(SPEC, argv=argv, tty=tty, build=build)
    assert freezing.waits_for_people(spec) is waits


def test_work_and_input_begin_the_rest_anew_and_a_tick_of_a_timer_does_not() -> None:
    seen = freezing.observe(Activity(0.0, 0.0), Usage(at=0, cpu_s=1.0), 5.0)
    assert seen.since == 5.0
    seen = freezing.observe(seen, Usage(at=0, cpu_s=1.002), 10.0)
    assert seen.since == 5.0
    seen = freezing.observe(seen, Usage(at=0, cpu_s=1.5), 15.0)
    assert seen.since == 15.0
    seen = freezing.touched(freezing.observe(seen, Usage(at=0, cpu_s=1.5), 20.0), 21.0)
    assert seen.since == 21.0
    seen = freezing.observe(seen, Usage(at=0, cpu_s=None), 25.0)
    assert seen.since == 25.0
