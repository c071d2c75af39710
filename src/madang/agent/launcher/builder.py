"""The init of a warm slot does nearly nothing itself, so that it stays small.

A fork shares each page with its parent until it writes to it, and whatever Python runs writes: to
counts of references, all over. Most of what an init does, it does once, before there is a program.
Here a child of it does that, its *builder*, and takes the pages along when it leaves::

    keeper ── init ── builder   the root, the seat, the order
               │         └─ the program's words, the filter, the order itself ──> init
               └ (the builder has left) becomes the session's user; the fork its program

No program of the session runs before the builder has left, so all that they can ever see is an init
without privileges, as everywhere.
"""

from __future__ import annotations

import marshal
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from madang.agent.launcher import channel
from madang.agent.launcher.processes import say

_FORMAT: Final = 2
"""Of ``marshal``."""


@dataclass(frozen=True, slots=True)
class Built:
    """What the init of a slot gets from its builder, when the session is known."""

    value: dict[str, Any]
    order: int
    """A descriptor of the session's order, for later."""
    fds: Sequence[int]


class Builder:
    """The child's side: its last act is to hand over."""

    def __init__(self, init: socket.socket) -> None:
        self._init = init

    def hand_over(self, value: dict[str, Any], order: int, fds: Sequence[int] = ()) -> None:
        """*value* of simple types; *order* as in ``Built``."""
        memory = channel.memory_of(marshal.dumps(value, _FORMAT))
        channel.send_bytes(self._init, b"built", [memory, order, *fds])
        os.close(memory)


def build(work: Callable[[Builder], None], keeper: socket.socket) -> Built | None:
    """Have a child do *work*; None: it has told the *keeper* why not, or the keeper has left.

    When this returns the child has ended. Raises OSError.
    """
    ours, theirs = channel.pair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _build(work, Builder(theirs))
    theirs.close()
    said, fds = channel.receive_bytes(ours)
    ours.close()
    os.waitpid(pid, 0)
    if not said:
        return None
    memory, order, *others = fds
    value = marshal.loads(os.pread(memory, os.fstat(memory).st_size, 0))  # noqa: S302 (ours)
    os.close(memory)
    return Built(value, order, others)


def _build(work: Callable[[Builder], None], builder: Builder) -> NoReturn:
    try:
        work(builder)
    except BaseException as exc:
        say(f"madang init: {exc!r}")
    finally:
        os._exit(0)
