"""Nests: where interpreters that have everything imported live, and the slots forked from them.

An image's code runs in its interpreter, and a fork of it has to enter a slot's namespaces, which
takes capabilities over them. So a nest has a user namespace of its own, with a block of uids that
nobody else has, and every slot's namespaces belong to it; on the machine outside it is nobody::

    launcher ── zygote ──> holder: process 1 of the nest's PID namespace, nothing else
                              │  └── interpreter: the image's python, in a sandbox like a session's
                              │           └── fork, enters the slot ─────────────────┐
                              └ (PID namespaces below)                                v
                           keeper ── (a process that leaves) ── init of a slot ── the program

The kernel lets a process enter PID namespaces only below its own, hence the holder. It outlives the
interpreter and the launcher for as long as a session lives in the nest.

The interpreter keeps four capabilities over its own nest. Its system call filter is the sessions'
own, with one call more, ``setns``; each fork gives the capabilities up and gets the whole filter
before a program of the session runs.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import selectors
import signal
import socket
import time
from base64 import b64decode
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final, NoReturn

from madang.agent.launcher import channel, init, mounts, processes, syscalls
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.order import Order
from madang.agent.launcher.processes import say
from madang.agent.launcher.scratch import FOLDERS

INTERPRETERS: Final = (b"python3", b"python")
OWN_UIDS: Final = 2
"""Of a block: the nest's root, and its interpreter."""
_KEPT: Final = {"SETGID": 6, "SETUID": 7, "SETPCAP": 8, "SYS_CHROOT": 18, "SYS_ADMIN": 21}
"""Capabilities of an interpreter, over its nest alone."""
_KILL: Final = 5
_LOOK_S: Final = 1.0
"""A holder that nobody wants any more looks so often whether it is alone."""
_LINK_FD: Final = 3


@cache
def source() -> str:
    """The text that interpreters run; read while its file can be seen."""
    return Path(__file__).with_name("warmed.py").read_text(encoding="ascii")


# -- the holder ------------------------------------------------------------------------------------


def run(launcher: socket.socket, interpreter: socket.socket, folder: str, order: Order) -> NoReturn:
    """Life of a nest, from the zygote's fork on: root of the machine makes it, then leaves.

    *launcher* is told the holder's pid; its end ends the nest. *interpreter* is the other end of
    what the interpreter talks to. Paths of the order are relative to *folder*; its uid is the
    interpreter's, the first of the block is the one before.
    """
    try:
        gc.disable()
        source()
        os.setsid()
        os.chdir(folder)
        order.group.join()
        ours, theirs = channel.pair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _found(theirs, launcher, interpreter, order)
        theirs.close()
        if channel.receive(ours)[0] is not None:
            _map(pid, order.uid - 1, order.nest_uids)
            channel.send(ours, {})
        os.waitpid(pid, 0)
    except BaseException as exc:
        say(f"madang nest: {exc!r}")
    finally:
        os._exit(0)


def _map(pid: int, first: int, count: int) -> None:
    """Inside, the nest's root is 0, and sessions have the numbers that they have outside."""
    text = f"0 {first} 1\n{first + 1} {first + 1} {count - 1}\n".encode()
    for name in ("uid_map", "gid_map"):
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, text)
        os.close(fd)


def _found(
    mapper: socket.socket, launcher: socket.socket, interpreter: socket.socket, order: Order
) -> NoReturn:
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        channel.send(mapper, {"unshared": True})
        if channel.receive(mapper)[0] is None:
            os._exit(1)
        become_root()
        syscalls.unshare(syscalls.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            _hold(launcher, interpreter, order)
        channel.send(launcher, {"holder": pid})
    except BaseException as exc:
        channel.send(launcher, {"failed": f"a nest can't be made: {exc}"})
    finally:
        os._exit(0)


def become_root() -> None:
    """The nest's, in whose user namespace we are."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _hold(launcher: socket.socket, interpreter: socket.socket, order: Order) -> NoReturn:
    try:
        for number in init.CHANGED_SIGNALS:
            syscalls.handle(number, syscalls.DEFAULT)
        syscalls.close_all_but(launcher.fileno(), interpreter.fileno())
        pid = os.fork()
        if pid == 0:
            _become_interpreter(launcher, interpreter, order)
        interpreter.close()
        syscalls.set_process_name("madang-nest")
        syscalls.keep_capabilities((_KILL,))
        syscalls.no_new_privileges()
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        _wait(launcher, pid)
    except BaseException as exc:
        say(f"madang nest: {exc!r}")
    finally:
        os._exit(0)


def _wait(launcher: socket.socket, interpreter: int) -> None:
    """Until nobody wants the nest any more and the last session in it has ended."""
    with selectors.DefaultSelector() as selector:
        selector.register(launcher, selectors.EVENT_READ)
        while not selector.select(_LOOK_S * 5):
            _reap()
    with contextlib.suppress(ProcessLookupError):
        os.kill(interpreter, signal.SIGKILL)
    while not _alone():
        time.sleep(_LOOK_S)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _alone() -> bool:
    _reap()
    try:
        os.kill(-1, 0)
    except OSError as exc:
        return exc.errno == errno.ESRCH
    return False


# -- the interpreter -------------------------------------------------------------------------------


def _become_interpreter(
    launcher: socket.socket, interpreter: socket.socket, order: Order
) -> NoReturn:
    try:
        launcher.close()
        os.dup2(interpreter.fileno(), _LINK_FD)
        syscalls.close_all_but(_LINK_FD)
        syscalls.die_with_parent(signal.SIGKILL)
        _execute(order, source().encode())
    except BaseException as exc:
        with contextlib.suppress(OSError):
            os.write(_LINK_FD, f"F{exc}".encode()[:500])
    finally:
        os._exit(1)


def _execute(order: Order, text: bytes) -> None:
    """In a sandbox like those of its sessions, which it must find the same files in."""
    assert order.view is not None
    syscalls.unshare(init.NAMESPACES | syscalls.CLONE_NEWNS)
    syscalls.loopback_up()
    uid = order.uid
    _make_scratch(order, uid)
    mounts.enter(order, order.view)
    init.limit_resources()
    os.umask(0o022)
    environment = init.environment(order, order.spec)
    found = [path for name in INTERPRETERS for path in init.candidates(name, environment)]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "the image has no python")
    said = os.memfd_create("said")
    nothing = os.open("/dev/null", os.O_RDONLY)
    for target, fd in enumerate((nothing, said, said)):
        os.dup2(fd, target)
    syscalls.close_all_but(_LINK_FD)
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
    syscalls.drop_bounding_set(kept=_KEPT.values())
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    syscalls.keep_capabilities(_KEPT.values(), ambient=True)
    syscalls.die_with_parent(signal.SIGKILL)
    syscalls.no_new_privileges()
    name = os.path.basename(found[0])
    argv = [name, b"-c", text, b"%d" % _LINK_FD, *_modules(order)]
    syscalls.install_filter(b64decode(order.program))
    os.execve(found[0], argv, environment)


def _modules(order: Order) -> list[bytes]:
    return [name.encode() for name in order.spec.image.warm]


def _make_scratch(order: Order, uid: int) -> None:
    """A small disk in memory, only for us to see."""
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount(b"tmpfs", os.fsencode(order.scratch), b"tmpfs", flags, b"mode=755,size=16m")
    for name, mode in FOLDERS.items():
        folder = f"{order.scratch}/{name}"
        os.mkdir(folder)
        os.chmod(folder, mode)
        os.chown(folder, uid, uid)


# -- slots of a nest -------------------------------------------------------------------------------


def fork_init(
    namespaces: tuple[int, int], group: Group, begin: Callable[[list[int]], NoReturn]
) -> int:
    """A child in the nest whose user and PID namespaces are given; its pid, as we see it.

    It is process 1 of a PID namespace below the nest's, root of the nest, and in *group*; *begin*
    gets descriptors by which it can let others join.
    """
    user, pids = namespaces
    syscalls.setns(pids, syscalls.CLONE_NEWPID)
    middle = os.fork()
    if middle == 0:
        try:
            group.join()
            joins = [
                os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
                for folder in group.folders
            ]
            syscalls.setns(user, syscalls.CLONE_NEWUSER)
            become_root()
            if syscalls.fork_sibling(syscalls.CLONE_NEWPID) == 0:
                begin(joins)
        except BaseException as exc:
            say(f"madang keeper: {exc!r}")
        finally:
            os._exit(0)
    os.waitpid(middle, 0)
    found = processes.children(os.getpid())
    if not found:
        raise OSError(errno.ECHILD, "no init can be had in the nest")
    return found[0]
