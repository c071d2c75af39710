"""Owned tasks, loops and broadcasts."""

from __future__ import annotations

import asyncio
import logging

import pytest

from madang.kit.broadcast import Broadcast
from madang.kit.loop import Loop
from madang.kit.tasks import TaskSet
from madang.testing.clock import FakeClock, settle
from madang.testing.patience import PATIENCE_S


async def test_closing_ends_all_tasks_and_waits_for_them() -> None:
    tasks, ended = TaskSet(), []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    for name in ("a", "b"):
        tasks.spawn(work(name), name)
    await settle()
    assert len(tasks) == 2

    await tasks.close()

    assert sorted(ended) == ["a", "b"]
    assert len(tasks) == 0
    with pytest.raises(RuntimeError):
        tasks.spawn(work("c"), "c")


async def test_a_failing_task_is_logged_and_ends_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks, reached = TaskSet(), asyncio.Event()

    async def fails() -> None:
        raise ValueError("broken")

    async def goes_on() -> None:
        await settle()
        reached.set()

    tasks.spawn(fails(), "the failing one")
    tasks.spawn(goes_on(), "the other")
    await reached.wait()

    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert vars(record)["task"] == "the failing one"
    await tasks.close()


async def test_a_task_may_close_its_own_set() -> None:
    tasks = TaskSet()
    task = tasks.spawn(tasks.close(), "closer")
    await task


async def test_a_broadcast_wakes_all_who_wait_and_nobody_later() -> None:
    news, woken = Broadcast(), []

    async def waiter(name: int) -> None:
        await news.wait()
        woken.append(name)

    tasks = [asyncio.create_task(waiter(number)) for number in range(3)]
    await settle()
    news.notify()
    late = asyncio.create_task(waiter(9))
    await settle()

    assert sorted(woken) == [0, 1, 2]
    news.notify()
    await asyncio.gather(late, *tasks)
    news.notify()


class Counter(Loop):
    period_s = 10

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.ticks: list[float] = []
        self.fails = 0

    async def tick(self, now: float) -> None:
        self.ticks.append(self.clock.monotonic())
        if self.fails:
            self.fails -= 1
            raise ValueError("fails")


async def test_a_loop_ticks_when_woken_and_at_its_period() -> None:
    clock = FakeClock()
    loop = Counter(clock)
    loop.start()
    loop.start()
    await clock.advance(25)
    assert loop.ticks == [0, 10, 20]

    loop.wake()
    loop.wake()
    await settle()

    assert loop.ticks == [0, 10, 20, 25]
    await loop.stop()
    await loop.stop()


async def test_a_failing_tick_is_told_once_and_tried_again_ever_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    loop = Counter(clock)
    loop.fails = 4
    loop.start()

    await clock.advance(5)

    assert loop.ticks == pytest.approx([0, 0.1, 0.3, 0.7, 1.5])
    assert [r.levelno for r in caplog.records if r.levelno >= logging.INFO] == [logging.ERROR]
    await loop.stop()


async def test_a_loop_ends_even_if_its_clean_up_fails() -> None:
    """A tick whose ``finally`` raises replaces the cancellation by its own error."""

    class Fails(Loop):
        async def tick(self, now: float) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("the connection is gone")

    loop = Fails(FakeClock())
    loop.start()
    await settle()

    async with asyncio.timeout(PATIENCE_S):
        await loop.stop()
