"""A fork of a warm interpreter that waits in a slot to become its program. The init's side.

The other side is ``warmed``, in the hands of whoever made the image: nothing that it says counts.
It can become the program in time, or it is killed and the program is started as always.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

from madang.agent.launcher import channel
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.mounts import Frame
from madang.agent.launcher.order import View

SEAT_S: Final = 5.0
"""Who has not come by then, or not become the program, is done without."""
_FORMAT: Final = 2
"""Of ``marshal``: one that every Python 3 reads."""


class Seat:
    """The init's side: a fork of the interpreter that waits in our slot to become its program."""

    def __init__(self, joins: list[int], view: View, *, hurry: bool = False) -> None:
        """*joins*: descriptors by which it can be put into our group. *view*: of its image.

        *hurry*: see ``Berth``.
        """
        self.hurry = hurry
        self._joins = joins
        self._view = view
        self.frame: Frame | None = None
        """The session's root, in which we are, as far as it can be made ahead."""
        self._link: socket.socket | None = None
        self._pid = 0
        self.missed = False
        """Who waited here was asked, and did not become the program."""

    def set_up(self, group: Group) -> None:
        """Move into a root made ahead, in a mount namespace of our own. Raises OSError."""
        self.frame = Frame(self._view, group)
        self.frame.enter()

    def offer(self, keeper: socket.socket) -> None:
        """Ask for it, by way of the keeper."""
        self._link, theirs = channel.pair()
        self._link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._link.settimeout(SEAT_S)
        namespaces = [_open_own(name) for name in ("pid", "net", "ipc", "uts", "cgroup", "mnt")]
        fds = [theirs.fileno(), *namespaces]
        channel.send(keeper, {"seat": True}, fds)
        theirs.close()
        for fd in namespaces:
            os.close(fd)

    def wait(self) -> bool:
        """Whether it came. It is believed nothing: the kernel tells who it is."""
        assert self._link is not None
        try:
            self._pid = _sender(self._link)
            for fd in self._joins:
                os.write(fd, b"%d" % self._pid)
        except (OSError, ValueError):
            self.give_up()
        return self._link is not None

    @property
    def pid(self) -> int:
        """Who waits; 0: nobody."""
        return self._pid if self.taken else 0

    @property
    def descriptors(self) -> list[int]:
        """For ``resume`` elsewhere."""
        return [] if self._link is None else [self._link.fileno()]

    def resume(self, pid: int, descriptors: Sequence[int]) -> None:
        """The init's: go on with who waits, if somebody does, where its builder began."""
        for fd in self._joins:
            os.close(fd)
        if not pid:
            return
        self._link, self._pid = channel.adopt(descriptors[0]), pid
        self._link.settimeout(SEAT_S)
        try:  # Only a child of ours, so that we see it end; nobody else can be waited for.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self.missed = True
            self.give_up()

    @property
    def taken(self) -> bool:
        return self._link is not None

    def become(self, job: dict[str, Any], streams: list[int]) -> int | None:
        """The pid of the program; None: it must be started in another way."""
        if self._link is None:
            return None
        memory = channel.memory_of(marshal.dumps(job, _FORMAT))
        try:
            channel.send_bytes(self._link, b"go", [*streams, memory])
            if self._link.recv(16) == b"on":
                self._link.close()
                self._link = None
                return self._pid
        except OSError:
            pass
        finally:
            os.close(memory)
        self.missed = True
        self.give_up()
        return None

    def give_up(self) -> None:
        """It is not wanted: nothing of it may go on."""
        if self._pid > 1:
            with contextlib.suppress(OSError):
                os.kill(self._pid, signal.SIGKILL)
        if self._link is not None:
            self._link.close()
            self._link = None


def _open_own(name: str) -> int:
    return os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)


def _sender(link: socket.socket) -> int:
    """Who sent the next message, as the kernel says. Raises OSError, ValueError."""
    size = struct.calcsize("3i")
    _, found, _, _ = link.recvmsg(16, socket.CMSG_SPACE(size))
    for level, kind, data in found:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid: int = struct.unpack("3i", data)[0]
            if pid > 1:
                return pid
    raise ValueError("nobody of this slot")
