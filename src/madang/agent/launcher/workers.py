"""Slow work that every session needs, in processes that stay: a fork for each costs more than it.

A worker is a fork of the launcher, so it knows what the launcher knew then: works are functions
whose state lies in the file system, named here, with arguments that fit JSON. Each worker does one
thing at a time; where all are busy another is forked, up to a number, and then work waits. Doing a
work again must change nothing: it is repeated, once, where its worker was killed.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from madang.agent.launcher import channel
from madang.agent.launcher.helpers import Done, begin, outcome
from madang.wire.errors import RuntimeFailed, from_problem

MOST: Final = 8
"""At once."""
KEPT: Final = 1
"""Of those that have nothing to do."""

Works = Mapping[str, Callable[..., Any]]


@dataclass(slots=True)
class _Task:
    message: channel.Message
    done: Done
    repeated: bool = False
    """The worker that had it first was killed."""


class Workers:
    """Hands works out, and hears how they end. Workers end with the launcher."""

    def __init__(self, works: Works, selector: selectors.BaseSelector) -> None:
        self._works = works
        self._selector = selector
        self._idle: list[tuple[int, socket.socket]] = []
        self._busy = 0
        self._waiting: deque[_Task] = deque()

    def run(self, work: str, *arguments: Any, done: Done) -> None:
        """*done* is called with the result, or with the PlatformError that it ended with."""
        self._waiting.append(_Task({"work": work, "arguments": arguments}, done))
        if self._busy < MOST:
            self._begin()

    def _begin(self) -> None:
        task = self._waiting.popleft()
        try:
            pid, link = self._idle.pop() if self._idle else self._fork()
        except OSError as exc:
            task.done(RuntimeFailed(f"no process can be had for a helper: {exc.strerror}."))
            return
        channel.send(link, task.message)
        self._busy += 1
        self._selector.register(link, selectors.EVENT_READ, partial(self._hear, pid, link, task))

    def _hear(self, pid: int, link: socket.socket, task: _Task, _events: int) -> None:
        answer, _ = channel.receive(link)
        self._selector.unregister(link)
        self._busy -= 1
        if answer is None or len(self._idle) >= KEPT:
            self._bury(pid, link)
        else:
            self._idle.append((pid, link))
        again = answer is None and not task.repeated
        if again:
            task.repeated = True
            self._waiting.appendleft(task)
        if self._waiting:
            self._begin()
        if not again:
            task.done(_opened(answer))

    def _fork(self) -> tuple[int, socket.socket]:
        ours, theirs = channel.pair()
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                _serve(theirs, self._works)
        return pid, ours

    def _bury(self, pid: int, link: socket.socket) -> None:
        """It leaves when it hears nothing more, or has left."""
        link.close()
        fd = os.pidfd_open(pid)

        def left(_events: int) -> None:
            self._selector.unregister(fd)
            os.close(fd)
            os.waitpid(pid, 0)

        self._selector.register(fd, selectors.EVENT_READ, left)


def _opened(answer: channel.Message | None) -> Any:
    if answer is None:
        return RuntimeFailed("a helper of the launcher was killed.")
    if "error" in answer:
        return from_problem(answer["error"], answer["text"], {})
    return answer["ok"]


def _serve(link: socket.socket, works: Works) -> NoReturn:
    try:
        begin("madang-helper", link.fileno())
        while (message := channel.receive(link)[0]) is not None:
            channel.send(link, outcome(partial(works[message["work"]], *message["arguments"])))
    finally:
        os._exit(0)
