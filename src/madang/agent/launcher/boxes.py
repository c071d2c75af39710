"""The boxes of sessions that Docker starts; the launcher's side. See ``box``.

Before anything of a session runs in its box, the box is *admitted*: moved into the session's group
and given the session's root. Who asks for that is a keeper, which is the server's equal: of the
process that it names we believe what the kernel says, that it has the session's own uid.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Collection
from functools import partial
from typing import Any, Final, NoReturn

from madang.agent.launcher import box, helpers, mounts, syscalls
from madang.agent.launcher.engine import Engine, EngineFailed
from madang.agent.launcher.helpers import Done, Helpers
from madang.agent.launcher.order import Order
from madang.agent.launcher.processes import say
from madang.wire.errors import PlatformError, RuntimeFailed

_STATUS_BYTES: Final = 8192


class Boxes:
    """Of one launcher."""

    def __init__(self, state: str, mark: str, helpers: Helpers, engine: str | None) -> None:
        """*engine*: its socket; None: there are no boxes here."""
        self._kernels = f"{state}/kernels"
        self._doors = f"{state}/mounts/{box.FOLDER}"
        self._mark = mark
        self._helpers = helpers
        self._engine = engine

    def name(self, slot: str) -> str:
        return f"madang-{self._mark}-{slot}"

    def sweep(self, slots: Collection[str]) -> None:
        """Remove those of sessions that are gone, whoever was killed meanwhile."""
        if self._engine is not None:
            kept = {self.name(slot) for slot in slots}
            work = partial(_sweep, self._engine, self._mark, kept, self._doors)
            self._helpers.run(work, lambda _: None)

    def forget(self, order: Order) -> None:
        """A start came to nothing."""
        if order.box:
            self._helpers.run(partial(_remove, order), lambda _: None)

    def admit(self, order: Order, guest: int, told: int, done: Done) -> Word:
        """*guest*: a pidfd of the box's only process. *told*: where its init waits for our word."""

        def admitted(result: Any) -> None:
            os.close(guest)
            done(result)

        work = partial(_admit, guest, order, self._kernels)
        self._helpers.run(work, admitted, kept=(guest,))
        return Word(told)


class Word:
    """Our word that a box has all that it needs; given or withdrawn, once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def give(self) -> None:
        # Non-blocking, and no error: a descriptor from a keeper may be anything.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as link:
            link.send(b"\0", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        self.withdraw()

    def withdraw(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _admit(guest: int, order: Order, kernels: str) -> None:
    """In a helper. *kernels*: folder to which paths of orders are relative."""
    pid = _pid_of(guest)
    if pid < 1 or _uids_of(pid) != {order.uid}:
        raise RuntimeFailed("docker: what came out of its box is not the session's.")
    order.group.join(pid)
    os.chdir(kernels)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    syscalls.setns(guest, syscalls.CLONE_NEWPID)  # For children; ``proc`` shows theirs.
    child = os.fork()
    if child == 0:
        _furnish(guest, order, writer)
    os.close(writer)
    os.waitpid(child, 0)
    result = helpers.result(reader)
    if isinstance(result, PlatformError):
        raise result


def _furnish(guest: int, order: Order, writer: int) -> NoReturn:
    def work() -> None:
        assert order.view is not None
        syscalls.unshare(syscalls.CLONE_NEWNS)
        tree = syscalls.open_tree(mounts.assemble(order, order.view))
        syscalls.setns(guest, syscalls.CLONE_NEWNS)
        root = box.NEW_ROOT.encode()
        syscalls.attach_tree(tree, root)
        mounts.move_into(root)  # The guest's root is the old one: it moves with us.

    try:
        helpers.tell(writer, work)
    finally:
        os._exit(0)


def _pid_of(pidfd: int) -> int:
    """In our own PID namespace; 0 or less for what is no process or has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        found = dict(line.split(":\t", 1) for line in file if ":\t" in line)
    return int(found.get("Pid", "0"))


def _uids_of(pid: int) -> set[int]:
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return set()
    with open(fd, encoding="ascii", errors="replace") as file:
        line = next(line for line in file.read(_STATUS_BYTES).splitlines() if line[:4] == "Uid:")
    return set(map(int, line.split()[1:]))


def _remove(order: Order) -> None:
    """In a helper."""
    try:
        Engine(order.runtime_program).remove(order.box)
    except EngineFailed as exc:
        say(f"launcher: {order.box} may be left: {exc}")


def _sweep(engine: str, mark: str, kept: Collection[str], doors: str) -> None:
    """In a helper."""
    shutil.rmtree(doors, ignore_errors=True)
    os.mkdir(doors, 0o711)
    client = Engine(engine)
    try:
        for found in client.containers(f"{box.LABEL}={mark}"):
            if not {name.lstrip("/") for name in found["Names"]} & set(kept):
                client.remove(found["Id"])
    except EngineFailed as exc:
        say(f"launcher: boxes of old sessions may be left: {exc}")
