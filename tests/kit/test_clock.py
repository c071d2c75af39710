"""Clocks of tests, and the waits that they must serve."""

from __future__ import annotations

import asyncio
import time

import pytest

from madang.kit.clock import Clock, SystemClock
from madang.testing.clock import FakeClock, LoopClock, settle, simulate


async def test_time_stands_still_until_it_is_moved() -> None:
    clock, woken = FakeClock(), []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.monotonic()))

    tasks = [asyncio.create_task(sleeper(n, s)) for n, s in (("b", 2), ("a", 1), ("c", 9))]
    await settle()
    assert woken == []

    await clock.advance(5)

    assert woken == [("a", 1), ("b", 2)]
    assert clock.monotonic() == 5
    await clock.advance(4)
    assert woken[-1] == ("c", 9)
    await asyncio.gather(*tasks)


async def test_who_sleeps_again_while_time_moves_wakes_in_time() -> None:
    clock, ticks = FakeClock(), []

    async def ticker() -> None:
        for _ in range(3):
            await clock.sleep(2)
            ticks.append(clock.monotonic())

    task = asyncio.create_task(ticker())
    await clock.advance(100)

    assert ticks == [2, 4, 6]
    await task


async def test_a_clock_that_is_set_does_not_change_durations() -> None:
    clock = FakeClock()
    before = clock.now(), clock.monotonic()

    clock.jump(-3600)

    assert clock.now() == before[0] - 3600
    assert clock.monotonic() == before[1]


def virtual(clock: Clock) -> None:
    async def work() -> None:
        begin = clock.monotonic()
        event = asyncio.Event()
        assert not await clock.wait(event, 3600)
        assert clock.monotonic() - begin == pytest.approx(3600)
        event.set()
        assert await clock.wait(event, 3600)
        await clock.sleep(86400)
        assert clock.monotonic() - begin == pytest.approx(90000)

    simulate(work())


def test_a_simulated_day_takes_no_time() -> None:
    begin = time.monotonic()
    virtual(LoopClock())
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("clock", [SystemClock(), FakeClock()], ids=["system", "fake"])
async def test_an_event_ends_a_wait_at_once(clock: Clock) -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(clock.wait(event, 3600))
    await settle()
    event.set()

    assert await waiting
    assert await clock.wait(event, 0)


async def test_a_wait_that_is_given_up_leaves_no_task() -> None:
    clock = FakeClock()
    waiting = asyncio.create_task(clock.wait(asyncio.Event(), 10))
    await settle()

    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting
    await clock.advance(20)


async def test_the_machine_s_clock_keeps_a_timeout() -> None:
    clock = SystemClock()
    begin = clock.monotonic()
    assert not await clock.wait(asyncio.Event(), 0.02)
    assert clock.monotonic() - begin >= 0.019
    assert abs(clock.now() - time.time()) < 5
