"""The real agent under faults, by the hundred, in virtual time.

Dropping any one rule of ``agent.reconcile`` must show: otherwise the simulation proves nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import madang.agent.kernel
from madang.agent import freezing
from madang.agent.freezing import Frost
from madang.agent.kernel import Kernel
from madang.agent.reconcile import Actual, Phase, Step, plan
from madang.agent.service import Agent
from madang.testing.clock import simulate
from madang.testing.simulation import Simulation
from madang.wire.kernel import Assignment, Desired, Wanted

SEEDS = 40
"""Runs of each part."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Failures are what these runs are about; thousands of lines would hide the one that counts."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def run(seed: int, root: Path) -> list[str]:
    folder = root / str(seed)
    folder.mkdir()
    return simulate(Simulation(seed, str(folder)).run())


@pytest.mark.parametrize("part", range(6))
def test_faults_never_break_the_rules_and_everything_ends(part: int, tmp_path: Path) -> None:
    seeds = range(part * SEEDS, (part + 1) * SEEDS)

    bad = {seed: found for seed in seeds if (found := run(seed, tmp_path))}

    assert not bad


Plan = Callable[[Wanted | None, Actual], Step]


def start_beside_rivals(wanted: Wanted | None, actual: Actual) -> Step:
    return plan(wanted, replace(actual, rival=False))


def start_unconfirmed(wanted: Wanted | None, actual: Actual) -> Step:
    return plan(wanted, replace(actual, confirmed=True))


def keep_the_forgotten(wanted: Wanted | None, actual: Actual) -> Step:
    step = plan(wanted, actual)
    return Step.REST if step is Step.REMOVE else step


def ignore_stops(wanted: Wanted | None, actual: Actual) -> Step:
    step = plan(wanted, actual)
    return Step.REST if step is Step.STOP else step


def trust_the_keeper(wanted: Wanted | None, actual: Actual) -> Step:
    return plan(wanted, replace(actual, gone=False))


def stop_the_frozen(wanted: Wanted | None, actual: Actual) -> Step:
    step = plan(wanted, actual)
    stop = actual.condemned or wanted is not Wanted.RUN
    return Step.STOP if step is Step.THAW and stop else step


def never_thaw(wanted: Wanted | None, actual: Actual) -> Step:
    step = plan(wanted, actual)
    return Step.REST if step is Step.THAW and wanted is Wanted.RUN else step


def start_what_ended(wanted: Wanted | None, actual: Actual) -> Step:
    if actual.phase is Phase.ENDED and wanted is Wanted.RUN:
        return Step.START
    return plan(wanted, actual)


@pytest.mark.parametrize(
    "wrong",
    [
        start_beside_rivals,
        start_unconfirmed,
        keep_the_forgotten,
        ignore_stops,
        trust_the_keeper,
        stop_the_frozen,
        never_thaw,
        start_what_ended,
    ],
)
def test_a_dropped_rule_is_noticed(
    wrong: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(madang.agent.kernel, "plan", wrong)

    assert noticed(tmp_path)


def test_following_old_revisions_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def any_news(self: Agent, desired: Desired, *, begun: bool) -> bool:
        return True

    monkeypatch.setattr(Agent, "_is_news", any_news)

    assert noticed(tmp_path)


def test_following_an_order_to_freeze_twice_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def any_order(frost: Frost, order: Assignment | None) -> Frost:
        return frost if order is None else Frost(order.frozen, order.freeze_revision)

    monkeypatch.setattr(freezing, "follow", any_order)

    assert noticed(tmp_path)


def test_ends_that_are_told_once_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(self: Kernel) -> bool:
        return True

    monkeypatch.setattr(Kernel, "known", property(told))

    assert noticed(tmp_path)


def noticed(root: Path) -> bool:
    return any(run(seed, root) for seed in range(400))
