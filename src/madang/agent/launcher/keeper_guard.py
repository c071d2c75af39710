"""The keeper's part in keeping a policy: it holds what must not be closed, and sees a guard's end.

Messages of the guard: ``set`` (with descriptors to hold), ``failed``, ``dismissed``, ``pong``,
``refused`` and, the last one, ``finished``.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from madang.agent.launcher import channel
from madang.agent.launcher.refusals import Book

SILENCE_S: Final = 30.0
"""A guard that is asked and does not answer for so long is lost."""
_ASK_S: Final = 10.0
_FINISH_S: Final = 5.0
"""An ended session waits so long for its guard's last words."""
LOST: Final = "its guard was lost: stopped, because its sandbox policy could not be kept"


class Ward:
    """One session's guard, seen from its keeper."""

    def __init__(
        self,
        link: socket.socket,
        folder: str,
        *,
        begin: Callable[[], None],
        fail: Callable[[str], None],
        news: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*folder*: where refusals are written. Called are

        *begin* once the rules are in force, *fail* in words if they can't be, *news* with a number
        that grows when something was refused.
        """
        link.setblocking(False)
        self._link = link
        self._book = Book(folder)
        self._begin = begin
        self._fail = fail
        self._news = news
        self._held: list[int] = []
        self._clock = clock
        self._ask_at = clock() + _ASK_S
        self._unanswered_since: float | None = None
        self._finished = False
        self.dismissed = False
        """It came late and could not keep the rules: the session goes on as it was."""
        self.lost = False

    def fileno(self) -> int:
        return self._link.fileno()

    @property
    def refusals(self) -> int:
        """As told to *news*; 0: none."""
        return self._book.changes

    def set(self, listener: list[int]) -> None:
        """The init waits, and these are what its filter is listened to with."""
        self._send({"set": True}, listener)
        for fd in listener:
            os.close(fd)

    def hear(self) -> None:
        """Take in what the guard has told, or that it is gone."""
        while not self.lost:
            try:
                message, fds = channel.receive(self._link)
            except BlockingIOError:
                return
            self._held += fds
            self._unanswered_since = None
            if message is None:
                self.lost = True
            elif "set" in message:
                self._begin()
            elif "failed" in message:
                self._fail(str(message["failed"])[:1000])
            elif "dismissed" in message:
                self.dismissed = True
                return
            elif "finished" in message:
                self._finished = True
            elif "refused" in message:
                self._book.write(message["refused"])
                self._news(self._book.changes)

    def finish(self) -> None:
        """The session is over: hear what was not told yet."""
        deadline = time.monotonic() + _FINISH_S
        self._send({"finish": True})
        while not (self.lost or self._finished):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._link], [], [], left)[0]:
                return
            self.hear()

    def keep_time(self) -> None:
        """Ask whether it is there."""
        now = self._clock()
        if now < self._ask_at:
            return
        self._ask_at = now + _ASK_S
        if self._unanswered_since is None:
            self._unanswered_since = now
        elif now - self._unanswered_since >= SILENCE_S:
            self.lost = True
        self._send({"ping": True})

    def close(self) -> None:
        self._link.close()

    def wait_s(self) -> float:
        return max(0.0, self._ask_at - self._clock())

    def _send(self, message: channel.Message, fds: list[int] | None = None) -> None:
        try:
            self.lost |= not channel.send(self._link, message, fds or [])
        except BlockingIOError:
            pass  # It does not read: its silence tells.
