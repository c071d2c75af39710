"""The launcher's side of guards: it forks them, brings them new rules, and notices their end."""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Final

from madang.agent.launcher import channel, guard, init, program
from madang.agent.launcher.guard import Post
from madang.agent.launcher.processes import ProcessId, kill
from madang.agent.launcher.slots import Slots
from madang.agent.launcher.timers import Timers
from madang.wire.errors import PlatformError, RuntimeFailed, from_problem
from madang.wire.policy import Sandbox

Answer = Callable[[Any], None]
Left = Callable[[ProcessId], None]

ANSWER_S: Final = 10.0
"""A guard that needs longer has given no answer; its keeper decides whether it is lost."""


class Guards:
    def __init__(self, slots: Slots, selector: selectors.BaseSelector, timers: Timers) -> None:
        self._slots = slots
        self._selector = selector
        self._timers = timers

    def post(self, post: Post, keeper: socket.socket, left: Left) -> ProcessId:
        """A guard of a session that is about to start; *keeper*: its end of the channel to it.

        *left* is called with it once it has gone. Raises RuntimeFailed.
        """
        ours, guard_id = self._fork(post, keeper, left)
        ours.close()
        return guard_id

    def post_late(
        self, post: Post, io: str, left: Left, done: Callable[[ProcessId], None], answer: Answer
    ) -> None:
        """A guard of a session that runs without one; *done* once it keeps the rules.

        *io*: the kernel's folder of that name. Raises RuntimeFailed.
        """
        theirs, keepers = channel.pair()
        with theirs, keepers:
            ours, guard_id = self._fork(post, theirs, left)
            try:
                _introduce(keepers, f"{io}/{init.MAIN}", post.keeper)
            except (OSError, PlatformError) as exc:
                ours.close()
                raise RuntimeFailed(f"its keeper can't be reached: {exc}.") from exc

        def kept(result: Any) -> None:
            if not isinstance(result, PlatformError):
                done(guard_id)
            answer(result)

        self._await(ours, kept)

    def _fork(
        self, post: Post, keeper: socket.socket, left: Left
    ) -> tuple[socket.socket, ProcessId]:
        ours, theirs = channel.pair()
        with theirs:
            pid = self._slots.fork_guard(theirs)
        guard_id = ProcessId.of(pid)
        if guard_id is None:
            os.waitpid(pid, 0)
            ours.close()
            raise RuntimeFailed("its guard was killed as soon as it was there.")
        self.watch(guard_id, left, child=True)
        memory = channel.to_memory(post.to_json())
        channel.send(ours, {"post": True}, [memory, keeper.fileno()])
        os.close(memory)
        return ours, guard_id

    def watch(self, guard_id: ProcessId, left: Left, *, child: bool) -> None:
        """Call *left* once it has gone: at once, if it has."""
        pidfd = os.pidfd_open(guard_id.pid) if child else guard_id.open()
        if pidfd is None:
            left(guard_id)
            return

        def gone(_events: int) -> None:
            self._selector.unregister(pidfd)
            os.close(pidfd)
            if child:
                os.waitpid(guard_id.pid, 0)
            left(guard_id)

        self._selector.register(pidfd, selectors.EVENT_READ, gone)

    def replace(self, folder: str, sandbox: Sandbox, answer: Answer) -> None:
        """Bring other rules to the guard of the kernel in *folder*. Raises RuntimeFailed."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        memory = channel.to_memory(asdict(sandbox))
        try:
            here = os.open(f"{folder}/{guard.FOLDER}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                link.connect(f"/proc/self/fd/{here}/{guard.SOCKET}")
            finally:
                os.close(here)
            channel.send(link, {"replace": True}, [memory])
        except OSError as exc:
            link.close()
            raise RuntimeFailed(f"its guard can't be reached: {exc}.") from exc
        finally:
            os.close(memory)
        self._await(link, answer)

    def _await(self, link: socket.socket, answer: Answer) -> None:
        """Its one message, or that there is none."""
        link.setblocking(False)

        def over(result: Any) -> None:
            self._timers.cancel(timer)
            self._selector.unregister(link)
            link.close()
            answer(result)

        def hear(_events: int) -> None:
            message, fds = channel.receive(link)
            for fd in fds:
                os.close(fd)
            if message is None:
                over(RuntimeFailed("its guard was killed."))
            elif "ok" in message:
                over({"later": message["ok"]})
            else:
                over(from_problem(message["error"], message["text"], {}))

        late = RuntimeFailed(f"its guard did not answer within {ANSWER_S:.0f} s.")
        timer = self._timers.after(ANSWER_S, partial(over, late))
        self._selector.register(link, selectors.EVENT_READ, hear)


def _introduce(guard_end: socket.socket, folder: str, keeper: ProcessId) -> None:
    """Bring the keeper its end of a channel to a guard, by its socket.

    In its folder the server may have put another: only the keeper itself gets it.
    """
    here = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as link:
        try:
            link.connect(f"/proc/self/fd/{here}/{program.SOCKET}")
        finally:
            os.close(here)
        pid = struct.unpack("iII", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        if pid != keeper.pid or ProcessId.of(pid) != keeper:
            raise RuntimeFailed("somebody else listens on its socket")
        line = json.dumps({"op": "guard"}).encode() + b"\n"
        socket.send_fds(link, [line], [guard_end.fileno()], socket.MSG_NOSIGNAL)


def end(guard_id: ProcessId | None) -> None:
    """Of a kernel no process of which lives: a guard that has not left hangs."""
    pidfd = guard_id.open() if guard_id is not None else None
    if pidfd is not None:
        kill(pidfd)
        os.close(pidfd)
