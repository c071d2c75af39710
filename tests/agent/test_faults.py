"""What an agent does when its partners fail; on a machine in memory, in virtual time."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from madang.agent.journal import Journal
from madang.agent.runtime.contract import Found
from madang.agent.service import Agent
from madang.agent.settings import AgentSettings
from madang.kit.link import memory_link
from madang.testing.clock import LoopClock, simulate
from madang.testing.nodes import NodeUnderTest, node
from madang.testing.runtime import FakeKernel, FakeMachine, FakeRuntime
from madang.testing.simulation import SPEC, NoBlobs, assignment
from madang.wire.errors import (
    HostLacks,
    LauncherUnavailable,
    LogGone,
    PlatformError,
    RuntimeFailed,
    StorageFull,
)
from madang.wire.kernel import Desired, Hello, ImageMount, KernelId, KernelState
from madang.wire.link import ReadLog
from madang.wire.session import Ended, Reason, Usage
from madang.wire.size import GIB, MIB

Test = Callable[..., Coroutine[Any, Any, None]]


def virtual(test: Test) -> Callable[..., None]:
    """Run the test in virtual time."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        simulate(test(*args, **kwargs))

    return run


class World:
    """A fake machine, how it behaves, and the agent on it."""

    def __init__(self, root: Path) -> None:
        self.clock = LoopClock()
        self.machine = FakeMachine(self.clock)
        self.root = str(root)
        self.settings = AgentSettings(
            node="n1", state_dir=self.root, disk_reserve_bytes=0, boot_id="boot"
        )
        self.enforced = {"mem": "cgroup", "disk": "quota"}
        self.delays: dict[str, float] = {}
        self.failures: dict[str, list[PlatformError]] = {}
        """Of each operation, one after the other; the last one stays."""

    def runtime(self) -> FakeRuntime:
        self.last_runtime = FakeRuntime(
            self.machine,
            self.root,
            enforced=self.enforced,
            delay=lambda operation: self.delays.get(operation, 0.0),
            failure=lambda operation, kernel: self._failure(operation),
        )
        return self.last_runtime

    def _failure(self, operation: str) -> PlatformError | None:
        left = self.failures.get(operation)
        return left.pop(0) if left else None

    @asynccontextmanager
    async def node(self) -> AsyncIterator[NodeUnderTest]:
        runtime = self.runtime()
        runtimes = iter([runtime])
        try:
            async with node(
                lambda: next(runtimes, None) or self.runtime(),
                self.settings,
                NoBlobs(),
                clock=self.clock,
                keepers=runtime,
            ) as found:
                yield found
        finally:
            await self.machine.tasks.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def calls(world: World, operation: str) -> int:
    return sum(name == operation for name, _ in world.last_runtime.calls)


# --- starts


@virtual
async def test_a_launcher_that_is_away_for_a_while_delays_the_start(world: World) -> None:
    world.failures["prepare"] = [LauncherUnavailable("restarting")] * 3
    world.failures["start"] = [LauncherUnavailable("restarting")] * 2
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)

        await it.running(wanted.kernel)


@virtual
async def test_a_launcher_that_stays_away_fails_the_start_in_words(world: World) -> None:
    world.failures["prepare"] = [LauncherUnavailable("the launcher is away")] * 40
    world.settings = replace(world.settings, start_patience_s=3)
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)

        ended = await it.ended(wanted.kernel)

        assert ended.reason is Reason.START_FAILED
        assert ended.text == "the launcher is away"
        assert world.machine.starts == {}


@virtual
@pytest.mark.parametrize("operation", ["prepare", "start"])
@pytest.mark.parametrize("error", [RuntimeFailed("no cgroup"), HostLacks("no overlay")])
async def test_a_failed_start_is_an_end_with_the_error_s_words(
    world: World, operation: str, error: PlatformError
) -> None:
    world.failures[operation] = [error] * 20
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)

        ended = await it.ended(wanted.kernel)

        assert (ended.reason, ended.text) == (Reason.START_FAILED, error.text)
        assert calls(world, "settle") == 1, "what was reserved is free again"


@virtual
@pytest.mark.parametrize("operation", ["prepare", "start"])
async def test_a_start_that_fails_once_is_tried_again(world: World, operation: str) -> None:
    """Such as one that was under way in a launcher that was killed."""
    world.failures[operation] = [RuntimeFailed("its processes were killed")]
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)

        await it.running(wanted.kernel)


@virtual
async def test_a_missing_layer_is_told_by_the_image_s_name(world: World) -> None:
    image = ImageMount(name="digits", digest="d", kind="layers", layers=("a" * 64,))
    async with world.node() as it:
        wanted = assignment("s", spec=replace(SPEC, image=image))
        await it.want(wanted)

        ended = await it.ended(wanted.kernel)

        assert ended.reason is Reason.IMAGE_MISSING
        assert "digits" in ended.text


@virtual
async def test_nothing_is_started_on_a_disk_that_is_almost_full(world: World) -> None:
    world.settings = replace(world.settings, disk_reserve_bytes=10**18)
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)

        ended = await it.ended(wanted.kernel)

        assert ended.reason is Reason.START_FAILED
        assert "reserve" in ended.text
        assert calls(world, "prepare") == 0


@virtual
async def test_only_a_slow_start_is_reported_as_preparing(world: World) -> None:
    async with world.node() as it:
        fast, slow = assignment("fast"), assignment("slow")
        await it.want(fast)
        await it.running(fast.kernel)
        world.delays["prepare"] = 1.0
        await it.want(slow)
        await it.running(slow.kernel)

        states = [(r.kernel.session, r.state) for r in it.heard]
        assert ("fast", KernelState.PREPARING) not in states
        assert ("slow", KernelState.PREPARING) in states


@virtual
async def test_a_stop_during_a_slow_start_comes_next(world: World) -> None:
    world.delays["prepare"] = 5.0
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await asyncio.sleep(1)

        await it.stop_kernel(wanted.kernel)

        assert (await it.ended(wanted.kernel)).reason is Reason.USER
        assert world.machine.live == []


@virtual
async def test_what_is_forgotten_while_it_starts_is_removed(world: World) -> None:
    """Told once: removal is final, although the program runs by then."""
    world.delays["start"] = 5.0
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await asyncio.sleep(1)

        await it.forget(wanted.kernel)
        async with asyncio.timeout(30):
            while it.agent.kernels:
                await it.agent.kernels_changed.wait()

        assert world.machine.kernels == {}


# --- ends


@virtual
async def test_a_dead_keeper_is_a_lost_session_at_once(world: World) -> None:
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)
        at = world.clock.monotonic()

        world.machine.lose_keeper(wanted.kernel)

        assert (await it.ended(wanted.kernel)).reason is Reason.LOST
        assert world.clock.monotonic() - at < 0.1


@virtual
async def test_a_keeper_that_does_not_stop_its_session_is_overruled(world: World) -> None:
    world.delays["stop"] = 1e6
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)
        at = world.clock.monotonic()

        await it.stop_kernel(wanted.kernel, grace_s=3.0)

        await it.ended(wanted.kernel)
        took = world.clock.monotonic() - at
        assert 2.9 < took < 3.0 + world.settings.kill_margin_s + 0.5


@virtual
async def test_a_kill_that_fails_is_tried_again(world: World) -> None:
    world.delays["stop"] = 1e6
    world.failures["kill"] = [LauncherUnavailable("away"), RuntimeFailed("hm")]
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)

        await it.stop_kernel(wanted.kernel, grace_s=1e5)
        await it.stop_kernel(wanted.kernel, grace_s=0)

        await it.ended(wanted.kernel)


@virtual
async def test_cleaning_up_is_tried_again_then_told_as_lost(world: World) -> None:
    world.failures["settle"] = [RuntimeFailed("a mount is busy")] * 50
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)

        world.machine.exit(wanted.kernel)

        ended = await it.ended(wanted.kernel)
        assert ended.reason is Reason.LOST
        assert "a mount is busy" in ended.text
        assert 2 < calls(world, "settle") < 10


@virtual
async def test_removal_is_tried_until_it_works(world: World) -> None:
    world.failures["remove"] = [RuntimeFailed("busy")] * 5
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)

        await it.forget(wanted.kernel)
        while it.agent.kernels:
            await it.agent.kernels_changed.wait()

        assert world.machine.kernels == {}


@virtual
@pytest.mark.parametrize(
    ("limit", "reason", "usage"),
    [
        ("mem", Reason.OOM, Usage(at=0, mem_bytes=65 * MIB)),
        ("disk", Reason.DISK, Usage(at=0, disk_bytes=2 * GIB)),
    ],
)
async def test_a_limit_that_only_the_agent_watches_ends_the_session(
    world: World, limit: str, reason: Reason, usage: Usage
) -> None:
    world.enforced = {"mem": "cgroup", "disk": "quota"} | {limit: "watch"}
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)
        await asyncio.sleep(10)
        assert it.is_in(wanted.kernel, KernelState.RUNNING)
        at = world.clock.monotonic()

        world.last_runtime.usages[wanted.kernel] = usage

        ended = await it.ended(wanted.kernel)
        assert ended.reason is reason
        assert f"--{limit}" in ended.text
        assert world.clock.monotonic() - at <= world.settings.watch_period_s + 0.1


@virtual
async def test_a_limit_that_the_kernel_holds_is_left_to_it(world: World) -> None:
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)

        world.last_runtime.usages[wanted.kernel] = Usage(at=0, mem_bytes=10 * GIB)
        await asyncio.sleep(30)

        assert it.is_in(wanted.kernel, KernelState.RUNNING)


# --- what the agent did not expect


@virtual
async def test_a_kernel_that_nobody_knows_is_removed(world: World) -> None:
    async with world.node() as it:
        stranger = KernelId("stranger", 1)
        world.machine.kernels[stranger] = FakeKernel(SPEC)
        world.machine.start(stranger)

        await asyncio.sleep(world.settings.audit_s + 1)

        assert stranger not in world.machine.kernels
        assert it.agent.kernels == {}


@virtual
async def test_a_kernel_found_at_the_start_waits_for_the_manager_s_word(world: World) -> None:
    wanted = assignment("s")
    world.machine.kernels[wanted.kernel] = FakeKernel(SPEC)
    world.machine.start(wanted.kernel)
    async with world.node() as it:
        assert it.hello is not None
        assert it.hello.inventory == (), "its nonce is not known"

    assert world.machine.starts == {wanted.kernel: 1}


@virtual
async def test_after_a_reboot_nothing_is_started_again(world: World) -> None:
    async with world.node() as it:
        running, starting = assignment("running"), assignment("starting")
        await it.want(running)
        await it.running(running.kernel)
        world.delays["prepare"] = 1e3
        await it.want(starting)
        await asyncio.sleep(1)
        await it.stop()
        world.machine.reboot()
        world.machine.kernels.pop(starting.kernel, None)
        world.delays.clear()
        it.settings = replace(it.settings, boot_id="another boot")

        await it.start()

        for kernel in (running.kernel, starting.kernel):
            assert (await it.ended(kernel)).reason is Reason.LOST
        assert world.machine.starts == {running.kernel: 1}


@virtual
async def test_the_same_kernel_under_another_nonce_is_a_new_one(world: World) -> None:
    """A manager whose database was restored from a backup counts an attempt again."""
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)
        world.machine.starts.clear()

        await it.want(replace(wanted, nonce="another"))

        await it.until(lambda: it.reports[wanted.kernel].nonce == "another")
        await it.running(wanted.kernel)
        assert world.machine.starts == {wanted.kernel: 1}


@virtual
async def test_a_newer_link_ends_an_older_one(world: World) -> None:
    async with world.node() as it:
        manager, theirs = memory_link()
        second = asyncio.create_task(it.agent.serve(theirs))

        hello = await manager.receive()

        await it.link_ended()
        assert isinstance(hello, Hello)
        await manager.close()
        await second
        await it.connect()


@virtual
async def test_a_delta_before_the_first_full_list_is_not_followed(world: World) -> None:
    async with world.node() as it:
        await it.disconnect()
        manager, theirs = memory_link()
        serving = asyncio.create_task(it.agent.serve(theirs))

        await manager.send(Desired(revision=99, full=False, set=(assignment("s"),)))
        await asyncio.sleep(1)

        assert it.agent.kernels == {}
        await manager.close()
        await serving
        await it.connect()


@virtual
async def test_a_stop_needs_no_journal_but_a_start_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise StorageFull("no space left")

    async with world.node() as it:
        wanted, refused = assignment("s"), assignment("refused")
        await it.want(wanted)
        await it.running(wanted.kernel)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "save", full)
            await it.want(refused)
            assert (await it.ended(refused.kernel)).text == "no space left"
            await it.stop_kernel(wanted.kernel)
            assert (await it.ended(wanted.kernel)).reason is Reason.USER

        assert list(world.machine.starts) == [wanted.kernel]


@virtual
async def test_a_stream_may_overtake_the_assignment(world: World) -> None:
    async with world.node() as it:
        wanted = assignment("s")
        stream = await it.open(ReadLog(kernel=wanted.kernel, follow=True))
        await asyncio.sleep(1)

        await it.want(wanted)
        await it.running(wanted.kernel)
        world.machine.exit(wanted.kernel, 5)

        (end,) = [item async for item in stream]
        assert isinstance(end, Ended)
        assert end.exit_code == 5


@virtual
async def test_a_stream_for_an_unknown_kernel_fails_in_words(world: World) -> None:
    async with world.node() as it:
        with pytest.raises(LogGone, match="not on node n1"):
            await it.items(ReadLog(kernel=KernelId("nobody", 1)))


@virtual
async def test_the_log_of_what_never_started_is_just_its_end(world: World) -> None:
    world.failures["start"] = [HostLacks("no")]
    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)

        (end,) = await it.items(ReadLog(kernel=wanted.kernel, follow=True))

        assert isinstance(end, Ended)
        assert end.reason is Reason.START_FAILED


@virtual
async def test_hello_says_what_the_node_can_give(world: World) -> None:
    layers = Path(world.root, "layers")
    layers.mkdir()
    (layers / ("a" * 64)).mkdir()
    (layers / ".tmp-x").mkdir()
    world.settings = replace(world.settings, cpu_overcommit=3.0, mem_reserve_bytes=GIB)
    async with world.node() as it:
        assert it.hello is not None
        capacity = it.hello.capacity

        assert capacity.cpu == 3.0 * len(os.sched_getaffinity(0))
        assert capacity.mem_bytes > 0
        assert capacity.disk_bytes > 0
        assert capacity.pids > 0
        assert it.hello.layers == ("a" * 64,)
        assert it.hello.facts["enforced.mem"] == "cgroup"
        assert it.hello.node == "n1"


@virtual
async def test_an_agent_that_can_not_open_leaves_nothing_open(world: World) -> None:
    class Broken(FakeRuntime):
        async def adopt(self) -> list[Found]:
            raise LauncherUnavailable("the launcher does not answer")

    runtime = Broken(world.machine, world.root)
    agent = Agent(world.settings, runtime, NoBlobs(), world.clock, keepers=runtime)

    with pytest.raises(LauncherUnavailable):
        await agent.open()

    async with world.node() as it:
        wanted = assignment("s")
        await it.want(wanted)
        await it.running(wanted.kernel)
