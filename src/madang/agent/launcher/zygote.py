"""A process that sleeps, and forks keepers and guards when the launcher asks.

A fork shares memory with its parent until one of the two writes to it, which the launcher does all
the time: of its own forks each would soon hold alone whatever was written between two of them.

::

    launcher ──┬── zygote
               └── keepers and guards, forked by the zygote as its siblings
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
from dataclasses import asdict
from typing import Final, NoReturn

from madang.agent.launcher import channel, guard, keeper, nest, syscalls
from madang.agent.launcher.cgroups import Hierarchies
from madang.agent.launcher.order import Berth, Order, View
from madang.agent.launcher.warmed import close_gaps

_ANSWER_S: Final = 10.0
"""Who has not forked by then is given up."""


class ZygoteLost(OSError):
    """It was killed after it was asked, or hangs; it may have forked. The next one answers."""


class Zygote:
    """The launcher's side. The process is started when it is first asked, and when it was lost."""

    def __init__(self, folder: str, hierarchies: Hierarchies, uid: int, gid: int) -> None:
        """What its keepers are told: see ``keeper.run``."""
        self._folder = folder
        self._hierarchies = hierarchies
        self._owner = (uid, gid)
        self._link: socket.socket | None = None
        self._pid = 0

    def fork_keeper(self, slot: str, launcher: socket.socket, berth: Berth | None = None) -> int:
        """The pid of a keeper, our child. Raises OSError if it can't be had, ZygoteLost among them.

        *slot* names its group, *launcher* is its end of a channel to us; *berth*: see
        ``keeper.run``.
        """
        if berth is None:
            return self._fork({"slot": slot}, [launcher.fileno()])
        message = {"slot": slot, "view": asdict(berth.view), "hurry": berth.hurry}
        return self._fork(message, [launcher.fileno(), berth.user, berth.pids])

    def fork_guard(self, launcher: socket.socket) -> int:
        """The same of a guard."""
        return self._fork({"guard": True}, [launcher.fileno()])

    def fork_nest(self, launcher: socket.socket, interpreter: socket.socket, order: int) -> int:
        """The same, of a process that makes a nest and leaves; see ``nest.run``.

        *order* is a descriptor of its order.
        """
        return self._fork({"nest": True}, [launcher.fileno(), interpreter.fileno(), order])

    def _fork(self, message: channel.Message, fds: list[int]) -> int:
        answer = self._ask(message, fds)
        if answer is None:
            self._end()
            raise ZygoteLost(errno.ECHILD, "what forks keepers was killed, or hangs")
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return int(answer["pid"])

    def _ask(self, message: channel.Message, fds: list[int]) -> channel.Message | None:
        """None: it was lost after it was asked, and may have forked."""
        if self._link is None or not channel.send(self._link, message, fds):
            self._end()
            self._link = self._start()
            channel.send(self._link, message, fds)
        try:
            return channel.receive(self._link)[0]
        except TimeoutError:
            return None

    def _start(self) -> socket.socket:
        ours, theirs = channel.pair()
        with theirs:
            try:
                self._pid = os.fork()
            except OSError:
                ours.close()
                raise
            if self._pid == 0:
                self._serve(theirs)
        ours.settimeout(_ANSWER_S)
        return ours

    def _end(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
            os.kill(self._pid, signal.SIGKILL)  # Our child that was not waited for: its own number.
            os.waitpid(self._pid, 0)

    # -- the other side ----------------------------------------------------------------------

    def _serve(self, link: socket.socket) -> NoReturn:
        try:
            syscalls.close_all_but(link.fileno())
            syscalls.set_process_name("madang-zygote")
            syscalls.die_with_parent(signal.SIGKILL)
            gc.disable()
            close_gaps()
            while self._obey(link):
                pass
        finally:
            os._exit(0)

    def _obey(self, link: socket.socket) -> bool:
        """One request; False once the launcher has left."""
        message, fds = channel.receive(link)
        if message is None:
            return False
        try:
            pid = syscalls.fork_sibling()
            answer = {"pid": pid}
        except OSError as exc:
            pid, answer = -1, {"errno": exc.errno or errno.EAGAIN}
        if pid == 0:
            try:
                self._become(message, fds)
            finally:
                os._exit(1)
        for fd in fds:
            os.close(fd)
        return channel.send(link, answer)

    def _become(self, message: channel.Message, fds: list[int]) -> NoReturn:
        syscalls.close_all_but(*fds)
        launcher, *others = fds
        link = channel.adopt(launcher)
        if "guard" in message:
            guard.run(link)
        if "nest" in message:
            interpreter, memory = others
            order = Order.from_json(channel.from_memory(memory))
            nest.run(link, socket.socket(fileno=interpreter), self._folder, order)
        group = self._hierarchies.group(message["slot"])
        berth = None
        if others:
            user, pids = others
            berth = Berth(user, pids, View(**message["view"]), hurry=message["hurry"])
        keeper.run(link, self._folder, group, *self._owner, berth)
