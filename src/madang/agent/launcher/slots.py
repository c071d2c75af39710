"""Slots: a keeper and an init made ahead, waiting for a session. The launcher's side."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from madang.agent.launcher import channel, scratch
from madang.agent.launcher.cgroups import Group, Hierarchies
from madang.agent.launcher.order import Berth, Order
from madang.agent.launcher.processes import ProcessId, kill, say, stat_fields
from madang.agent.launcher.timers import Timers
from madang.agent.launcher.workers import Workers
from madang.agent.launcher.zygote import Zygote, ZygoteLost
from madang.wire.errors import PlatformError, RuntimeFailed

_RETRY_S: Final = 0.005
_REFILL_S: Final = 0.03
"""Slots are made so long after the last start, not to be in its way."""
_LEAVE_S: Final = 5.0
"""A keeper that was told to leave is killed after so long."""
_EMPTY_S: Final = 10.0
"""Groups must be empty so long after the last process was killed."""

_numbers: Final = itertools.count()


@dataclass(eq=False, slots=True, kw_only=True)
class Slot:
    name: str
    group: Group
    link: socket.socket
    keeper: ProcessId
    keeper_fd: int
    init: ProcessId | None = None
    init_fd: int = -1
    ready: bool = False
    failure: str = ""
    """Words of a keeper or init that could not go on."""
    nest: str = ""
    """Name of the nest that it is in, if it is."""
    pool: list[Slot] | None = None
    """Where it waits."""
    seat: Callable[[Sequence[int]], None] | None = None
    """In a nest: takes what a fork of the interpreter needs to come in."""
    missed: Callable[[], None] = lambda: None
    """Called where none came."""
    warm: bool = False
    """Whether one came."""
    became: Callable[[], None] = lambda: None
    """Called when it has become the program."""
    admit: Callable[[int, int], None] | None = None
    """Takes a pidfd of the first process of its box, and where word of it is waited for."""

    def claim(self, order: Order, guard: Sequence[int] = (), folders: Sequence[int] = ()) -> bool:
        """Hand the session over, and a channel to its guard; False if the keeper has gone.

        *folders* are for an init with a seat; see ``Frame.take``.
        """
        fd = channel.to_memory(order.to_json())
        try:
            return channel.send(self.link, {"folders": len(folders)}, [fd, *folders, *guard])
        finally:
            os.close(fd)

    def hear(self) -> channel.Message | None:
        """The keeper's next message, taken in; None once it is gone."""
        message, fds = channel.receive(self.link)
        if message is not None:
            self._note(message, fds)
        for fd in fds:
            os.close(fd)
        return message

    def _note(self, message: channel.Message, fds: list[int]) -> None:
        """What is left of *fds* is closed."""
        if isinstance(pid := message.get("init"), int):
            self._find_init(pid)
        elif "seat" in message and self.seat is not None:
            self.seat(fds)
        elif "guest" in message and self.admit is not None and len(fds) == 2:
            admit, self.admit = self.admit, None
            admit(fds.pop(0), fds.pop(0))
        elif "ready" in message:
            self.ready = self.init is not None
            self.warm = bool(message.get("warm"))
            if self.seat is not None and not self.warm:
                self.missed()
        elif "failed" in message:
            self.failure = str(message["failed"])[:1000]

    def _find_init(self, pid: int) -> None:
        """Believe the pid only if it is the keeper's child."""
        found, fields = ProcessId.of(pid), stat_fields(pid)
        if found is None or fields is None or int(fields[1]) != self.keeper.pid:
            return
        fd = found.open()
        if fd is not None:
            self.init, self.init_fd = found, fd

    def processes(self) -> list[int]:
        """Keeper, init, and whoever waits inside."""
        return [self.keeper.pid, *self.group.processes()]

    def abandon(self) -> None:
        """Kill both; the group is left to be removed."""
        for fd in (self.init_fd, self.keeper_fd):
            if fd >= 0:
                kill(fd)


class Slots:
    """Keeps some ready, and disks too; ends those that fail."""

    def __init__(
        self,
        *,
        folder: str,
        owner: tuple[int, int],
        wanted: int,
        hierarchies: Hierarchies,
        disks: scratch.Pool,
        workers: Workers,
        selector: selectors.BaseSelector,
        timers: Timers,
    ) -> None:
        self._zygote = Zygote(folder, hierarchies, *owner)
        self._wanted = wanted
        self._hierarchies = hierarchies
        self._disks = disks
        self._workers = workers
        self._selector = selector
        self._timers = timers
        self._ready: list[Slot] = []
        self._filling = False
        self._filling_disks = False

    def take(self) -> Slot:
        """A ready one, or one that will be ready soon. Raises RuntimeFailed."""
        return self._ready.pop(0) if self._ready else self.make(self._ready)

    def make(
        self,
        pool: list[Slot],
        berth: Berth | None = None,
        seat: Callable[[Sequence[int]], None] | None = None,
        missed: Callable[[], None] = lambda: None,
    ) -> Slot:
        """A new one, for *pool*, into which the caller puts it. Raises RuntimeFailed.

        In a nest, where *berth* says; *seat* and *missed*: see Slot.
        """
        try:
            try:
                slot = self._fork(berth)
            except ZygoteLost:
                slot = self._fork(berth)
        except OSError as exc:
            raise RuntimeFailed(f"no process can be had for a session: {exc}.") from exc
        slot.pool, slot.seat, slot.missed = pool, seat, missed
        self._selector.register(slot.link, selectors.EVENT_READ, partial(self._hear, slot))
        return slot

    def fork_nest(self, launcher: socket.socket, interpreter: socket.socket, order: int) -> int:
        """See ``Zygote.fork_nest``."""
        try:
            return self._zygote.fork_nest(launcher, interpreter, order)
        except ZygoteLost:
            return self._zygote.fork_nest(launcher, interpreter, order)

    def _fork(self, berth: Berth | None) -> Slot:
        """A new slot. Raises OSError if no process or group can be had."""
        name = f"s{next(_numbers)}-{os.urandom(3).hex()}"
        group = self._hierarchies.make(name)
        ours, theirs = channel.pair()
        try:
            with theirs:
                pid = self._zygote.fork_keeper(name, theirs, berth)
            keeper = ProcessId.of(pid)
            if keeper is None:
                os.waitpid(pid, 0)
                raise ZygoteLost(errno.ECHILD, "it was killed as soon as it was there")
        except OSError:
            ours.close()
            self.clear_group(group, lambda _: None)
            raise
        ours.setblocking(False)
        return Slot(name=name, group=group, link=ours, keeper=keeper, keeper_fd=os.pidfd_open(pid))

    def fork_guard(self, launcher: socket.socket) -> int:
        """The pid of a guard, our child. Raises RuntimeFailed."""
        try:
            try:
                return self._zygote.fork_guard(launcher)
            except ZygoteLost:
                return self._zygote.fork_guard(launcher)
        except OSError as exc:
            raise RuntimeFailed(f"no process can be had for a session's guard: {exc}.") from exc

    def _hear(self, slot: Slot, _events: int) -> None:
        """News of a slot that waits."""
        if slot.hear() is None:
            if slot.pool is not None and slot in slot.pool:
                slot.pool.remove(slot)
            say(f"launcher: slot lost: {slot.failure or 'killed'}")
            slot.missed()
            self.drop(slot)
            self._timers.after(1.0, self.fill_up)

    def drop(self, slot: Slot) -> None:
        """One that waits and is not wanted. If we don't know its init yet, its keeper buries it."""
        self._selector.unregister(slot.link)
        with contextlib.suppress(BlockingIOError):
            while slot.init is None and slot.hear() is not None:
                pass
        slot.link.close()
        self.bury(slot, at_once=slot.init is not None)

    def bury(self, slot: Slot, *, at_once: bool = True) -> None:
        """Both processes leave or are killed; then the group goes."""
        timer = -1
        if at_once:
            slot.abandon()
        else:
            timer = self._timers.after(_LEAVE_S, slot.abandon)
        pid, keeper_fd = slot.keeper.pid, slot.keeper_fd

        def left(_events: int) -> None:
            self._timers.cancel(timer)
            self._selector.unregister(keeper_fd)
            os.waitpid(pid, 0)
            os.close(keeper_fd)
            if slot.init_fd >= 0:
                self.end_init(slot.init_fd)
            self.clear_group(slot.group, lambda _: None)

        self._selector.register(keeper_fd, selectors.EVENT_READ, left)

    def fill_up(self) -> None:
        short = len(self._ready) < self._wanted or self._disks.missing() > 0
        if short and not self._filling:
            self._filling = True
            self._timers.after(_REFILL_S, self.refill)

    def refill(self) -> None:
        """One slot at a time, so that requests in between are not kept waiting."""
        self._filling = False
        if len(self._ready) < self._wanted:
            try:
                self._ready.append(self.make(self._ready))
            except RuntimeFailed as exc:
                say(f"launcher: {exc.text}")
                self._timers.after(1.0, self.fill_up)
                return
            self.fill_up()
        else:
            self._fill_disks()

    def _fill_disks(self) -> None:
        if self._disks.missing() > 0 and not self._filling_disks:
            self._filling_disks = True

            def filled(result: Any) -> None:
                self._filling_disks = False
                if isinstance(result, PlatformError):
                    say(f"launcher: {result.text}")

            self._workers.run("refill", done=filled)

    def end_init(self, init_fd: int) -> None:
        """Of a keeper that has left. Kill it; bury it if it became our child (a subreaper's)."""
        kill(init_fd)

        def dead(_events: int) -> None:
            self._selector.unregister(init_fd)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, init_fd, os.WEXITED)
            os.close(init_fd)

        self._selector.register(init_fd, selectors.EVENT_READ, dead)

    def clear_group(self, group: Group, done: Callable[[bool], None]) -> None:
        """Remove a group once its processes are gone; they were killed, or their init was."""
        group.thaw()
        deadline = time.monotonic() + _EMPTY_S
        strays: set[ProcessId] = set()

        def attempt() -> None:
            if group.remove():
                done(True)
            elif time.monotonic() > deadline:
                done(False)
            else:
                for pid in group.processes():
                    self._end_stray(pid, strays)
                self._timers.after(_RETRY_S, attempt)

        attempt()

    def _end_stray(self, pid: int, known: set[ProcessId]) -> None:
        """A process in one of our groups, seen a moment ago."""
        found = ProcessId.of(pid)
        if found is None or found in known:
            return
        known.add(found)
        if (fd := found.open()) is not None:
            self.end_init(fd)
