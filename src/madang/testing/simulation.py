"""A model manager and faults around the real agent, in virtual time; used by the protocol tests."""

from __future__ import annotations

import asyncio
import glob
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Final

from madang.agent.kernel import Kernel
from madang.agent.service import Agent
from madang.agent.settings import AgentSettings
from madang.kit.tasks import TaskSet
from madang.manager.session.rules import frost_news
from madang.testing.clock import LoopClock
from madang.testing.link import FaultyLink
from madang.testing.runtime import FakeMachine, FakeRuntime, random_delay
from madang.wire.errors import LauncherUnavailable, PlatformError, RuntimeFailed
from madang.wire.kernel import (
    Assignment,
    Desired,
    Hello,
    ImageMount,
    KernelId,
    KernelReport,
    KernelSpec,
    KernelState,
    Wanted,
)
from madang.wire.link import ManagerEnd
from madang.wire.policy import NO_SANDBOX, Act, NetRule, Sandbox
from madang.wire.size import GIB, MIB, Size

_RULES: Final = 0.8
"""How often a session that something is done to gets other rules, too; in a third of the runs."""
SPEC: Final = KernelSpec(
    argv=("true",),
    image=ImageMount(name="host", digest="h", kind="host"),
    size=Size(cpu=1, mem_bytes=64 * MIB, pids=64, disk_bytes=GIB),
    grace_s=3.0,
)


class NoBlobs:
    async def fetch(self, digest: str) -> str:
        raise RuntimeFailed(f"no blob {digest}")


def sandbox_of(number: int) -> Sandbox:
    """One that differs from all others in its only rule, which is live."""
    rule = NetRule(layer="site", line=number, act=Act.CONNECT, targets=("10.0.0.0/8",))
    return Sandbox(nets=(rule,), label=f"site {number}")


def assignment(
    session: str,
    *,
    attempt: int = 1,
    wanted: Wanted = Wanted.RUN,
    spec: KernelSpec = SPEC,
    nonce: str = "",
    stop_reason: str = "user",
) -> Assignment:
    return Assignment(
        kernel=KernelId(session, attempt),
        nonce=nonce or f"nonce-{session}-{attempt}",
        revision=0,
        wanted=wanted,
        spec=spec,
        stop_reason="" if wanted is Wanted.RUN else stop_reason,
        stop_text="" if wanted is Wanted.RUN else "stopped by a test",
    )


@dataclass(slots=True)
class Row:
    """A session in the model manager's database."""

    assignment: Assignment
    since: float
    state: KernelState = KernelState.PREPARING
    ended: bool = False
    frozen_at: int | None = None
    freeze_revision: int = 0


@dataclass(slots=True)
class ModelManager:
    """The least that a manager must do: durable rows, a growing revision, level-triggered."""

    clock: LoopClock
    rows: dict[str, Row] = field(default_factory=dict)
    revision: int = 0
    link: ManagerEnd | None = None
    incarnation: int = 0
    given_up: dict[KernelId, float] = field(default_factory=dict)
    failing: Callable[[], bool] = lambda: False
    """Whether its database fails just now: what an agent says is not taken in."""
    behind: Callable[[], bool] = lambda: False
    """Whether another manager that is behind answers first."""
    old: Desired | None = None

    async def serve(self, link: ManagerEnd) -> None:
        try:
            while True:
                message = await link.receive()
                if isinstance(message, Hello):
                    if self.behind() and self.old is not None:
                        await link.send(self.old)
                    if message.incarnation < self.incarnation:
                        return
                    self.incarnation, self.link = message.incarnation, link
                    self.revision = max(self.revision, message.revision)
                    self._note(message.inventory)
                    self.old = self._full()
                    await link.send(self.old)
                elif not self.failing():
                    known, strangers = self._note(message.kernels)
                    await self.say(*known, forget=strangers)
        except ConnectionError:
            return

    def _full(self) -> Desired:
        return Desired(
            revision=self.revision,
            full=True,
            set=tuple(row.assignment for row in self.rows.values()),
        )

    def _note(self, reports: tuple[KernelReport, ...]) -> tuple[list[str], tuple[KernelId, ...]]:
        """Sessions that have ended by it, and kernels that are not ours."""
        ended, strangers = [], []
        for report in reports:
            row = self.rows.get(report.kernel.session)
            if row is None or row.assignment.kernel != report.kernel:
                strangers.append(report.kernel)
                continue
            if row.ended or report.nonce != row.assignment.nonce:
                continue
            row.state = report.state
            self._follow_frost(row, report)
            if report.state is KernelState.ENDED and report.ended is not None:
                row.ended = True
                row.assignment = replace(row.assignment, wanted=Wanted.KEEP)
                ended.append(report.kernel.session)
        self.revision += bool(ended)
        return ended, tuple(strangers)

    def _follow_frost(self, row: Row, report: KernelReport) -> None:
        news = frost_news(row.frozen_at, row.freeze_revision, report)
        if news is not None:
            self._set_frost(row, *news)

    def _set_frost(self, row: Row, frozen_at: int | None, revision: int) -> None:
        row.frozen_at, row.freeze_revision = frozen_at, revision
        row.assignment = replace(
            row.assignment, frozen=frozen_at is not None, freeze_revision=revision
        )

    async def say(self, *changed: str, forget: tuple[KernelId, ...] = ()) -> None:
        """A delta about *changed* sessions."""
        if not changed and not forget:
            return
        self.revision += 1
        rows = tuple(self.rows[name].assignment for name in changed if name in self.rows)
        if self.link is not None:
            try:
                await self.link.send(
                    Desired(revision=self.revision, full=False, set=rows, forget=forget)
                )
            except ConnectionError:
                self.link = None

    # --- what users and the manager's own loops do

    async def create(self, session: str) -> None:
        self.rows[session] = Row(assignment(session), self.clock.now())
        await self.say(session)

    async def stop(self, session: str) -> None:
        row = self.rows[session]
        if not row.ended:
            row.assignment = replace(
                row.assignment, wanted=Wanted.STOP, stop_reason="user", stop_text="stopped"
            )
            await self.say(session)

    async def freeze(self, session: str) -> None:
        await self._order(session, frozen=True)

    async def thaw(self, session: str) -> None:
        await self._order(session, frozen=False)

    async def rule(self, session: str) -> None:
        """Other live rules, or none."""
        row = self.rows[session]
        if not row.ended:
            sandbox = NO_SANDBOX if self.revision % 3 == 0 else sandbox_of(self.revision)
            spec = replace(row.assignment.spec, sandbox=sandbox)
            row.assignment = replace(row.assignment, spec=spec, live=sandbox.label)
            await self.say(session)

    async def _order(self, session: str, *, frozen: bool) -> None:
        row = self.rows[session]
        if not row.ended and row.state is KernelState.RUNNING:
            self._set_frost(row, int(self.clock.now()) if frozen else None, self.revision + 1)
            await self.say(session)

    async def forget(self, session: str) -> None:
        if self.rows[session].ended:
            row = self.rows.pop(session)
            await self.say(forget=(row.assignment.kernel,))

    async def give_up(self, session: str) -> None:
        """Take the session for lost on this node, and try it anew."""
        row = self.rows[session]
        if not row.ended and row.state is KernelState.PREPARING:
            old = row.assignment.kernel
            self.given_up[old] = self.clock.now()
            new = assignment(session, attempt=old.attempt + 1)
            self.rows[session] = Row(new, self.clock.now())
            await self.say(session, forget=(old,))


@dataclass(frozen=True, slots=True)
class Faults:
    """How bad the days are; zero: none."""

    sessions: int = 6
    bad_s: float = 120.0
    calm_s: float = 240.0
    failing: float = 0.05


class Simulation:
    """One run; ``violations`` afterwards says what went wrong."""

    def __init__(self, seed: int, root: str, faults: Faults | None = None) -> None:
        self.rng = random.Random(seed)  # noqa: S311  (a run can be repeated)
        self.faults = faults or Faults()
        self.clock = LoopClock()
        self.machine = FakeMachine(self.clock)
        self.manager = ModelManager(
            self.clock,
            failing=lambda: self.rng.random() < 0.1,
            behind=lambda: self._bad and not seed % 2 and self.rng.random() < 0.3,
        )
        self.settings = AgentSettings(
            node="n1", state_dir=root, disk_reserve_bytes=0, heartbeat_s=5.0, boot_id="boot-1"
        )
        self._seed = seed
        self._root = root
        self._bad = True
        self._opened_at = 0.0
        self._wrong: list[str] = []
        self._woken: dict[KernelId, int] = {}
        """Kernel → the order that had frozen it when input came."""
        self._left_alone: set[KernelId] = set()
        self._tasks = TaskSet()
        self._agent: Agent | None = None
        self._link: FaultyLink | None = None
        self._serving: asyncio.Task[None] | None = None

    async def run(self) -> list[str]:
        await self._start_agent()
        faults = self._tasks.spawn(self._misfortune(), "faults")
        users = self._tasks.spawn(self._users(), "users")
        programs = self._tasks.spawn(self._programs(), "programs")
        await asyncio.sleep(self.faults.bad_s)
        self._bad = False
        for task in (faults, users):
            task.cancel()
        await self._break()  # also what was breaking when the bad days ended
        if self._agent is None:
            await self._start_agent()
        else:
            await self._connect()
        await asyncio.sleep(self.faults.calm_s / 2)
        self._wrong += self._disagreements()
        for session in list(self.manager.rows):
            await self.manager.thaw(session)
        await asyncio.sleep(self.faults.calm_s / 2)
        programs.cancel()
        found = [
            *self._wrong,
            *self.machine.violations,
            *self._unfinished(),
            *await self._clean_up(),
        ]
        await self._stop_agent()
        await self._tasks.close()
        await self.machine.tasks.close()
        return found

    # --- the parts

    async def _start_agent(self) -> None:
        self._opened_at = self.clock.now()
        settings = replace(self.settings, boot_id=f"boot-{self.machine.boots}")
        runtime = FakeRuntime(self.machine, self._root, delay=self._delay, failure=self._failure)
        agent = Agent(settings, runtime, NoBlobs(), self.clock, keepers=runtime)
        await agent.open()
        self._agent = agent
        self._runtime = runtime
        await self._connect()

    async def _stop_agent(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            await agent.close()
        if self._serving is not None:
            await asyncio.wait([self._serving])
        await self._break()

    async def _connect(self) -> None:
        assert self._agent is not None
        self._link = FaultyLink(self.clock, self._link_delay)
        self._tasks.spawn(self.manager.serve(self._link.manager), "manager")
        self._serving = self._tasks.spawn(self._agent.serve(self._link.agent), "agent")

    async def _break(self) -> None:
        link = self._link
        if link is not None:
            await link.break_it(
                agent_after_s=self.rng.uniform(0, 4) * self._bad,
                manager_after_s=self.rng.uniform(0, 8) * self._bad,
            )
            self._link = None

    def _delay(self, operation: str) -> float:
        return random_delay(self.rng, 8.0)(operation) if self._bad else 0.01

    def _link_delay(self) -> float:
        return 2.0 * self.rng.random() ** 4 if self._bad else 0.001

    def _failure(self, operation: str, kernel: KernelId) -> PlatformError | None:
        self._judge(operation, kernel)
        if self._bad and self.rng.random() < self.faults.failing:
            kind = self.rng.choice((LauncherUnavailable, RuntimeFailed))
            return kind(f"{operation} fails in the test")
        return None

    def _judge(self, operation: str, kernel: KernelId) -> None:
        """What the agent must not even ask for."""
        # A manager that is behind may confirm what another has given up: leases come later.
        alone = self._seed % 2 == 1
        given_up = self.manager.given_up.get(kernel, inf)
        if operation == "start" and alone and given_up < self._opened_at:
            self._wrong.append(f"{kernel} is started, given up before the agent itself started")
        row = self.manager.rows.get(kernel.session)
        if operation == "freeze":
            self._judge_freeze(kernel)
        wanted = row is not None and row.assignment.kernel == kernel
        if operation == "remove" and wanted:
            self._wrong.append(f"{kernel} is removed but wanted")

    def _judge_freeze(self, kernel: KernelId) -> None:
        """What input has woken is frozen by a newer order alone, or for being left alone."""
        if self._agent is None or kernel in self._left_alone:
            return
        order = self._agent.kernels[kernel].freeze_order
        if order <= self._woken.get(kernel, -1):
            self._wrong.append(f"{kernel} is frozen by order {order} again, input had woken it")

    # --- what happens to them

    async def _misfortune(self) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(0.5, 6))
            chance = self.rng.random()
            if chance < 0.4:
                await self._break()
                await asyncio.sleep(self.rng.uniform(0, 4))
                if self._agent is not None:
                    await self._connect()
            elif chance < 0.7:
                await self._stop_agent()
                await asyncio.sleep(self.rng.uniform(0, 15))
                await self._start_agent()
            elif chance < 0.75:
                await self._stop_agent()
                self.machine.reboot()
                await self._start_agent()
            elif chance < 0.8 and self._seed % 2:  # an old list could not be told then
                await self._stop_agent()
                for path in glob.glob(self.settings.journal + "*"):
                    os.unlink(path)
                self._woken.clear()  # nor could what was done already
                await self._start_agent()
            elif self.machine.live:
                self.machine.lose_keeper(self.rng.choice(self.machine.live))

    async def _users(self) -> None:
        created = 0
        while True:
            await asyncio.sleep(self.rng.uniform(0.2, 4))
            if sum(not row.ended for row in self.manager.rows.values()) < self.faults.sessions:
                await self.manager.create(f"s{created}")
                created += 1
            session = self.rng.choice(list(self.manager.rows))
            manager = self.manager
            ends = (manager.stop, manager.forget, manager.give_up)
            act = self.rng.choice((*ends, *ends, manager.freeze, manager.thaw, self._use))
            await act(session)
            if self._seed % 3 == 2 and session in manager.rows and self.rng.random() < _RULES:
                await manager.rule(session)

    async def _use(self, session: str) -> None:
        """Somebody types, or nobody did for long."""
        kernel_id = self.manager.rows[session].assignment.kernel
        if self._agent is None or (kernel := self._agent.kernels.get(kernel_id)) is None:
            return
        if self.rng.random() < 0.3:
            self._left_alone.add(kernel_id)
            kernel.leave_alone()
        elif kernel.running:
            self._tasks.spawn(self._type(kernel, self._runtime), "input")

    async def _type(self, kernel: Kernel, runtime: FakeRuntime) -> None:
        order = kernel.freeze_order
        await kernel.awaken()
        if self._runtime is not runtime or not kernel.running:
            return
        if kernel.freeze_order == order and kernel.id not in self._left_alone:
            self._woken[kernel.id] = order
            runtime.check_heard(kernel.id)

    async def _programs(self) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(1, 10))
            live = [kernel for kernel in self.machine.live if not self._is_stopping(kernel)]
            if live:
                self.machine.exit(self.rng.choice(live), self.rng.randrange(3))

    def _is_stopping(self, kernel: KernelId) -> bool:
        """Then it is the agent that must end it."""
        row = self.manager.rows.get(kernel.session)
        return row is not None and row.assignment.wanted is Wanted.STOP

    # --- what must be true at the end

    def _disagreements(self) -> list[str]:
        """After a calm while machine and rows say the same of each kernel."""
        found = []
        for kernel in self.machine.live:
            row = self.manager.rows.get(kernel.session)
            if row is None or row.assignment.kernel != kernel:
                continue
            frozen = self.machine.is_frozen(kernel)
            if frozen is not (row.frozen_at is not None):
                found.append(f"{kernel} is frozen: {frozen}, its row: {row.frozen_at}")
            has, wanted = self.machine.kernels[kernel].sandbox, row.assignment.spec.sandbox
            if has != wanted and not self._refused(kernel):
                found.append(f"{kernel} has the rules of {has.label!r}, not {wanted.label!r}")
        return found

    def _refused(self, kernel: KernelId) -> bool:
        """Its machine has said that it can't have the newest rules."""
        found = None if self._agent is None else self._agent.kernels.get(kernel)
        return found is not None and bool(found.report().guarded.error)

    def _unfinished(self) -> list[str]:
        wanted = {row.assignment.kernel for row in self.manager.rows.values()}
        found = [
            f"{row.assignment.kernel} has not ended"
            for row in self.manager.rows.values()
            if not row.ended
        ]
        found += [f"{kernel} is an orphan" for kernel in self.machine.kernels.keys() - wanted]
        found += [f"{kernel} still runs" for kernel in self.machine.live]
        return found

    async def _clean_up(self) -> list[str]:
        """Forget everything: nothing may be left, on the machine or in the agent."""
        for session in list(self.manager.rows):
            await self.manager.forget(session)
        await asyncio.sleep(60)
        return [f"{kernel} was left behind" for kernel in self.machine.kernels]
