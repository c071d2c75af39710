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
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Final, NoReturn

from madang.agent.launcher import box, helpers, mounts, syscalls
from madang.agent.launcher.engine import Engine, EngineFailed
from madang.agent.launcher.helpers import Done, Helpers
from madang.agent.launcher.order import Order
from madang.agent.launcher.processes import say
from madang.wire.errors import PlatformError, RuntimeFailed

_STATUS_BYTES: Final = 8192
_MOST_LISTED: Final = 400
"""At once: what a helper says is bounded."""


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

    def open(self, slots: Callable[[], Collection[str]]) -> None:
        """Remove those of sessions that are gone, whoever was killed meanwhile.

        *slots*: of the sessions that there are. They are asked for only when the engine has told
        of its boxes, so that none of a session that starts meanwhile is taken for one that is left.
        """
        shutil.rmtree(self._doors, ignore_errors=True)
        os.makedirs(self._doors, 0o711, exist_ok=True)
        if (engine := self._engine) is None:
            return

        def listed(result: Any) -> None:
            if isinstance(result, PlatformError):
                say(f"launcher: boxes of old sessions may be left: {result.text}")
                return
            kept = {self.name(slot) for slot in slots()}
            if left := [found for found, name in result.items() if name not in kept]:
                self._helpers.run(partial(_remove, engine, left), lambda _: None)

        self._helpers.run(partial(_list, engine, self._mark), listed)

    def forget(self, order: Order) -> None:
        """A start came to nothing."""
        if order.box:
            work = partial(_remove, order.runtime_program, [order.box])
            self._helpers.run(work, lambda _: None)

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
        syscalls.move_mount(tree, root)
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


def _list(engine: str, mark: str) -> dict[str, str]:
    """Id → name of this launcher's boxes. In a helper."""
    try:
        found = Engine(engine).containers(f"{box.LABEL}={mark}")
    except EngineFailed as exc:
        raise RuntimeFailed(exc.text) from exc
    return {each["Id"]: str(each["Labels"].get(box.NAME)) for each in found[:_MOST_LISTED]}


def _remove(engine: str, names: Collection[str]) -> None:
    """In a helper."""
    for name in names:
        try:
            Engine(engine).remove(name)
        except EngineFailed as exc:
            say(f"launcher: {name} may be left: {exc}")
