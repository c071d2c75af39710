"""Drivers are tried as local child processes; a language that is not here is skipped, and said."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from madang.kit.languages import Languages
from madang.testing.drivers import Driver
from madang.testing.languages import ENVIRONMENT, SAMPLES, found_here

WITH_CELLS = sorted(one.name for one in Languages().all() if one.cells and one.name in SAMPLES)


@cache
def here() -> dict[str, str]:
    return found_here()


def driver_of(name: str, folder: Path, **environment: str) -> Driver:
    if name not in here():
        pytest.skip(f"{name} is not installed here")
    env = {**ENVIRONMENT, "HOME": str(folder), "TMPDIR": str(folder), **environment}
    return Driver.start(Languages(), name, env)


@pytest.fixture(scope="module", params=WITH_CELLS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def driver(name: str, tmp_path: Path) -> Iterator[Driver]:
    with driver_of(name, tmp_path) as driver:
        yield driver
