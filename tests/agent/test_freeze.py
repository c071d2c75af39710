"""Frozen kernels on real runtimes: what wakes them, what does not, and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from madang.testing.nodes import NodeFolder, NodeUnderTest, node
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import spec
from madang.testing.simulation import NoBlobs, assignment
from madang.wire.kernel import Assignment, ExecSpec, KernelId, KernelReport
from madang.wire.link import (
    Attach,
    ExecStarted,
    ListFiles,
    ReadFile,
    ReadLog,
    Resize,
    SendSignal,
    StartExec,
    StreamItem,
    WriteFile,
)
from madang.wire.log import LogRecord
from madang.wire.session import Reason

ECHO = "echo ready; while read line; do echo got $line; done"


@pytest.fixture
async def it(state: NodeFolder) -> AsyncIterator[NodeUnderTest]:
    async with node(state.runtime, state.settings, NoBlobs()) as found:
        yield found


_numbers = iter(range(10**9))


def shell(script: str, **more: Any) -> Assignment:
    return assignment(f"f{next(_numbers):09d}", spec=spec("/bin/sh", "-c", script, **more))


async def order(it: NodeUnderTest, kernel: KernelId, *, frozen: bool) -> KernelReport:
    """Freeze or thaw, and the report that says so."""
    revision = it.revision + 1
    await it.want(replace(it.wanted[kernel], frozen=frozen, freeze_revision=revision))
    await it.until(lambda: it.reports[kernel].freeze_revision == revision)
    report = it.reports[kernel]
    assert (report.frozen_since is not None) is frozen
    return report


async def frozen(it: NodeUnderTest, wanted: Assignment) -> KernelReport:
    """Started, has said ``ready``, and stands still."""
    await it.want(wanted)
    assert (await it.first_output(wanted.kernel)).startswith(b"ready")
    await it.running(wanted.kernel)
    return await order(it, wanted.kernel, frozen=True)


async def stands_still(state: NodeFolder, kernel: KernelId) -> bool:
    """As the runtime sees it."""
    runtime = state.runtime()
    await runtime.open()
    try:
        return next(each.frozen for each in await runtime.adopt() if each.kernel == kernel)
    finally:
        await runtime.close()


async def send(it: NodeUnderTest, kernel: KernelId, *items: StreamItem) -> None:
    stream = await it.open(Attach(kernel=kernel))
    for item in items:
        await stream.send(item)
    await stream.end()
    async with asyncio.timeout(PATIENCE_S):
        async for _ in stream:
            pass


async def until_output(it: NodeUnderTest, kernel: KernelId, text: bytes) -> None:
    stream = await it.open(ReadLog(kernel=kernel, follow=True))
    seen = b""
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for item in stream:
                seen += item.data if isinstance(item, LogRecord) else b""
                if text in seen:
                    return
    finally:
        await stream.close()
    raise AssertionError(seen)


def awake(it: NodeUnderTest, kernel: KernelId) -> bool:
    return it.reports[kernel].frozen_since is None


async def test_input_wakes_and_the_same_order_does_not_freeze_again(
    it: NodeUnderTest, state: NodeFolder
) -> None:
    wanted = shell(ECHO, stdin=True)
    order_of = (await frozen(it, wanted)).freeze_revision
    assert await stands_still(state, wanted.kernel)

    await send(it, wanted.kernel, b"one\n")
    await until_output(it, wanted.kernel, b"got one")
    await it.until(lambda: awake(it, wanted.kernel))
    assert it.reports[wanted.kernel].freeze_revision == order_of

    await it.disconnect()
    await it.connect()  # is told everything anew, that order too
    await send(it, wanted.kernel, b"two\n")
    await until_output(it, wanted.kernel, b"got two")
    assert awake(it, wanted.kernel)
    await it.restart()
    await send(it, wanted.kernel, b"three\n")
    await until_output(it, wanted.kernel, b"got three")
    assert awake(it, wanted.kernel)
    assert not await stands_still(state, wanted.kernel)

    await order(it, wanted.kernel, frozen=True)
    assert await stands_still(state, wanted.kernel)


async def test_a_key_and_another_size_of_the_terminal_wake(it: NodeUnderTest) -> None:
    for item in (b"k\n", Resize(rows=30, cols=100)):
        wanted = shell("echo ready; read x; read x", tty=True, stdin=True)
        await frozen(it, wanted)
        await send(it, wanted.kernel, item)
        await it.until(lambda: awake(it, wanted.kernel))  # noqa: B023  (used at once)


async def test_a_signal_wakes(it: NodeUnderTest) -> None:
    wanted = shell("trap 'echo heard' USR1; echo ready; while :; do sleep 0.05; done")
    await frozen(it, wanted)

    await it.items(SendSignal(kernel=wanted.kernel, signal=10))

    await until_output(it, wanted.kernel, b"heard")
    await it.until(lambda: awake(it, wanted.kernel))


async def test_an_exec_wakes(it: NodeUnderTest) -> None:
    wanted = shell("echo ready; sleep 1000")
    await frozen(it, wanted)

    request = StartExec(kernel=wanted.kernel, spec=ExecSpec(argv=("/bin/echo", "inside")))
    (started,) = await it.items(request)

    assert isinstance(started, ExecStarted)
    assert await it.output(wanted.kernel, started.exec_id) == b"inside\n"
    await it.until(lambda: awake(it, wanted.kernel))


async def test_readers_and_files_do_not_wake(it: NodeUnderTest, state: NodeFolder) -> None:
    wanted = shell("echo text > note; echo ready; sleep 1000")
    since = (await frozen(it, wanted)).frozen_since
    kernel = wanted.kernel

    await until_output(it, kernel, b"ready")
    assert [item async for item in await it.open(ListFiles(kernel=kernel, path="."))]
    assert b"text\n" in await it.items(ReadFile(kernel=kernel, path="note"))
    stream = await it.open(WriteFile(kernel=kernel, path="new"))
    await stream.send(b"data")
    await stream.end()
    assert [item async for item in stream]
    beats = it.heartbeats
    await it.until(lambda: it.heartbeats > beats + 2)

    assert it.reports[kernel].frozen_since == since
    assert await stands_still(state, kernel)


async def test_a_frozen_session_is_stopped_with_the_reason_given(it: NodeUnderTest) -> None:
    wanted = shell("echo ready; sleep 1000")
    await frozen(it, wanted)

    await it.stop_kernel(wanted.kernel)

    ended = await it.ended(wanted.kernel)
    assert (ended.reason, ended.exit_code) == (Reason.USER, 143)
    assert it.reports[wanted.kernel].frozen_since is None


async def test_the_time_limit_of_a_frozen_session_ends_it(it: NodeUnderTest) -> None:
    wanted = shell("echo ready; sleep 1000", time_s=1.0)
    await frozen(it, wanted)

    ended = await it.ended(wanted.kernel)

    assert (ended.reason, ended.exit_code) == (Reason.TIMEOUT, 143)


async def test_the_time_limit_ends_it_also_if_it_ran_out_while_nobody_looked(
    it: NodeUnderTest,
) -> None:
    wanted = shell("echo ready; sleep 1000", time_s=0.5)
    await frozen(it, wanted)
    folder = it.agent.kernels[wanted.kernel].folder()
    await it.stop()

    keepers = it.agent._keepers
    async with asyncio.timeout(PATIENCE_S):
        async with aclosing(keepers.watch(folder)) as news:
            async for each in news:
                if each.stopping:
                    break
    await it.start()

    ended = await it.ended(wanted.kernel)
    assert (ended.reason, ended.exit_code) == (Reason.TIMEOUT, 143)


async def test_a_frozen_session_can_be_forgotten(it: NodeUnderTest) -> None:
    wanted = shell("echo ready; sleep 1000")
    await frozen(it, wanted)

    await it.forget(wanted.kernel)

    async with asyncio.timeout(PATIENCE_S):
        while it.agent.kernels:
            await it.agent.kernels_changed.wait()


async def test_a_frozen_session_outlives_the_agent(it: NodeUnderTest, state: NodeFolder) -> None:
    wanted = shell(ECHO, stdin=True)
    since = (await frozen(it, wanted)).frozen_since

    await it.restart()

    assert it.hello is not None
    assert [report.frozen_since for report in it.hello.inventory] == [since]
    assert await stands_still(state, wanted.kernel)
    await send(it, wanted.kernel, b"one\n")
    await until_output(it, wanted.kernel, b"got one")


async def test_what_was_thawed_behind_our_back_is_frozen_again(
    it: NodeUnderTest, state: NodeFolder
) -> None:
    wanted = shell("echo ready; sleep 1000")
    since = (await frozen(it, wanted)).frozen_since
    other = state.runtime()
    await other.open()
    await other.thaw(wanted.kernel)
    await other.close()

    async with asyncio.timeout(PATIENCE_S):
        while not await stands_still(state, wanted.kernel):
            await it.agent.kernels[wanted.kernel].changed.wait()

    assert it.reports[wanted.kernel].frozen_since == since


async def test_what_nobody_uses_is_frozen_by_itself_and_woken_by_input(state: NodeFolder) -> None:
    if state.launcher is None:
        pytest.skip("plain processes have no counters")
    settings = replace(state.settings, freeze_idle_after_s=1.0)
    async with node(state.runtime, settings, NoBlobs()) as it:
        shell_like = shell("stty -echo; " + ECHO, tty=True, stdin=True)
        busy = shell("while :; do :; done", tty=True)
        batch = shell("echo ready; sleep 1000")
        await it.want(shell_like, busy, batch)
        for each in (shell_like, busy, batch):
            await it.running(each.kernel)

        await it.until(lambda: not awake(it, shell_like.kernel))
        assert awake(it, busy.kernel)
        assert awake(it, batch.kernel)
        await send(it, shell_like.kernel, b"one\n")
        await until_output(it, shell_like.kernel, b"got one")
        await it.until(lambda: awake(it, shell_like.kernel))
        await it.until(lambda: not awake(it, shell_like.kernel))
        await order(it, shell_like.kernel, frozen=False)
