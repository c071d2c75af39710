"""Keeps one session: its output, its input, its time limit and its end.

An unprivileged process outside of the sandbox, parent of the session's init. It outlives launcher
and agent; whoever wants to know something connects to ``keeper.sock`` (see ``clients``) or reads
the files it leaves. Nothing that it is connected to can make it wait: programs, disks that are
full, clients that don't read.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn

from madang.agent.launcher import channel, checks, clients, init, scratch, syscalls, verdict
from madang.agent.launcher.cgroups import Counters, Group
from madang.agent.launcher.clients import Client
from madang.agent.launcher.keeper_guard import LOST, Ward
from madang.agent.launcher.nest import fork_init
from madang.agent.launcher.order import Berth, Order
from madang.agent.launcher.processes import say
from madang.agent.launcher.program import CLAIMED, ENDED, Program
from madang.agent.launcher.seat import Seat
from madang.wire.errors import (
    Conflict,
    InvalidRequest,
    PlatformError,
    RuntimeFailed,
    SessionNotRunning,
)
from madang.wire.session import Reason

_LONGEST_WAIT_S: Final = 20.0
"""A suspended machine's sleep counts against the time limit: look at the clock now and then."""
_DISK_CHECK_S: Final = 1.0
_QUIET_S: Final = 1.0
"""An exec is over this long after its program ended, even if others hold its output open."""
_FULL_BYTES: Final = 1024 * 1024
_MAX_CLIENTS: Final = 256


def run(
    launcher: socket.socket,
    folder: str,
    group: Group | None,
    uid: int,
    gid: int,
    berth: Berth | None = None,
) -> NoReturn:
    """Life of a keeper, from the fork on: a slot, then a session's keeper.

    *folder* becomes the working directory; an order's paths may be relative to it, because folders
    above may be closed to us. *berth*: in a nest, if the init shall live in one.
    """
    try:
        os.setsid()
        os.chdir(folder)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            syscalls.handle(number, syscalls.IGNORE)
        syscalls.handle(signal.SIGCHLD, syscalls.DEFAULT)
        syscalls.set_process_name("madang-keeper")
        gc.disable()
        claimed = _wait_as_slot(launcher, group, uid, gid, berth)
        if claimed is not None:
            _Keeper(*claimed, launcher).serve()
    except BaseException as exc:
        say(f"madang keeper: {exc!r}")
        raise
    finally:
        os._exit(0)


def _wait_as_slot(
    launcher: socket.socket,
    group: Group | None,
    uid: int,
    gid: int,
    berth: Berth | None,
) -> tuple[Order, list[int], int, int, socket.socket] | None:
    """Make the init, drop all privileges, wait to be claimed; None: the launcher has left."""
    ours, theirs = channel.pair()
    pid = _fork_init(theirs, group, berth)
    theirs.close()
    channel.send(launcher, {"init": pid})
    if group is not None:
        _drop(uid, gid)
    claim, fds = channel.receive(launcher) if _pass_on(ours, launcher) else (None, [])
    if claim is None:
        ours.close()  # Which ends the init; nobody but us may be there to bury it.
        os.waitpid(pid, 0)
        return None
    inner = fds[: 1 + claim["folders"]]
    channel.send(ours, {}, inner)  # First of all: the init has the longer way to go.
    order = Order.from_json(channel.from_memory(fds[0]))
    for fd in inner:
        os.close(fd)
    return order, fds[len(inner) :], pid, os.pidfd_open(pid), ours


def _fork_init(link: socket.socket, group: Group | None, berth: Berth | None) -> int:
    if berth is not None:
        assert group is not None

        def begin(joins: list[int]) -> NoReturn:
            syscalls.close_all_but(link.fileno(), *joins)
            init.run(link, group, Seat(joins, berth.view, hurry=berth.hurry))

        return fork_init((berth.user, berth.pids), group, begin)
    if group is not None:
        syscalls.unshare(syscalls.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        syscalls.close_all_but(link.fileno())
        init.run(link, group)
    return pid


def _pass_on(link: socket.socket, launcher: socket.socket) -> bool:
    """What the init says until it is ready; False if it never will be, or the launcher left."""
    while True:
        message, fds = channel.receive(link)
        if message is None or not channel.send(launcher, message, fds):
            return False
        for fd in fds:
            os.close(fd)
        if "seat" not in message:
            return "failed" not in message


def _drop(uid: int, gid: int) -> None:
    syscalls.drop_bounding_set()
    if os.geteuid() != uid:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        # We are a copy of the launcher; without root, of one that is the server's equal.
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.drop_capabilities()
    syscalls.no_new_privileges()


class _Keeper:
    def __init__(
        self,
        order: Order,
        guard: list[int],
        init_pid: int,
        init_fd: int,
        init_link: socket.socket,
        launcher: socket.socket,
    ) -> None:
        self._order = order
        self._init_pid = init_pid
        self._init = init_link
        self._launcher = launcher
        self._selector = selectors.DefaultSelector()
        self._programs: dict[str, Program] = {}
        self._asked: dict[str, Client] = {}
        """Exec id → who waits to hear that it runs."""
        self._stop: tuple[Reason, str] | None = None
        self._leave_at: float | None = None
        self._deadline: float | None = None
        self._disk_at = 0.0
        self._disk_full = False
        self._failed = False
        self._over = False
        self._ward: Ward | None = None
        if guard:
            self._take_guard(socket.socket(fileno=guard[0]))
        self._selector.register(init_link, selectors.EVENT_READ, self._hear_init)
        self._selector.register(init_fd, selectors.EVENT_READ, self._bury_init)

    def serve(self) -> None:
        try:
            self._add(init.MAIN, f"{self._order.io}/{init.MAIN}")
        except OSError as exc:
            channel.send(self._launcher, {"failed": f"its output can't be kept: {exc}"})
            return
        while not self._over:
            for key, events in self._selector.select(self._wait_s()):
                if self._selector.get_map().get(key.fd) is key:
                    key.data(events)
            self._keep_time()
            for program in list(self._programs.values()):
                program.tell_watchers()
                self._arm(program)

    # -- the session -------------------------------------------------------------------------

    def _hear_init(self, _events: int = 0) -> bool:
        """Whether there may be more to hear."""
        message, fds = channel.receive(self._init)
        if message is None:
            self._unregister(self._init.fileno())
            return False
        if "failed" in message:
            self._failed = True
            channel.send(self._launcher, message)
        elif "set" in message:
            assert self._ward is not None
            self._ward.set(fds)
        elif "guest" in message:
            channel.send(self._launcher, message, fds)
            for fd in fds:
                os.close(fd)
        else:
            self._hear_of_program(message, fds)
        return True

    def _hear_of_program(self, message: channel.Message, fds: list[int]) -> None:
        program = self._programs.get(message["program"])
        if program is None:
            return
        if fds:
            program.connect(fds, tty=message["tty"])
        elif "status" in message:
            program.status = message["status"]
            program.exited_at = time.monotonic()
        else:
            self._began(program, message)

    def _began(self, program: Program, message: dict[str, Any]) -> None:
        """The program runs, or could not be executed."""
        program.known = True
        program.started_at = time.time()
        program.started_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        if "failure" in message:
            code, text = message["failure"]
            program.failure = (code, text)
            program.exited_at = time.monotonic()
        if program.name == init.MAIN:
            limit = self._order.spec.size.time_s
            self._deadline = None if limit is None else program.started_boot + limit
            missed = message.get("missed", False)
            channel.send(self._launcher, {"started": program.started_at, "missed": missed})
        elif client := self._asked.pop(program.name, None):
            client.tell({"ok": True, "at": program.started_at})

    def _bury_init(self, _events: int) -> None:
        """The session is over: no process of it lives, whatever they wrote is in the pipes."""
        os.waitpid(self._init_pid, 0)
        while self._hear_init():
            pass
        self._over = True
        if self._ward is not None:
            self._ward.finish()
            self._hear_guard()
        main = self._programs[init.MAIN]
        if self._failed or not main.known:  # Nothing has run: it may be started again.
            os.unlink(f"{main.folder}/{CLAIMED}")
            return
        for program in reversed(list(self._programs.values())):
            program.drain()
            self._finish(program)

    def _finish(self, program: Program) -> None:
        for fd in (*program.outputs, program.stdin, program.listener.fileno()):
            self._unregister(fd)
        for fd in program.clients:
            self._unregister(fd)
        program.finish(verdict.derive(self._look(program)))
        if program.name != init.MAIN:
            del self._programs[program.name]

    def _look(self, program: Program) -> verdict.Seen:
        is_main = program.name == init.MAIN
        order = self._order
        if is_main:
            self._check_disk()
        counters = order.group.counters() if is_main else Counters()
        used = None
        if is_main and order.scratch_enforced == "quota":
            with contextlib.suppress(OSError):
                used = scratch.usage(order.scratch)[0]
        return verdict.Seen(
            status=program.status,
            counters=counters,
            size=order.spec.size if is_main else None,
            stop=self._stop,
            failure=program.failure,
            disk_full=self._disk_full,
            disk_used_bytes=used,
            has_outputs=_holds_anything(f"{order.scratch}/outputs") if is_main else None,
            deadly=order.deadly,
            dropped_bytes=program.log.dropped_bytes,
            at=time.time(),
            duration_s=time.clock_gettime(time.CLOCK_BOOTTIME) - program.started_boot,
        )

    # -- its guard ---------------------------------------------------------------------------

    def _take_guard(self, link: socket.socket) -> None:
        self._ward = Ward(
            link,
            f"{self._order.io}/{init.MAIN}",
            begin=partial(self._tell_init, {"do": "begin"}),
            fail=self._fail,
            news=self._tell_refusals,
        )
        self._selector.register(self._ward, selectors.EVENT_READ, self._hear_guard)

    def _hear_guard(self, _events: int = 0) -> None:
        ward = self._ward
        if ward is None:
            return
        ward.hear()
        if ward.dismissed:
            self._unregister(ward.fileno())
            ward.close()
            self._ward = None
        elif ward.lost:
            self._lose_guard(ward)

    def _lose_guard(self, ward: Ward) -> None:
        """What it held is held by us until no process of the session lives."""
        self._unregister(ward.fileno())
        if not self._programs[init.MAIN].known:
            self._fail("its guard was killed while it was started")
        else:
            self._stop_session(Reason.GUARD, LOST, 0.0)

    def _fail(self, text: str) -> None:
        """Nothing has run, and nothing will."""
        self._failed = True
        channel.send(self._launcher, {"failed": text})
        self._tell_init({"do": "leave"})

    def _tell_refusals(self, number: int) -> None:
        for client in self._programs[init.MAIN].clients.values():
            if client.watching:
                client.tell_refusals(number)

    # -- time --------------------------------------------------------------------------------

    def _wait_s(self) -> float | None:
        now, boot = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
        waits = []
        if self._leave_at is not None:
            waits.append(self._leave_at - now)
        elif self._deadline is not None:
            waits.append(min(self._deadline - boot, _LONGEST_WAIT_S))
        if self._order.scratch_enforced == "quota":
            waits.append(self._disk_at - now)
        if self._ward is not None and not self._ward.lost:
            waits.append(self._ward.wait_s())
        waits += [
            program.exited_at + _QUIET_S - now
            for program in self._programs.values()
            if program.name != init.MAIN and program.exited_at is not None
        ]
        return max(0.0, min(waits)) if waits else None

    def _keep_time(self) -> None:
        now, boot = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
        if self._leave_at is not None and now >= self._leave_at:
            self._tell_init({"do": "leave"})
            self._leave_at = now + _LONGEST_WAIT_S
        elif self._deadline is not None and self._stop is None and self._deadline <= boot:
            limit = self._order.spec.size.time_s
            text = f"time limit {limit:g} s reached; ask for more with --time"
            self._stop_session(Reason.TIMEOUT, text, self._order.spec.grace_s)
        if self._ward is not None and not self._ward.lost:
            self._ward.keep_time()
            if self._ward.lost:
                self._lose_guard(self._ward)
        if now >= self._disk_at:
            self._disk_at = now + _DISK_CHECK_S
            self._check_disk()
        for program in list(self._programs.values()):
            if self._exec_is_over(program, now):
                self._finish(program)

    def _exec_is_over(self, program: Program, now: float) -> bool:
        if program.exited_at is None or program.ended or program.name == init.MAIN:
            return False
        return not program.outputs or now >= program.exited_at + _QUIET_S

    def _check_disk(self) -> None:
        if self._order.scratch_enforced == "quota" and not self._disk_full:
            with contextlib.suppress(OSError):
                found = os.statvfs(self._order.scratch)
                self._disk_full = (
                    found.f_bavail * found.f_frsize < _FULL_BYTES or not found.f_favail
                )

    def _stop_session(self, reason: Reason, text: str, grace_s: float) -> None:
        """SIGTERM now, SIGKILL after the grace; the first reason stays, the shortest grace wins."""
        if self._stop is None:
            self._stop = (reason, text)
            self._programs[init.MAIN].tell_stopping()
            numbers = [signal.SIGTERM, signal.SIGCONT]
            if self._order.spec.tty:
                numbers.insert(0, signal.SIGHUP)  # Shells ignore SIGTERM at a terminal.
            for number in numbers:
                self._tell_init({"do": "signal", "program": init.MAIN, "signal": number})
        leave_at = time.monotonic() + grace_s
        self._leave_at = min(leave_at, self._leave_at or leave_at)

    def _tell_init(self, message: channel.Message, fds: tuple[int, ...] = ()) -> None:
        channel.send(self._init, message, fds)

    # -- clients -----------------------------------------------------------------------------

    def _add(self, name: str, folder: str) -> Program:
        program = Program(name, folder, self._order.spec.log_limit_bytes)
        self._programs[name] = program
        accept = partial(self._accept, program)
        self._selector.register(program.listener, selectors.EVENT_READ, accept)
        return program

    def _accept(self, program: Program, _events: int) -> None:
        try:
            link, _ = program.listener.accept()
        except OSError:
            return
        if len(program.clients) >= _MAX_CLIENTS:
            link.close()
            return
        client = Client(link)
        program.clients[link.fileno()] = client

    def _arm(self, program: Program) -> None:
        """Wait for what this program and its clients can do next."""
        if program.ended:
            return
        for fd in program.outputs:
            events = selectors.EVENT_READ
            if fd == program.stdin and program.has_input:
                events |= selectors.EVENT_WRITE
            self._wait_for(fd, events, partial(self._move, program, fd))
        stdin = program.stdin
        if stdin is not None and stdin not in program.outputs:
            events = selectors.EVENT_WRITE if program.has_input else 0
            self._wait_for(stdin, events, partial(self._move, program, stdin))
        for fd, client in program.clients.items():
            reads = not client.feeding or program.takes_input
            events = selectors.EVENT_READ * reads | selectors.EVENT_WRITE * client.waiting
            self._wait_for(fd, events, partial(self._serve, program, client))

    def _wait_for(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        key = self._selector.get_map().get(fd)
        if key is None:
            if events:
                self._selector.register(fd, events, callback)
        elif not events:
            self._selector.unregister(fd)
        elif key.events != events:
            self._selector.modify(fd, events, callback)

    def _unregister(self, fd: int | None) -> None:
        if fd is not None and fd >= 0 and fd in self._selector.get_map():
            self._selector.unregister(fd)

    def _move(self, program: Program, fd: int, events: int) -> None:
        """Bytes from or to the program."""
        if events & selectors.EVENT_WRITE:
            if fd not in program.outputs:
                self._unregister(fd)
            program.write_input()
        if events & selectors.EVENT_READ and fd in program.outputs:
            self._unregister(fd)
            program.read(fd)

    def _serve(self, program: Program, client: Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            client.flush()
        alive = not events & selectors.EVENT_READ or client.read()
        try:
            for request in client.lines():
                self._answer(program, client, request)
            if client.feeding:
                self._feed(program, client)
        except PlatformError as exc:
            client.refuse(exc)
            alive = alive and not client.feeding
        if not alive:
            self._forget(program, client)

    def _forget(self, program: Program, client: Client) -> None:
        fd = client.link.fileno()
        self._unregister(fd)
        program.clients.pop(fd, None)
        self._asked = {name: asked for name, asked in self._asked.items() if asked is not client}
        client.close()

    def _answer(self, program: Program, client: Client, request: dict[str, Any]) -> None:
        op = request.get("op")
        if op == "watch":
            client.watching = True
            client.tell_end(program.log.end)
            if self._ward is not None and program.name == init.MAIN:
                client.tell_refusals(self._ward.refusals)
            if self._stop is not None:
                client.tell({"stopping": True})
        elif op == "stdin":
            client.feeding = True
        elif op == "signal":
            self._signal(program, request.get("signal"))
            client.tell({"ok": True})
        elif op == "stop":
            self._stop_session(*_stop_request(request, self._order.spec.grace_s))
            client.tell({"ok": True})
        elif op == "exec" and program.name == init.MAIN:
            self._exec(client, request)
        elif op == "guard" and program.name == init.MAIN and client.attached:
            self._meet_guard(client)
        else:
            raise InvalidRequest(f"op: {str(op)[:40]!r} is unknown.")

    def _meet_guard(self, client: Client) -> None:
        """Of a session that began without one."""
        if self._ward is not None:
            raise Conflict("the session has a guard.")
        try:
            link = socket.socket(fileno=client.attached[0])
        except OSError as exc:
            raise InvalidRequest("guard: what came with it is no channel.") from exc
        client.attached.clear()
        self._take_guard(link)
        client.tell({"ok": True})

    def _signal(self, program: Program, number: object) -> None:
        message = {"do": "signal", "program": program.name}
        self._tell_init(message | {"signal": clients.signal_number(number)})

    def _exec(self, client: Client, request: dict[str, Any]) -> None:
        name = checks.exec_id(request.get("exec"))
        spec = checks.exec_spec(request.get("spec"))
        folder = f"{self._order.io}/{name}"
        running = self._programs.get(name)
        if running is not None and name not in self._asked:
            client.tell({"ok": True, "at": running.started_at})
            return
        if running is not None or os.path.exists(f"{folder}/{ENDED}"):
            raise Conflict(f"exec {name} was started before.")
        if self._stop is not None or self._programs[init.MAIN].exited_at is not None:
            raise SessionNotRunning(f"{self._order.kernel} is ending.")
        try:
            self._add(name, folder)
        except OSError as exc:
            raise RuntimeFailed(f"exec {name}: its output can't be kept: {exc}") from exc
        self._asked[name] = client
        fd = channel.to_memory({
            "argv": spec.argv, "argv_encoding": spec.argv_encoding, "env": spec.env,
            "cwd": spec.cwd, "tty": spec.tty, "stdin": spec.stdin,
            "rows": spec.rows, "cols": spec.cols,
        })  # fmt: skip
        self._tell_init({"do": "exec", "program": name}, (fd,))
        os.close(fd)

    def _feed(self, program: Program, client: Client) -> None:
        for kind, payload in client.frames():
            if kind == clients.DATA:
                program.feed(payload)
            elif kind == clients.END:
                program.end_input()
            elif kind == clients.RESIZE:
                program.resize(*clients.resize(payload))
            else:
                self._signal(program, payload[0] if len(payload) == 1 else None)


def _stop_request(request: dict[str, Any], grace_s: float) -> tuple[Reason, str, float]:
    try:
        reason = Reason(request.get("reason", Reason.USER))
        grace = float(request.get("grace_s", grace_s))
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"stop: {exc}") from exc
    if not 0 <= grace <= 1e6:
        raise InvalidRequest(f"stop: a grace of {grace:g} s makes no sense.")
    return reason, str(request.get("text", ""))[:2000], grace


def _holds_anything(folder: str) -> bool | None:
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:  # The session closed it to us.
        return None
