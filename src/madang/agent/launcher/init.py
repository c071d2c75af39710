"""Process 1 of a session: builds the sandbox, starts programs, reaps, forwards signals.

It begins as root, in the slot's control group and in PID, network, IPC and UTS namespaces of its
own. Once the sandbox stands it has the session's uid, no capability and the session's seccomp
filter itself, so every program that it starts has them too. It starts the main program and, when
the keeper asks, each exec: there is no way into a running session that keeps privileges.

Its one connection is the keeper's. When the keeper dies, so does it, and the kernel kills all
processes of the session with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import resource
import selectors
import signal
import socket
import struct
import termios
from base64 import b64decode
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Final, NoReturn

from madang.agent.launcher import (
    box,
    channel,
    checks,
    containers,
    fakeroot,
    guarded,
    gvisor,
    mounts,
    processes,
    relay,
    rootfs,
    seccomp,
    syscalls,
    truth,
)
from madang.agent.launcher.builder import Builder, build
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.containers import Containers, Refused
from madang.agent.launcher.gvisor import Gvisor
from madang.agent.launcher.order import Order, View
from madang.agent.launcher.processes import say
from madang.agent.launcher.seat import Seat
from madang.wire.image import ImageKind
from madang.wire.kernel import (
    DEFAULT_PATH,
    HOME_DIR,
    NATIVE,
    OUTPUT_DIR,
    RUNSC,
    USER_NAME,
    WORK_DIR,
    ExecSpec,
    ImageMount,
    KernelSpec,
)
from madang.wire.session import RootMode
from madang.wire.size import Size

MAIN: Final = "main"
_OOM_SCORE: Final = b"300"
"""The kernel's memory killer takes a program of the session before its init."""
NAMESPACES: Final = (
    syscalls.CLONE_NEWNET | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWCGROUP
)
CHANGED_SIGNALS: Final = tuple(
    map(
        int,
        (
            *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGPIPE),
            *(signal.SIGXFSZ, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP, signal.SIGTTIN),
            signal.SIGTTOU,
        ),
    )
)
"""Those that Python, we, or who started us (nohup, shells) may have ignored: programs get the
defaults."""
_MAX_OPEN_FILES: Final = 1024 * 1024


def run(link: socket.socket, group: Group | None, seat: Seat | None = None) -> NoReturn:
    """Life of an init, from the fork on. *group* None: no isolation (``process`` runtime).

    With a *seat* it is in a nest (see ``nest``): in its group already, root there and nowhere else.
    """
    try:
        if seat is not None:
            assert group is not None
            _run_with_builder(link, group, seat)
        elif _ready(link, group):
            _run(link)
    except BaseException as exc:
        say(f"madang init: {exc!r}")
    finally:
        os._exit(0)


def _run(link: socket.socket) -> None:
    message, fds = channel.receive(link)
    if message is None:
        return
    order = Order.from_json(channel.from_memory(fds[0]))
    os.close(fds[0])
    if order.box:
        box.run(link, order)
    elif _set_up(link, order):
        if order.spec.build and order.spec.image.kind == ImageKind.ROOT:
            relay.start()
        _Init(link, order).serve()


def _begin() -> None:
    for number in CHANGED_SIGNALS:
        syscalls.handle(number, syscalls.DEFAULT)
    syscalls.set_process_name("madang-init")
    gc.disable()


def _ready(link: socket.socket, group: Group | None) -> bool:
    """Do everything that needs no session; whether it could be done."""
    _begin()
    try:
        if group is not None:
            syscalls.die_with_parent(signal.SIGKILL)
            group.join()
            syscalls.unshare(NAMESPACES)
            syscalls.loopback_up()
        else:
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    except OSError as exc:
        channel.send(link, {"failed": f"a slot can't be made: {exc}"})
        return False
    sent = channel.send(link, {"ready": True})
    if group is not None:
        _rehearse(group)
    return sent


# -- with a seat -----------------------------------------------------------------------------------


def _run_with_builder(link: socket.socket, group: Group, seat: Seat) -> None:
    """In a nest; see ``builder``."""
    _begin()
    try:
        syscalls.die_with_parent(signal.SIGKILL)
        syscalls.unshare(NAMESPACES | syscalls.CLONE_NEWNS)
        built = build(partial(_build, link, group, seat), link)
    except OSError as exc:
        channel.send(link, {"failed": f"a slot can't be made: {exc}"})
        return
    if built is None:
        return
    job = built.value["job"]
    os.chdir("/")  # The builder has moved our root, too, but not where we were.
    seat.resume(built.value["pid"], built.fds)
    try:
        limit_resources()
        os.umask(0o022)
        _become_user(job["uid"])
        seccomp.install(job["filter"])
    except OSError as exc:
        channel.send(link, {"failed": f"the sandbox can't be set up: {exc}"})
        return
    spec = ExecSpec(argv=(), cwd=os.fsdecode(job["cwd"]), **built.value["streams"])
    init = _Init(link, built.order, seat)
    init.begin()
    if init.start(MAIN, spec, job):
        init.loop()


def _build(link: socket.socket, group: Group, seat: Seat, builder: Builder) -> None:
    """Everything that the init of a slot in a nest need not do itself."""
    try:
        syscalls.loopback_up()
        seat.set_up(group)
        seat.offer(link)
        seat.wait()
    except OSError as exc:
        channel.send(link, {"failed": f"a slot can't be made: {exc}"})
        return
    assert seat.frame is not None
    channel.send(link, {"ready": True, "warm": seat.taken})
    if not seat.hurry:
        _rehearse(group)
    message, fds = channel.receive(link)
    if message is None:
        return
    order = Order.from_json(channel.from_memory(fds[0]))
    try:
        seat.frame.take(fds[1:])
        seat.frame.fill(order)
        syscalls.sethostname(order.spec.hostname.encode())
    except Exception as exc:
        channel.send(link, {"failed": f"the sandbox can't be set up: {exc}"})
        return
    spec = order.spec
    streams = {"tty": spec.tty, "stdin": spec.stdin, "rows": spec.rows, "cols": spec.cols}
    value = {"job": _job(spec, order), "streams": streams, "pid": seat.pid}
    builder.hand_over(value, fds[0], seat.descriptors)


def _rehearse(group: Group) -> None:
    """What the order will take, with some order: see ``warmed.rehearse``."""
    size = Size(cpu=1, mem_bytes=1, pids=1, disk_bytes=1)
    image = ImageMount(name="", digest="", kind="host")
    spec = KernelSpec(argv=("true",), image=image, size=size)
    order = Order(
        kernel="", spec=spec, io="", scratch="", scratch_enforced="", group=group, cpus=[0], uid=0
    )
    order = Order.from_json(json.loads(json.dumps(order.to_json())))
    mounts.own_files(order)
    environment(order, order.spec)


def _set_up(link: socket.socket, order: Order) -> bool:
    """Whether the sandbox stands; if not, the keeper is told why."""
    listener: list[int] = []
    try:
        if order.view is not None:
            _make_root(order, order.view)
            listener = _restrict(order)
        else:
            os.umask(0o022)
    except Exception as exc:
        channel.send(link, {"failed": f"the sandbox can't be set up: {exc}"})
        return False
    return guarded.wait(link, order, listener)


def settle_in(order: Order) -> None:
    """What is left to be done in a box, where Docker has done the rest. Raises OSError."""
    _begin()
    os.chdir("/")
    limit_resources()
    os.umask(0o022)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.close_on_exec_from(3)
    _forget_standard_files()
    seccomp.install(_filter(order))


def serve(link: socket.socket, order: Order, lifeline: int) -> None:
    """Be the init of a session in a box until it is over, or *lifeline* is closed."""
    _Init(link, order, lifeline=lifeline).serve()


@cache
def filter_program() -> bytes:
    """Made once, by the launcher, for all of its forks."""
    return seccomp.program()


def warm() -> None:
    """Do in the launcher whatever would else be done anew by each init."""
    filter_program()
    truth.files(1.0, [0], 1)


_ENTER: Final = {NATIVE: mounts.enter, RUNSC: gvisor.enter}
"""Runtime → how the init gets to its root; others: ``containers.enter``."""


def _make_root(order: Order, view: View) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    _ENTER.get(order.runtime, containers.enter)(order, view)


def _restrict(order: Order) -> list[int]:
    """Everything between root in the session's view and an ordinary program there, in order.

    What it returns is for the guard: see ``guarded``.
    """
    syscalls.sethostname(order.spec.hostname.encode())
    limit_resources()
    os.umask(0o022)
    if order.runtime != NATIVE:  # Its programs get the rest from the runtime.
        containers.seal(gvisor.KEPT if order.runtime == RUNSC else containers.KEPT)
        syscalls.close_on_exec_from(3)
        _forget_standard_files()
        return []
    if order.spec.root is RootMode.FAKE:
        fakeroot.become(order.uid, nested=order.nested)
        _let_go()
    else:
        _become_user(mounts.shown_uid(order), nested=order.nested)
    listener = guarded.restrict(order)
    seccomp.install(_filter(order))
    return listener


def _become_user(uid: int, *, nested: bool = False) -> None:
    """With no capability, nothing of others and no way back; the filter is left.

    Nested, our only uid becomes an ordinary one in a namespace that owns nothing.
    """
    syscalls.drop_bounding_set()
    if nested:
        fakeroot.enter_user_namespace(uid, os.geteuid())
        syscalls.drop_bounding_set()
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:
        syscalls.change_user(uid)
    syscalls.drop_capabilities()
    _let_go()


def _let_go() -> None:
    """Of what the launcher had; and no way back."""
    syscalls.die_with_parent(signal.SIGKILL)  # Again: a change of uid clears it.
    syscalls.no_new_privileges()
    # We are a copy of the launcher, which has handled other sessions' secrets.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.close_on_exec_from(3)
    _forget_standard_files()


def _filter(order: Order) -> bytes:
    return b64decode(order.program) if order.program else filter_program()


def _forget_standard_files() -> None:
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)


def limit_resources() -> None:
    """No core files; as many open files as the hard limit allows, within reason."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Init:
    def __init__(
        self,
        link: socket.socket,
        order: Order | int,
        seat: Seat | None = None,
        *,
        lifeline: int = -1,
    ) -> None:
        """*order*: or where it can be read once it is needed, of an ordinary session.

        *lifeline*: where it is readable, the session is over.
        """
        self._link = link
        self._lifeline = lifeline
        self._given = order
        self._seat = seat
        self._programs: dict[int, str] = {}
        """pid → ``main`` or an exec's id"""
        self._selector = selectors.DefaultSelector()
        self._containers: Containers | None = None
        self._gvisor: Gvisor | None = None
        self._kill: Callable[[int, int], None] = os.killpg
        self._kill_all: Callable[[int], None] = partial(os.kill, -1)
        if isinstance(order, Order):
            self._choose(order)
        self._wake, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_writer = wake_writer

    def _choose(self, order: Order) -> None:
        """Who starts and kills programs."""
        if order.runtime == RUNSC:
            self._containers = self._gvisor = Gvisor(order, filter_program())
            self._kill, self._kill_all = self._gvisor.signal, self._gvisor.signal_all
        elif order.runtime != NATIVE and not order.box:
            self._containers = Containers(order, filter_program())

    @property
    def _order(self) -> Order:
        if isinstance(self._given, int):
            fd, self._given = self._given, Order.from_json(channel.from_memory(self._given))
            os.close(fd)
        return self._given

    def serve(self) -> None:
        self.begin()
        spec = self._order.spec
        if not spec.argv:
            channel.send(self._link, {"program": MAIN, "idle": True})
        if not spec.argv or self.start(MAIN, spec):
            self.loop()
        if self._order.view is None:
            _kill_descendants()

    def begin(self) -> None:
        syscalls.handle(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self._selector.register(self._link, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        if self._lifeline >= 0:
            self._selector.register(self._lifeline, selectors.EVENT_READ)

    def loop(self) -> None:
        """Until the session is over."""
        while self._step():
            pass

    def _step(self) -> bool:
        """One event; False once the session is over."""
        for key, _ in self._selector.select():
            if key.fileobj is self._link:
                if not self._obey(*channel.receive(self._link)):
                    return False
            elif key.fileobj == self._lifeline:
                return False
            else:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
        return self._reap()

    def _obey(self, message: channel.Message | None, fds: list[int]) -> bool:
        if message is None or message["do"] == "leave":
            return False
        if message["do"] == "signal":
            self._signal(message["program"], message["signal"])
        elif message["do"] == "exec":
            spec = checks.exec_spec(channel.from_memory(fds[0]))
            os.close(fds[0])
            self.start(message["program"], spec)
        return True

    def _signal(self, program: str, number: int) -> None:
        """To the program's process group; without a main program, to everything."""
        if program == MAIN and MAIN not in self._programs.values():
            if self._order.view is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._kill_all(number)
            return
        for pid, name in self._programs.items():
            if name == program:
                with contextlib.suppress(ProcessLookupError):
                    self._kill(pid, number)

    def _reap(self) -> bool:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return True
            program = self._programs.pop(pid, None)
            if program is not None:
                if self._gvisor is not None:
                    status = self._gvisor.status(pid, status)
                channel.send(self._link, {"program": program, "status": status})
                if program == MAIN:
                    return False
            elif self._gvisor is not None and self._gvisor.has_ended(pid):
                return False

    def start(
        self, name: str, spec: KernelSpec | ExecSpec, job: dict[str, Any] | None = None
    ) -> bool:
        """Start a program; its ends of pipes or terminal go to the keeper at once.

        Whether it runs; if not, the keeper knows why. *job*: see ``_job``.
        """
        inner: list[int] = []
        seat = self._seat if name == MAIN else None

        def connect(outer: list[int]) -> None:
            channel.send(self._link, {"program": name, "tty": spec.tty}, outer)

        try:
            if self._containers is None:
                inner = _connected(_open_terminal if spec.tty else _open_pipes, spec, connect)
                job = _job(spec, self._order) if job is None else job
                pid = _spawn(job, spec, inner, seat)
            else:
                if not (spec.tty and self._containers.makes_terminals):
                    opening = _open_terminal if spec.tty else _open_pipes
                    with self._containers.as_user():
                        inner = _connected(opening, spec, connect)
                argv = checks.argv_bytes(spec.argv, spec.argv_encoding)
                variables = environment(self._order, spec)
                pid = self._containers.start(spec, argv, variables, inner, connect)
        except Refused as exc:
            channel.send(self._link, {"program": name, "failure": [exc.code, exc.text]})
        except OSError as exc:
            failure = [126, f"can't be started: {exc.strerror}"]
            channel.send(self._link, {"program": name, "failure": failure})
        else:
            self._programs[pid] = name
            missed = seat is not None and seat.missed
            channel.send(self._link, {"program": name, "started": True, "missed": missed})
            if self._gvisor is None:  # Whose kernel holds the memory, not what stands for it.
                _prefer_for_oom_kill(pid)
            return True
        finally:
            for fd in set(inner):
                os.close(fd)
        return False


def _connected(
    opening: Callable[[KernelSpec | ExecSpec], tuple[list[int], list[int]]],
    spec: KernelSpec | ExecSpec,
    connect: Callable[[list[int]], None],
) -> list[int]:
    """The program's ends; the keeper has its own before the program can run."""
    inner, outer = opening(spec)
    connect(outer)
    for fd in outer:
        os.close(fd)
    return inner


def _open_pipes(spec: KernelSpec | ExecSpec) -> tuple[list[int], list[int]]:
    """(the program's stdin, stdout, stderr; the keeper's other ends: out, err and, if fed, in)

    Made by the session's uid, so that programs can open /dev/stdout again.
    """
    out_reader, out_writer = os.pipe2(os.O_CLOEXEC)
    error_reader, error_writer = os.pipe2(os.O_CLOEXEC)
    if not spec.stdin:
        nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        return [nothing, out_writer, error_writer], [out_reader, error_reader]
    in_reader, in_writer = os.pipe2(os.O_CLOEXEC)
    return [in_reader, out_writer, error_writer], [out_reader, error_reader, in_writer]


def _open_terminal(spec: KernelSpec | ExecSpec) -> tuple[list[int], list[int]]:
    """(the terminal three times; its other side)"""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", spec.rows, spec.cols, 0, 0))
    return [slave, slave, slave], [master]


def _job(spec: KernelSpec | ExecSpec, order: Order) -> dict[str, Any]:
    """All that a program is told; of types that every Python reads, see ``warmed``."""
    return {
        "argv": checks.argv_bytes(spec.argv, spec.argv_encoding),
        "env": environment(order, spec),
        "cwd": os.fsencode(_real_path(order, spec.cwd)),
        "uid": order.uid,
        "filter": _filter(order),
    }


def _spawn(
    job: dict[str, Any], spec: KernelSpec | ExecSpec, inner: list[int], seat: Seat | None
) -> int:
    """Start the program in a session of its own; its pid. Raises Refused.

    Who waits in the *seat* becomes it, if somebody does.

    By posix_spawn: it shares our memory until its exec, where a fork would copy page tables. What
    it can't do for us, we do around it: our own working directory is the program's meanwhile.
    """
    name = os.ttyname(inner[0]) if spec.tty else ""
    if spec.tty:  # A session leader's first open of a terminal makes it the controlling one.
        actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_OPEN, 0, name, os.O_RDWR, 0)]
        actions += [(os.POSIX_SPAWN_DUP2, 0, number) for number in (1, 2)]
    else:
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(inner)]
    try:
        os.chdir(job["cwd"])
    except OSError as exc:
        text = f"can't enter the working directory {spec.cwd[:200]}: {exc.strerror}"
        raise Refused(126, text) from exc
    argv, variables = job["argv"], job["env"]
    try:
        if seat is not None:
            pid = seat.become(job | {"tty": os.fsencode(name)}, inner)
            if pid is not None:
                return pid
        return _spawn_first(candidates(argv[0], variables), argv, variables, actions)
    finally:
        os.chdir("/")


def _spawn_first(
    candidates: list[bytes],
    argv: list[bytes],
    environment: dict[bytes, bytes],
    actions: list[tuple[object, ...]],
) -> int:
    shown = argv[0][:200].decode(errors="replace")
    refused = Refused(127, f"no such program: {shown}")
    for path in candidates:
        try:
            return os.posix_spawn(path, argv, environment, file_actions=actions, setsid=True)
        except (FileNotFoundError, NotADirectoryError):
            if os.path.exists(path):
                refused = Refused(126, f"can't execute {shown}: its interpreter is missing")
        except OSError as exc:
            refused = Refused(126, f"can't execute {shown}: {exc.strerror}")
            if not isinstance(exc, PermissionError):
                break
    raise refused


def candidates(program: bytes, environment: dict[bytes, bytes]) -> list[bytes]:
    """Where the program may lie, as ``execvp`` looks for it."""
    if not program:
        return []
    if b"/" in program:
        return [program]
    folders = environment.get(b"PATH", DEFAULT_PATH.encode()).split(b":")
    found = [os.path.join(folder or b".", program) for folder in folders]
    return [path for path in found if os.path.lexists(path)]


def _prefer_for_oom_kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, _OOM_SCORE)
        os.close(fd)


def _real_path(order: Order, path: str) -> str:
    """Where a session's path lies; differs without isolation only."""
    if order.view is not None:
        return path
    folders = {WORK_DIR: "work", OUTPUT_DIR: "outputs", HOME_DIR: "home"}
    for shown, name in folders.items():
        if path == shown or path.startswith(shown + "/"):
            return f"{order.scratch}/{name}{path[len(shown) :]}"
    return path


def environment(order: Order, spec: KernelSpec | ExecSpec) -> dict[bytes, bytes]:
    """Ours, then the image's, then the user's, which win except over MADANG_*."""
    whole = order.spec.image.kind == ImageKind.ROOT
    found: dict[str, str] = {
        "PATH": DEFAULT_PATH,
        "HOME": _real_path(order, HOME_DIR),
        "USER": USER_NAME,
        "LOGNAME": USER_NAME,
        "SHELL": rootfs.shell(b"/") if whole else mounts.shell(),
        "LANG": "C.UTF-8",
        **truth.environment(order.spec.size.cpu),
    }
    if order.spec.root is RootMode.FAKE:
        found |= fakeroot.ENVIRONMENT
    if spec.tty:
        found["TERM"] = "xterm-256color"
    if order.view is None:
        found["TMPDIR"] = f"{order.scratch}/tmp"
    found |= _without_ours(order.spec.image.env)
    found |= _without_ours(order.spec.env)
    if spec is not order.spec:
        found |= _without_ours(spec.env)
    found |= {
        "MADANG": "1",
        "MADANG_SESSION": order.spec.hostname,
        "MADANG_OUTPUTS": _real_path(order, OUTPUT_DIR),
    }
    return {os.fsencode(key): os.fsencode(value) for key, value in found.items()}


def _without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in environment.items()
        if key != "MADANG" and not key.startswith("MADANG_")
    }


def _kill_descendants() -> None:
    """Without a PID namespace: kill children until none is left; orphans become our children."""
    while True:
        for pid in processes.children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
