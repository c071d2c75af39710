"""Processes that stay for slow work: answers, errors, deaths, numbers."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from madang.agent.launcher.workers import KEPT, MOST, Workers
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import PlatformError, RuntimeFailed, StorageFull


class Driven:
    """Workers and the loop around them."""

    def __init__(self, works: dict[str, Callable[..., Any]]) -> None:
        self.selector = selectors.DefaultSelector()
        self.workers = Workers(works, self.selector)
        self.answers: list[Any] = []

    def run(self, work: str, *arguments: Any) -> None:
        self.workers.run(work, *arguments, done=self.answers.append)

    def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end, self.answers
            for key, events in self.selector.select(0.1):
                key.data(events)

    def answer(self, work: str, *arguments: Any) -> Any:
        self.run(work, *arguments)
        self.until(lambda: bool(self.answers))
        return self.answers.pop()

    def close(self) -> None:
        """All workers have left, and are buried."""
        for pid, link in self.workers._idle:
            self.workers._bury(pid, link)
        self.workers._idle.clear()
        self.until(lambda: not self.selector.get_map())
        self.selector.close()


def _full() -> None:
    raise StorageFull("no room.")


def _meet(folder: str, name: str, count: int) -> int:
    """Return once *count* workers are in here at once."""
    Path(folder, name).touch()
    end = time.monotonic() + PATIENCE_S
    while len(os.listdir(folder)) < count and time.monotonic() < end:
        time.sleep(0.005)
    return len(os.listdir(folder))


def _die_once(path: str) -> str:
    if not os.path.exists(path):
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@pytest.fixture
def driven() -> Iterator[Driven]:
    found = Driven(
        {
            "pid": os.getpid,
            "add": lambda a, b: a + b,
            "full": _full,
            "break": lambda: 1 / 0,
            "meet": _meet,
            "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "die once": _die_once,
        }
    )
    yield found
    found.close()


def test_one_process_does_one_work_after_the_other(driven: Driven) -> None:
    first = driven.answer("pid")
    assert driven.answer("add", 2, 3) == 5
    assert first != os.getpid()
    assert {driven.answer("pid") for _ in range(5)} == {first}


def test_errors_are_answers_and_the_worker_goes_on(driven: Driven) -> None:
    first = driven.answer("pid")
    full, broken = driven.answer("full"), driven.answer("break")
    assert isinstance(full, StorageFull)
    assert full.text == "no room."
    assert isinstance(broken, RuntimeFailed)
    assert "ZeroDivisionError" in broken.text
    assert driven.answer("pid") == first


def test_at_once_up_to_a_number_and_then_work_waits(driven: Driven, tmp_path: Path) -> None:
    for number in range(MOST):
        driven.run("meet", str(tmp_path), str(number), MOST)
    driven.run("pid")
    assert len(driven.workers._waiting) == 1
    driven.until(lambda: len(driven.answers) == MOST + 1)
    assert driven.answers.count(MOST) == MOST
    driven.until(lambda: not driven.selector.get_map())
    assert len(driven.workers._idle) == KEPT


def test_what_a_killed_worker_had_to_do_is_done_by_another(driven: Driven, tmp_path: Path) -> None:
    assert driven.answer("die once", str(tmp_path / "once")) == "alive"


def test_one_that_is_killed_while_it_waits_is_replaced(driven: Driven) -> None:
    first = driven.answer("pid")
    os.kill(first, signal.SIGKILL)
    assert driven.answer("pid") != first


def test_work_that_kills_its_workers_is_an_error_in_the_end(driven: Driven) -> None:
    died = driven.answer("die")
    assert isinstance(died, PlatformError)
    assert "killed" in died.text
    assert driven.answer("add", 1, 1) == 2
