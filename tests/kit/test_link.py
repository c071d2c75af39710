"""The link in memory, and the faulty one."""

from __future__ import annotations

import asyncio

import pytest

from madang.kit.link import QUEUE_ITEMS, memory_link, stream_pair
from madang.testing.clock import LoopClock, settle, simulate
from madang.testing.link import FaultyLink
from madang.wire.errors import NotFound
from madang.wire.kernel import Desired, KernelId, Reports
from madang.wire.link import ReadLog


async def test_a_stream_is_bounded_and_both_ends_may_end_it() -> None:
    ours, theirs = stream_pair()
    for number in range(QUEUE_ITEMS):
        await ours.send(bytes([number]))
    blocked = asyncio.create_task(ours.send(b"more"))
    await settle()
    assert not blocked.done()

    received = []
    async for item in theirs:
        received.append(item)
        if len(received) == QUEUE_ITEMS:
            await blocked
            await ours.end()

    assert received == [bytes([n]) for n in range(QUEUE_ITEMS)] + [b"more"]
    await theirs.send(b"the other way still works")
    await theirs.fail(NotFound("but no further"))
    answers = aiter(ours)
    assert await anext(answers) == b"the other way still works"
    with pytest.raises(NotFound):
        await anext(answers)


async def test_a_closed_stream_wakes_who_waits_in_it() -> None:
    ours, theirs = stream_pair()
    for _ in range(QUEUE_ITEMS):
        await ours.send(b"x")
    sending = asyncio.create_task(ours.send(b"x"))
    reading = asyncio.ensure_future(anext(aiter(ours)))
    await settle()

    await theirs.close()

    with pytest.raises(ConnectionError):
        await sending
    with pytest.raises(ConnectionError):
        await reading
    with pytest.raises(ConnectionError):
        await theirs.send(b"x")
    await theirs.end()


async def test_a_closed_link_wakes_who_waits_at_either_end() -> None:
    manager, agent = memory_link()
    waiting = [asyncio.create_task(work) for work in (agent.receive(), manager.receive())]
    accepting = asyncio.create_task(agent.accept())
    await settle()

    await agent.close()

    for each in (*waiting, accepting):
        with pytest.raises(ConnectionError):
            await each
    with pytest.raises(ConnectionError):
        await manager.send(Desired(revision=1, full=True))
    with pytest.raises(ConnectionError):
        await manager.open(ReadLog(kernel=KernelId("s", 1)))


def test_a_faulty_link_keeps_the_order_and_loses_what_comes_after_the_break() -> None:
    async def work() -> None:
        delays = iter([5.0, 0.0, 3.0, 0.0, 9.0])
        link = FaultyLink(LoopClock(), lambda: next(delays))
        for revision in range(4):
            await link.manager.send(Desired(revision=revision, full=False))
        got = [(await link.agent.receive()).revision for _ in range(4)]
        assert got == [0, 1, 2, 3]

        breaking = asyncio.create_task(link.break_it(agent_after_s=2, manager_after_s=4))
        await settle()
        await link.agent.send(Reports(node="n", incarnation=1))
        await breaking

        with pytest.raises(ConnectionError):
            await link.manager.receive()
        with pytest.raises(ConnectionError):
            await link.agent.send(Reports(node="n", incarnation=1))

    simulate(work())
