"""The real agent under faults, by the hundred, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import madang.agent.kernel
from madang.agent.reconcile import Actual, Phase, Step, plan
from madang.agent.service import Agent
from madang.testing.clock import simulate
from madang.wire.kernel import Desired, Wanted
from tests.agent.simulation import Simulation

SEEDS = 60
"""The seeds of each of the runs below."""


def run(seed: int, root: Path) -> list[str]:
    folder = root / str(seed)
    folder.mkdir()
    return simulate(Simulation(seed, str(folder)).run())


@pytest.mark.parametrize("part", range(4))
def test_faults_never_break_the_rules_and_everything_ends(part: int, tmp_path: Path) -> None:
    bad = {
        seed: found
        for seed in range(part * SEEDS, (part + 1) * SEEDS)
        if (found := run(seed, tmp_path))
    }
    assert not bad
