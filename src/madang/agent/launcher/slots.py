"""Slots: a keeper and an init made ahead, waiting for a session. The launcher's side."""

from __future__ import annotations

import itertools
import os
import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from madang.agent.launcher import channel, keeper, syscalls
from madang.agent.launcher.cgroups import NOWHERE, Group, Hierarchies
from madang.agent.launcher.order import Order
from madang.agent.launcher.processes import ProcessId, kill

Events = Callable[["Slot", channel.Message | None], None]
"""Called with each message of the keeper, and with None once it is gone."""

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
    kernel: str | None = None
    failure: str = ""
    """Words of a keeper or init that could not go on."""
    began: float = field(default=0.0)

    def claim(self, order: Order) -> bool:
        """Hand the session over; False if the keeper has gone."""
        fd = channel.to_memory(order.to_json())
        try:
            return channel.send(self.link, {"claim": True}, [fd])
        finally:
            os.close(fd)

    def hear(self) -> channel.Message | None:
        """The keeper's next message, taken in; None once it is gone."""
        message, fds = channel.receive(self.link)
        for fd in fds:
            os.close(fd)
        if message is not None:
            self._note(message)
        return message

    def _note(self, message: channel.Message) -> None:
        if "init" in message:
            self._find_init(int(message["init"]))
        elif "ready" in message:
            self.ready = self.init is not None
        elif "failed" in message:
            self.failure = str(message["failed"])[:1000]

    def _find_init(self, pid: int) -> None:
        """Believe the pid only if it is the keeper's child."""
        found = ProcessId.of(pid)
        if found is None or _parent(pid) != self.keeper.pid:
            return
        fd = found.open()
        if fd is not None:
            self.init, self.init_fd = found, fd

    def abandon(self) -> None:
        """Kill both; the group is left to be removed."""
        for fd in (self.init_fd, self.keeper_fd):
            if fd >= 0:
                kill(fd)


def make(
    folder: str,
    hierarchies: Hierarchies,
    uid: int,
    gid: int,
    selector: selectors.BaseSelector,
) -> Slot:
    """Fork a slot that works in *folder*. Raises OSError if no process or group can be had."""
    name = f"s{next(_numbers)}-{os.urandom(3).hex()}"
    group = hierarchies.make(name) if hierarchies is not NOWHERE else Group(version=0)
    ours, theirs = channel.pair()
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        group.remove()
        raise
    if pid == 0:
        selector.close()
        syscalls.close_all_but(theirs.fileno())
        keeper.run(theirs, folder, group, uid, gid)
    theirs.close()
    ours.setblocking(False)
    started = ProcessId.of(pid)
    assert started is not None, "a child that was not waited for has a number of its own"
    return Slot(name=name, group=group, link=ours, keeper=started, keeper_fd=os.pidfd_open(pid))


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
