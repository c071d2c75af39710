"""A machine without processes: the runtime and its keepers in memory, for simulations.

``FakeMachine`` is what outlives the agent: kernels, their programs, how they ended. It notes what
must never happen in ``violations``. ``FakeRuntime`` is one agent's way to it, with delays and
failures as the test says.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Final

from madang.agent.keepers import KeeperNews, StdinWriter
from madang.agent.runtime.contract import Found, Prepared, RuntimeFacts, Started
from madang.kit.broadcast import Broadcast
from madang.kit.clock import Clock
from madang.kit.tasks import TaskSet
from madang.wire.errors import Conflict, PlatformError, RuntimeFailed, SessionNotRunning
from madang.wire.kernel import ExecSpec, KernelId, KernelSpec, WarmLoad
from madang.wire.policy import NO_SANDBOX, Sandbox
from madang.wire.session import Ended, Reason, Usage


@dataclass(slots=True)
class FakeKernel:
    """One kernel on the machine."""

    spec: KernelSpec
    started_at: float | None = None
    ended: Ended | None = None
    running: bool = False
    settled: bool = False
    end: int = 0
    frozen_by: FakeRuntime | None = None
    """Who froze it, if it is frozen."""
    frozen_at: float = 0.0
    sandbox: Sandbox = NO_SANDBOX
    """Whose live rules are in force."""
    changed: Broadcast = field(default_factory=Broadcast)


class FakeMachine:
    """What survives agents; loses its running programs with ``reboot``."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.kernels: dict[KernelId, FakeKernel] = {}
        self.starts: dict[KernelId, int] = {}
        """How often the main program of each was started, ever."""
        self.violations: list[str] = []
        self.boots = 1
        self.tasks = TaskSet()

    @property
    def live(self) -> list[KernelId]:
        return [kernel for kernel, state in self.kernels.items() if state.running]

    def start(self, kernel: KernelId) -> FakeKernel:
        state = self.kernels[kernel]
        if state.running or state.started_at is not None:
            return state
        if others := [other for other in self.live if other.session == kernel.session]:
            self.violations.append(f"{kernel} was started while {others[0]} ran")
        if later := [
            k for k in self.starts if k.session == kernel.session and k.attempt > kernel.attempt
        ]:
            self.violations.append(f"{kernel} was started after {later[0]}")
        self.starts[kernel] = self.starts.get(kernel, 0) + 1
        if self.starts[kernel] > 1:
            self.violations.append(f"{kernel} was started again")
        state.running, state.started_at = True, self.clock.now()
        state.changed.notify()
        return state

    def end(self, kernel: KernelId, ended: Ended) -> None:
        """The main program ends; nothing if it does not run."""
        state = self.kernels.get(kernel)
        if state is not None and state.running:
            state.running, state.ended, state.frozen_by = False, ended, None
            state.changed.notify()

    def is_frozen(self, kernel: KernelId) -> bool:
        return kernel in self.kernels and self.kernels[kernel].frozen_by is not None

    def set_frozen(self, kernel: KernelId, by: FakeRuntime | None) -> None:
        """Nothing if it does not run."""
        state = self.kernels.get(kernel)
        if state is not None and state.running:
            state.frozen_by, state.frozen_at = by, self.clock.now()
            state.changed.notify()

    def exit(self, kernel: KernelId, code: int = 0) -> None:
        """By itself, so not while it is frozen."""
        if self.is_frozen(kernel):
            return
        self.end(kernel, Ended(reason=Reason.EXIT, exit_code=code, at=self.clock.now()))

    def lose_keeper(self, kernel: KernelId) -> None:
        """The keeper is killed: the program ends, nobody says how."""
        state = self.kernels.get(kernel)
        if state is not None and state.running:
            state.running, state.frozen_by = False, None
            state.changed.notify()

    def reboot(self) -> None:
        self.boots += 1
        for kernel in self.live:
            self.lose_keeper(kernel)


class FakeRuntime:
    """See ``agent.runtime.contract.Runtime`` and ``agent.keepers.Keepers``."""

    name = "fake"

    def __init__(
        self,
        machine: FakeMachine,
        root: str,
        *,
        enforced: dict[str, str] | None = None,
        delay: Callable[[str], float] = lambda operation: 0.0,
        failure: Callable[[str, KernelId], PlatformError | None] = lambda operation, kernel: None,
    ) -> None:
        """*delay* and *failure* are asked at each call, by the operation's name."""
        self.machine = machine
        self.calls: list[tuple[str, KernelId]] = []
        self.usages: dict[KernelId, Usage] = {}
        self.adopted_at = 0.0
        self._root = root
        self._enforced: Final = {"mem": "cgroup", "disk": "quota"} if enforced is None else enforced
        self._delay = delay
        self._failure = failure

    async def open(self) -> RuntimeFacts:
        return RuntimeFacts(name=self.name, rootless=False, enforced=self._enforced)

    async def close(self) -> None:
        return None

    async def prepare(self, kernel: KernelId, spec: KernelSpec) -> Prepared:
        await self._do("prepare", kernel, lambda: self._prepare(kernel, spec))
        return Prepared(enforced=dict(self._enforced))

    def _prepare(self, kernel: KernelId, spec: KernelSpec) -> None:
        self.machine.kernels.setdefault(kernel, FakeKernel(spec))

    async def start(self, kernel: KernelId, spec: KernelSpec) -> Started:
        await self._do("start", kernel, lambda: self._start(kernel, spec))
        state = self.machine.kernels.get(kernel)
        if state is None or state.started_at is None:
            raise RuntimeFailed(f"{kernel} was removed while it started")
        return Started(at=state.started_at)

    async def run(self, kernel: KernelId, spec: KernelSpec) -> tuple[Prepared, Started]:
        return await self.prepare(kernel, spec), await self.start(kernel, spec)

    def _start(self, kernel: KernelId, spec: KernelSpec) -> None:
        state = self.machine.kernels.get(kernel)
        if state is not None and not state.settled:
            if state.started_at is None:
                state.sandbox = spec.sandbox
            self.machine.start(kernel)

    async def exec(self, kernel: KernelId, exec_id: str, spec: ExecSpec) -> Started:
        await self._do("exec", kernel, lambda: None)
        if kernel not in self.machine.live:
            raise SessionNotRunning(f"{kernel} does not run")
        return Started(at=self.machine.clock.now())

    async def kill(self, kernel: KernelId) -> None:
        await self._do("kill", kernel, lambda: self._kill(kernel))

    def _kill(self, kernel: KernelId) -> None:
        self.check_heard(kernel, "is killed while frozen: it heard no signal")
        ended = Ended(reason=Reason.SIGNAL, signal=9, exit_code=137, at=self.machine.clock.now())
        self.machine.end(kernel, ended)

    async def freeze(self, kernel: KernelId) -> None:
        await self._do("freeze", kernel, lambda: self.machine.set_frozen(kernel, self))

    async def thaw(self, kernel: KernelId) -> None:
        await self._do("thaw", kernel, lambda: self.machine.set_frozen(kernel, None))

    async def guard(self, kernel: KernelId, sandbox: Sandbox) -> tuple[str, ...]:
        await self._do("guard", kernel, lambda: self._guard(kernel, sandbox))
        if kernel not in self.machine.live:
            raise Conflict(f"{kernel} does not run")
        return ()

    def _guard(self, kernel: KernelId, sandbox: Sandbox) -> None:
        if (state := self.machine.kernels.get(kernel)) is not None and state.running:
            state.sandbox = sandbox

    async def usage(self, kernel: KernelId) -> Usage:
        if kernel not in self.machine.live:
            raise SessionNotRunning(f"{kernel} does not run")
        return self.usages.get(kernel, Usage(at=self.machine.clock.now()))

    async def files(self, kernel: KernelId) -> socket.socket:
        raise RuntimeFailed("a fake machine has no files")

    async def changes(self, kernel: KernelId) -> socket.socket:
        raise RuntimeFailed("a fake machine has no files")

    async def warmth(self) -> WarmLoad | None:
        return None

    async def adopt(self) -> list[Found]:
        self.adopted_at = self.machine.clock.now()
        return [
            Found(
                kernel=kernel,
                prepared=True,
                running=state.running,
                started_at=state.started_at,
                ended=state.ended,
                frozen=state.frozen_by is not None,
            )
            for kernel, state in self.machine.kernels.items()
        ]

    async def settle(self, kernel: KernelId) -> Ended:
        await self._do("settle", kernel, lambda: self._settle(kernel))
        state = self.machine.kernels.get(kernel)
        if state is None or state.ended is None:
            return Ended(reason=Reason.LOST, text="nobody saw how it ended")
        return state.ended

    def _settle(self, kernel: KernelId) -> None:
        if (state := self.machine.kernels.get(kernel)) is not None:
            self.machine.lose_keeper(kernel)
            state.settled = True

    async def remove(self, kernel: KernelId) -> None:
        await self._do("remove", kernel, lambda: self._remove(kernel))

    def _remove(self, kernel: KernelId) -> None:
        self.machine.lose_keeper(kernel)
        self.machine.kernels.pop(kernel, None)

    def kernel_dir(self, kernel: KernelId) -> str:
        return os.path.join(self._root, str(kernel))

    async def wait_change(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def _do(self, operation: str, kernel: KernelId, act: Callable[[], None]) -> None:
        """Once asked, the machine acts, even if the asking agent dies meanwhile."""
        self.calls.append((operation, kernel))
        failure = self._failure(operation, kernel)
        done = asyncio.get_running_loop().create_future()

        async def work() -> None:
            await self.machine.clock.sleep(self._delay(operation))
            if failure is None:
                act()
            done.set_result(None)

        self.machine.tasks.spawn(work(), f"fake:{operation}:{kernel}")
        await asyncio.shield(done)
        if failure is not None:
            raise failure

    # --- keepers

    def _by_folder(self, folder: str) -> KernelId:
        return KernelId.parse(os.path.basename(os.path.dirname(os.path.dirname(folder))))

    async def watch(self, folder: str) -> AsyncGenerator[KeeperNews, None]:
        kernel = self._by_folder(folder)
        while (state := self.machine.kernels.get(kernel)) is not None and state.running:
            yield KeeperNews(state.end)
            if state.running:
                await state.changed.wait()
        if state is not None and state.ended is not None:
            yield KeeperNews(state.end, ended=True)

    async def stop(self, folder: str, *, reason: str, text: str, grace_s: float) -> None:
        kernel = self._by_folder(folder)
        if kernel not in self.machine.live:
            raise SessionNotRunning(f"{kernel} does not run")
        self.calls.append(("stop", kernel))
        ended = Ended(reason=Reason(reason), text=text, exit_code=143, at=self.machine.clock.now())

        async def work() -> None:
            await self.machine.clock.sleep(min(grace_s, self._delay("stop")))
            while self.machine.is_frozen(kernel):  # it hears nothing
                await self.machine.kernels[kernel].changed.wait()
            self.machine.end(kernel, ended)

        self.machine.tasks.spawn(work(), f"fake:stop:{kernel}")

    async def signal(self, folder: str, number: int) -> None:
        kernel = self._by_folder(folder)
        self.calls.append((f"signal {number}", kernel))
        self.check_heard(kernel)

    def check_heard(self, kernel: KernelId, wrong: str = "got input while frozen") -> None:
        """Who gets input must not be frozen, unless a former agent's request came late."""
        state = self.machine.kernels.get(kernel)
        if state is None or state.frozen_by is None:
            return
        if state.frozen_by is self or state.frozen_at < self.adopted_at:
            self.machine.violations.append(f"{kernel} {wrong}")

    async def stdin(self, folder: str) -> StdinWriter:
        raise SessionNotRunning("a fake program takes no input")


def random_delay(rng: random.Random, longest_s: float) -> Callable[[str], float]:
    """Mostly short, now and then *longest_s*."""
    return lambda operation: longest_s * rng.random() ** 4
