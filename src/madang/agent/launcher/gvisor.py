"""Programs on a kernel of the session's own: gVisor's, which runsc starts.

What system calls a session's programs make is answered by gVisor's kernel, an ordinary process
without rights. A hole in Linux that such calls would reach can't be reached from here.

One sandbox a session, from its first program on; each program, main or exec, is begun in it by a
``runsc exec``, which stays as long as the program does and stands for it: it is the init's child,
holds its terminal and ends with its code::

    init ── runsc exec …          one for each program; its pid is the program's for us
         ├─ runsc-sandbox         gVisor's kernel; below it, traced, the programs
         └─ runsc-gofer           opens the session's files for it, nothing else

Process 1 in there is ours (see ``guests``) and no program can signal it. The init tells it which
process groups to signal, at once, where a runtime's own command takes a tenth of a second and room
for a dozen threads. If the init dies so does it all: they are in its PID namespace.

gVisor can't put a filter on what is begun by ``exec``, so programs go through a gate.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
from base64 import b64decode
from typing import Any, Final

from madang.agent.launcher import containers, guests, oci, syscalls
from madang.agent.launcher.containers import Connect, Containers, Refused
from madang.agent.launcher.order import Order, View
from madang.wire.kernel import ExecSpec, KernelSpec

_DAC_READ_SEARCH, _FSETID = 2, 4
KEPT: Final = containers.KEPT | {_DAC_READ_SEARCH, _FSETID}
"""Capabilities of the init and runsc: its gofer has these two more."""
FLAGS: Final = (
    *("--platform=ptrace", "--network=none", "--ignore-cgroups", "--file-access=shared"),
    *("--overlay2=none", "--host-fifo=none"),
)
_BUILD_FLAGS: Final = ("--host-uds=open",)
"""For the registry proxy's socket; other sessions reach no socket of the machine's by name."""
_FOLDER: Final = "/mnt/session"
_NAME: Final = "session"
_NOTHING: Final = "/mnt/nothing"
_GATE: Final = "/madang/gate/gate"
_ONE: Final = "/madang/gate/one"
"""As programs see them: see ``guests``."""
_GATE_OPTIONS: Final = b"mode=755,size=128k"
_SHOWN_FILES: Final = ("/proc/cpuinfo", "/proc/meminfo", "/proc/stat")
"""Made true by ``truth``; gVisor's own would tell of the whole machine."""
_OWN_FOLDERS: Final = ("/tmp", "/var/tmp")
"""Said once more, or else gVisor has them in memory."""
_LOST: Final = 128
"""How a runsc ends that has lost its sandbox, among other things."""
_LOST_S: Final = 0.5


def enter(order: Order, view: View) -> None:
    """Like ``containers``; terminals are the init's, from the session's own."""
    containers.enter(order, view)
    syscalls.bind(f"{oci.ROOT}/dev/pts".encode(), b"/dev/pts")
    _hide(closed(f"{oci.ROOT}/etc"))


def _hide(paths: list[str]) -> None:
    """Put what is empty, and nobody's to read, in their place."""
    os.makedirs(_NOTHING)
    os.mkdir(f"{_NOTHING}/folder", 0)
    os.close(os.open(f"{_NOTHING}/file", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0))
    for path in paths:
        kind = "folder" if os.path.isdir(path) else "file"
        with contextlib.suppress(FileNotFoundError):  # The machine's own, which goes on living.
            syscalls.bind(f"{_NOTHING}/{kind}".encode(), os.fsencode(path))


def closed(folder: str) -> list[str]:
    """What is not everybody's to read below *folder*: password hashes, keys.

    The gofer is root and would open it for a gVisor that has been broken into.
    """
    found = []
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(path).st_mode
            needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
            if not stat.S_ISLNK(mode) and mode & needed != needed:
                found.append(path)
            elif stat.S_ISDIR(mode):
                found += closed(path)
    return found


class Gvisor(Containers):
    """The session's programs; used by its init."""

    makes_terminals = False

    def __init__(self, order: Order, base_filter: bytes) -> None:
        super().__init__(order, base_filter)
        self._gate = guests.gate(b64decode(order.program) if order.program else base_filter)
        self._pid: int | None = None
        """Of gVisor's kernel; None before the first program."""
        self._orders = -1
        self._groups: dict[int, int] = {}
        """Of each program: our pid → the process group in the sandbox."""

    def start(
        self,
        spec: KernelSpec | ExecSpec,
        argv: list[bytes],
        environment: dict[bytes, bytes],
        inner: list[int],
        connect: Connect,
    ) -> int:
        with self.as_user():
            program = self._check(spec.cwd, argv[0], environment)
        arguments, variables = containers.texts([program, *argv], environment)
        if self._pid is None:
            self._boot()
        name = f"{next(self._numbers)}"
        folder = f"{containers.WORK}/{name}"
        os.mkdir(folder, 0o700)
        try:
            process = oci.guest(self._order, spec, [_GATE, *arguments], variables)
            _write(f"{folder}/process.json", process)
            return self._begin(folder, spec, inner)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _begin(self, folder: str, spec: KernelSpec | ExecSpec, inner: list[int]) -> int:
        argv = [
            *self._command(folder),
            *("exec", "--process", f"{folder}/process.json"),
            *("--internal-pid-file", f"{folder}/pid", _NAME),
        ]
        os.mkfifo(f"{folder}/pid", 0o600)
        told = os.open(f"{folder}/pid", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            client = os.posix_spawn(
                argv[0],
                argv,
                containers.ENVIRONMENT,
                file_actions=_standard_files(spec, inner),
                setsid=True,
            )
            self._groups[client] = self._group(folder, client, told)
        finally:
            os.close(told)
        return client

    def _group(self, folder: str, client: int, told: int) -> int:
        """What the program is called in the sandbox. Raises Refused if it does not run."""
        gone = os.pidfd_open(client)
        try:
            ready = containers.readable(containers.START_S, told, gone)
            text = os.read(told, 32) if told in ready else b""
            if text:
                return int(text)
            if gone not in ready and not containers.readable(_LOST_S, gone):
                signal.pidfd_send_signal(gone, signal.SIGKILL)
            status = os.waitpid(client, 0)[1]
            raise Refused(126, self._explain(folder, status))
        finally:
            os.close(gone)

    def _boot(self) -> None:
        os.mkdir(_FOLDER, 0o700)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._place_guests()
            _write(f"{_FOLDER}/config.json", oci.gvisor(self._order, _ONE, _binds()))
            argv = [*self._command(_FOLDER), "run", "--detach", "--bundle", _FOLDER]
            argv += ["--pid-file", f"{_FOLDER}/pid", _NAME]
            inner = [reader, nothing, nothing]
            self._pid = self._execute(argv, _FOLDER, inner, None, lambda _: None)
            os.set_blocking(writer, False)
            self._orders = writer
        except BaseException:
            os.close(writer)
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # Whatever of it runs; no program does.
            shutil.rmtree(_FOLDER, ignore_errors=True)
            raise
        finally:
            os.close(reader)
            os.close(nothing)

    def _place_guests(self) -> None:
        folder = os.path.dirname(f"{oci.ROOT}{_GATE}")
        if os.path.exists(f"{oci.ROOT}{_GATE}"):
            return
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
        syscalls.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, _GATE_OPTIONS)
        for path, program in ((_ONE, guests.one()), (_GATE, self._gate)):
            with open(f"{oci.ROOT}{path}", "wb") as file:
                file.write(program)
            os.chmod(f"{oci.ROOT}{path}", 0o755)  # noqa: S103 - everybody's to execute
        syscalls.mount_setattr(folder.encode(), syscalls.MOUNT_ATTR_RDONLY)

    def _command(self, folder: str) -> tuple[str, ...]:
        log = ("--log", f"{folder}/log", "--log-format", "json")
        flags = (*FLAGS, *(_BUILD_FLAGS if self._order.spec.build else ()))
        return (self._order.runtime_program, *flags, "--root", f"{_FOLDER}/state", *log)

    # -- what the init asks for later ----------------------------------------------------------

    def signal(self, client: int, number: int) -> None:
        """To the program's process group."""
        if (group := self._groups.get(client)) is not None:
            self._order_kill(number, -group)

    def signal_all(self, number: int) -> None:
        """To every program of the session."""
        if self._pid is not None:
            self._order_kill(number, -1)

    def _order_kill(self, number: int, target: int) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._orders, guests.order(number, target))

    def has_ended(self, pid: int) -> bool:
        """Whether it was the kernel itself that ended; no program of the session lives then."""
        return pid == self._pid

    def status(self, client: int, status: int) -> int:
        """How its program ended, as ``waitpid`` would tell it.

        runsc tells of a signal as shells do, so what ends with 128 + n is taken to be killed by n.
        """
        group = self._groups.pop(client, None)
        code = os.waitstatus_to_exitcode(status)
        if code < 0 and group is not None:  # Somebody killed what stood for it.
            self._order_kill(signal.SIGKILL, -group)
        if code == _LOST and self._is_lost():
            return signal.SIGKILL
        return code - 128 if code > 128 and code - 128 in _SIGNALS else status

    def _is_lost(self) -> bool:
        assert self._pid is not None, "it ran a program"
        try:
            gone = os.pidfd_open(self._pid)
        except ProcessLookupError:
            return True
        try:
            return bool(containers.readable(_LOST_S, gone))
        finally:
            os.close(gone)


_SIGNALS: Final = frozenset(map(int, signal.valid_signals()))


def _binds() -> list[str]:
    """What gVisor would have of its own, and is shown the session's instead."""
    return [
        path
        for path in ("/sys", *_OWN_FOLDERS, *_SHOWN_FILES)
        if os.path.exists(f"{oci.ROOT}{path}")
    ]


def _standard_files(spec: KernelSpec | ExecSpec, inner: list[int]) -> list[tuple[object, ...]]:
    if not spec.tty:
        return [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(inner)]
    # A session leader's first open of a terminal makes it the controlling one: runsc hears of keys
    # and sizes, and passes them on.
    opened = (os.POSIX_SPAWN_OPEN, 0, os.ttyname(inner[0]), os.O_RDWR, 0)
    return [opened, *((os.POSIX_SPAWN_DUP2, 0, number) for number in (1, 2))]


def _write(path: str, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)
