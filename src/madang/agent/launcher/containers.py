"""Programs started by an OCI runtime (crun, runc) instead of by the init itself.

The session is the same: its namespaces, group, root and mounts are made by the init as always, and
each program of it, main or exec, becomes a container of its own in them, like those of a pod. The
runtime is executed for each start and has left when the program runs; nobody asks it for anything
later: the program is the init's child, signalled, waited for and killed as any other.

The runtime works in a root of its own, where there is nothing of the machine but what sessions may
read anyway::

    /            the machine's own system, read-only; the runtime itself is in its /usr
    /mnt         memory: bundle and state of a start, deleted after it
    /srv         the session's root, with all that is mounted on it
    /sys/fs/cgroup   version 2, read-only: the session's limits are not the runtime's business

It needs root, so the init stays root, with the few capabilities that making a container takes. A
session can't reach it: it has another uid, no capabilities, and never shares the runtime's mounts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final

from madang.agent.launcher import mounts, oci, syscalls
from madang.agent.launcher.order import Order, View
from madang.wire.kernel import DEFAULT_PATH, ExecSpec, KernelSpec

START_S: Final = 20.0
"""A runtime that takes longer to start a program is killed."""
WORK: Final = "/mnt"
_WORK_OPTIONS: Final = b"mode=700,size=16m"
_LOG_BYTES: Final = 64 * 1024
ENVIRONMENT: Final = {b"PATH": b"/usr/sbin:/usr/bin:/sbin:/bin"}

_CHOWN, _DAC_OVERRIDE, _FOWNER, _KILL, _SETGID, _SETUID = 0, 1, 3, 5, 6, 7
_SETPCAP, _SYS_CHROOT, _SYS_ADMIN = 8, 18, 21
KEPT: Final = frozenset({
    _CHOWN, _DAC_OVERRIDE, _FOWNER, _KILL, _SETGID, _SETUID, _SETPCAP, _SYS_CHROOT, _SYS_ADMIN,
})  # fmt: skip
"""Capabilities of the init and the runtime: to mount, to change the user, to drop the rest."""

ARGUMENTS: Final = {
    "crun": ("--cgroup-manager=disabled",),
    "runc": ("--rootless=true",),
}
"""What keeps each from control groups: runc then takes no for an answer."""

Connect = Callable[[list[int]], None]
"""Hands the keeper its ends of the program's pipes or terminal."""


class Refused(Exception):
    """The program can't be executed; an exit code as a shell's, and words."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def enter(order: Order, view: View) -> None:
    """Make both roots and move into the runtime's; we have a mount namespace of our own."""
    root, outer = mounts.assemble(order, view), os.fsencode(view.outer)
    quiet = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.bind(os.fsencode(view.host), outer, recursive=True)
    syscalls.mount(b"proc", outer + b"/proc", b"proc", quiet)
    syscalls.mount(b"tmpfs", outer + b"/sys", b"tmpfs", quiet, b"mode=755,size=64k")
    os.makedirs(outer + b"/sys/fs/cgroup")
    groups = outer + b"/sys/fs/cgroup"
    syscalls.mount(b"cgroup2", groups, b"cgroup2", quiet | syscalls.MS_RDONLY)
    syscalls.mount(b"tmpfs", outer + WORK.encode(), b"tmpfs", quiet, _WORK_OPTIONS)
    syscalls.bind(root, outer + oci.ROOT.encode(), recursive=True)
    mounts.move_into(outer)


def seal(kept: frozenset[int] = KEPT) -> None:
    """Give up what making containers does not take."""
    os.setgroups([])
    syscalls.drop_bounding_set(kept)
    syscalls.keep_capabilities(kept)
    syscalls.no_new_privileges()
    _shut()


def _shut() -> None:
    """Again after each change of the effective user, which undoes both."""
    syscalls.die_with_parent(signal.SIGKILL)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


class Containers:
    """The session's programs; used by its init."""

    makes_terminals: ClassVar = True
    """Whether the runtime does, and not the init."""

    def __init__(self, order: Order, base_filter: bytes) -> None:
        self._order = order
        self._base_filter = b64encode(base_filter).decode()
        self._root = os.open(oci.ROOT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._numbers = itertools.count()

    @contextmanager
    def as_user(self) -> Iterator[None]:
        """With the session's own rights to files."""
        uid = mounts.shown_uid(self._order)
        os.setegid(uid)
        os.seteuid(uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            _shut()

    def start(
        self,
        spec: KernelSpec | ExecSpec,
        argv: list[bytes],
        environment: dict[bytes, bytes],
        inner: list[int],
        connect: Connect,
    ) -> int:
        """Start the program on the descriptors *inner* (none for a terminal); its pid.

        Raises Refused, OSError.
        """
        with self.as_user():
            self._check(spec.cwd, argv[0], environment)
        name = f"{next(self._numbers)}"
        folder = f"{WORK}/{name}"
        os.mkdir(folder, 0o700)
        try:
            config = oci.configuration(
                self._order,
                spec,
                *texts(argv, environment),
                devices=self._devices(console=spec.tty),
                base_filter=self._base_filter,
            )
            with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
                json.dump(config, file)
            return self._run(folder, name, spec, inner, connect)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _devices(self, *, console: bool) -> str:
        """The folder that becomes ``/dev``: the session's, or for a terminal its double.

        It has a file ``console``, which runtimes open for writing and mount the terminal on.
        """
        theirs, double = f"{oci.ROOT}/dev", f"{WORK}/dev"
        if not console:
            return theirs
        if not os.path.exists(double):
            os.mkdir(double)
            flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
            syscalls.mount(b"tmpfs", double.encode(), b"tmpfs", flags, b"mode=755,size=64k")
            mounts.touch(f"{double}/console".encode())
            for entry in os.scandir(theirs):
                _double(os.fsencode(entry.path), f"{double}/{entry.name}".encode())
        return double

    def _check(self, cwd: str, program: bytes, environment: dict[bytes, bytes]) -> bytes:
        """Say what a shell would say; what changes meanwhile the runtime refuses in its words.

        Where the program lies.
        """
        try:
            with self._opened(os.fsencode(cwd), os.O_DIRECTORY) as fd:
                if not _executable(fd):
                    raise PermissionError(13, os.strerror(13))
        except OSError as exc:
            text = f"can't enter the working directory {cwd[:200]}: {exc.strerror}"
            raise Refused(126, text) from exc
        shown = program[:200].decode(errors="replace")
        refused = Refused(127, f"no such program: {shown}")
        for path in _candidates(program, environment, os.fsencode(cwd)):
            try:
                with self._opened(path) as fd:
                    if _executable(fd) and not os.path.isdir(f"/proc/self/fd/{fd}"):
                        return path
                refused = Refused(126, f"can't execute {shown}: Permission denied")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as exc:
                refused = Refused(126, f"can't execute {shown}: {exc.strerror}")
        raise refused

    @contextmanager
    def _opened(self, path: bytes, flags: int = 0) -> Iterator[int]:
        """A path of the session; no link of /proc leads out of it."""
        fd = syscalls.open_in_root(self._root, path, os.O_PATH | flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _run(
        self,
        folder: str,
        name: str,
        spec: KernelSpec | ExecSpec,
        inner: list[int],
        connect: Connect,
    ) -> int:
        order = self._order
        argv = [
            *(order.runtime_program, *ARGUMENTS[order.runtime], "--root", f"{folder}/state"),
            *("--log", f"{folder}/log", "--log-format", "json"),
            *("run", "--detach", "--no-new-keyring", "--bundle", folder),
            *("--pid-file", f"{folder}/pid"),
        ]
        terminals: socket.socket | None = None
        if spec.tty:
            terminals = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            terminals.bind(f"{folder}/terminal")
            terminals.listen(1)
            argv += ["--console-socket", f"{folder}/terminal"]
        try:
            return self._execute([*argv, name], folder, inner, terminals, connect)
        finally:
            if terminals is not None:
                terminals.close()

    def _execute(
        self,
        argv: list[str],
        folder: str,
        inner: list[int],
        terminals: socket.socket | None,
        connect: Connect,
    ) -> int:
        actions: list[tuple[object, ...]] = [
            (os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(inner)
        ]
        runtime = os.posix_spawn(argv[0], argv, ENVIRONMENT, file_actions=actions)
        gone = os.pidfd_open(runtime)
        try:
            late = time.monotonic() + START_S
            if terminals is not None and readable(START_S, terminals.fileno(), gone):
                _pass_on(terminals, connect)
            if gone not in readable(late - time.monotonic(), gone):
                signal.pidfd_send_signal(gone, signal.SIGKILL)
                raise Refused(126, f"{self._order.runtime} took longer than {START_S:.0f} s")
        finally:
            os.close(gone)
            status = os.waitpid(runtime, 0)[1]
        if status:
            raise Refused(126, self._explain(folder, status))
        with open(f"{folder}/pid", encoding="ascii") as file:
            return int(file.read())

    def _explain(self, folder: str, status: int) -> str:
        """The runtime's own last words."""
        runtime = self._order.runtime
        with contextlib.suppress(OSError, ValueError):
            with open(f"{folder}/log", "rb") as file:
                lines = file.read(_LOG_BYTES).splitlines()
            words = [str(message["msg"]) for line in lines if (message := _parsed(line))]
            if words:
                return f"{runtime}: {words[-1][:500]}"
        return f"{runtime} ended with {os.waitstatus_to_exitcode(status)}"


def _double(source: bytes, target: bytes) -> None:
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        mounts.touch(target)
    syscalls.bind(source, target)


def _parsed(line: bytes) -> dict[str, Any] | None:
    found = json.loads(line)
    return found if isinstance(found, dict) and "msg" in found else None


def readable(wait_s: float, *fds: int) -> list[int]:
    """Which of them are, once one is."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(max(0.0, wait_s) * 1000)]


def _pass_on(terminals: socket.socket, connect: Connect) -> None:
    """The terminal's other side, from the runtime to the keeper."""
    terminals.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        link, _ = terminals.accept()
        with link:
            link.settimeout(START_S)
            _data, fds, _flags, _peer = socket.recv_fds(link, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if fds:
                connect(fds)
        finally:
            for fd in fds:
                os.close(fd)


def texts(argv: list[bytes], environment: dict[bytes, bytes]) -> tuple[list[str], dict[str, str]]:
    try:
        return (
            [argument.decode() for argument in argv],
            {name.decode(): value.decode() for name, value in environment.items()},
        )
    except UnicodeDecodeError as exc:
        text = "arguments and variables must be UTF-8 in this runtime; `--runtime native` takes all"
        raise Refused(126, text) from exc


def _candidates(program: bytes, environment: dict[bytes, bytes], cwd: bytes) -> list[bytes]:
    """Where the program may lie, as ``execvp`` looks for it."""
    if not program:
        return []
    if b"/" in program:
        return [os.path.join(cwd, program)]
    folders = environment.get(b"PATH", DEFAULT_PATH.encode()).split(b":")
    return [os.path.join(cwd, folder, program) for folder in folders]


def _executable(fd: int) -> bool:
    return os.access(f"/proc/self/fd/{fd}", os.X_OK, effective_ids=True)
