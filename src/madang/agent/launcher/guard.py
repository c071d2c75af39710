"""A session's guard: keeps those rules of its policy that can change while it runs.

::

    launcher ──(a socket in its folder)── guard ── keeper ── init
                                            │
              fanotify: files ── seccomp's listener: counts, answers ── control group: addresses

One process a session, and only of sessions with such rules: root, in the launcher's namespaces, so
that it sees the session from outside. It takes orders from the launcher alone. What a session can
send it are questions: which file is opened by whom, which call with which numbers. It opens nothing
by a name that a session could have made up.

**Order of a start.** The init puts the sandbox together, sends the listener of its filter and
waits. The keeper passes the listener on (``set``); the guard marks the session's mounts, sends the
keeper a duplicate of its fanotify descriptor and says ``set``; the keeper tells the init to go on.
No program of the session runs before.

**It fails closed.** Were the last fanotify descriptor closed, every open would pass. So the keeper
holds one too, which nobody reads: without a guard, opens wait. The keeper sees the end of the guard
at once, and its silence within ``keeper_guard.SILENCE_S``, and ends the session; so does the
launcher. If the keeper goes first, the guard kills the init and stays until the kernel says that no
process of the session lives.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, NoReturn

from madang.agent.launcher import channel, checks, fanotify, processes, syscalls
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.fence import Fence
from madang.agent.launcher.guard_calls import Calls, Truth
from madang.agent.launcher.guard_files import Files
from madang.agent.launcher.notify import Listener
from madang.agent.launcher.pace import Pace, hurry
from madang.agent.launcher.processes import ProcessId, say
from madang.agent.launcher.refusals import Refusals
from madang.agent.launcher.watch import PERIOD_S, Watch
from madang.wire.errors import PlatformError, PolicyUnkept, RuntimeFailed
from madang.wire.policy import NO_SANDBOX, Sandbox

FOLDER: Final = "guard"
SOCKET: Final = "guard.sock"
_OOM_SCORE: Final = b"-900"
_FINISH_S: Final = 5.0
"""What was refused is told for so long, to a keeper that does not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """What the launcher tells a guard, once."""

    folder: str
    """Of the kernel; in the launcher's namespace."""
    init: ProcessId
    keeper: ProcessId
    sandbox: Sandbox
    hostname: str
    mem_bytes: int = 0
    group: Group
    late: bool
    """The session runs: there is no listener to wait for."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Post:
        return cls(
            init=ProcessId(**value.pop("init")),
            keeper=ProcessId(**value.pop("keeper")),
            sandbox=checks.sandbox(value.pop("sandbox")),
            group=Group(**value.pop("group")),
            **value,
        )


def run(launcher: socket.socket) -> NoReturn:
    """Life of a guard, from the fork on."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        syscalls.set_process_name("madang-guard")
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        gc.disable()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as file:
            file.write(_OOM_SCORE)
        message, fds = channel.receive(launcher)
        if message is not None:
            post = Post.from_json(channel.from_memory(fds[0]))
            os.close(fds[0])
            keeper = socket.socket(fileno=fds[1])
            hurry()
            _Guard(post, keeper, launcher).serve()
    except BaseException as exc:
        # In a few words: a traceback would read source files.
        say(f"madang guard: {exc!r}"[:1000])
    finally:
        os._exit(0)


class _Guard:
    def __init__(self, post: Post, keeper: socket.socket, launcher: socket.socket) -> None:
        self._post = post
        self._keeper = keeper
        self._launcher = launcher
        self._selector = selectors.DefaultSelector()
        self._refusals = Refusals()
        self._pace = Pace()
        self._listens = True
        self._asked: dict[int, Callable[[], None]] = {}
        """Where the session's questions come from."""
        self._sandbox = NO_SANDBOX
        self._files: Files | None = None
        self._calls: Calls | None = None
        self._fence: Fence | None = None
        self._watch_of_calls: Watch | None = None
        self._watch_at = 0.0
        """When it is read next."""
        self._fence_rests = False
        """It has told much, and is heard again when that was passed on."""
        self._handed_over: frozenset[str] = frozenset()
        self._over = False
        self._init_fd = _open(post.init)
        self._watch(self._init_fd, self._bury_init)
        keeper.setblocking(False)
        self._watch(keeper, self._hear_keeper)
        self._socket = _listen(post.folder)
        self._watch(self._socket, self._accept)

    def serve(self) -> None:
        if self._post.late and not self._begin_late():
            return
        self._launcher.close()
        while not self._over:
            rest_s = self._pace.rest_s()
            self._listen_to_the_session(rest_s == 0)
            for key, _ in self._selector.select(self._wait_s(rest_s)):
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            self._read_watch(self._watch_at)
            self._tell_refusals()
        self._end()

    def _wait_s(self, rest_s: float) -> float | None:
        waits = [rest_s or None, self._refusals.wait_s()]
        if self._watch_of_calls is not None:
            waits.append(max(0.0, self._watch_at - time.monotonic()))
        return min((wait for wait in waits if wait is not None), default=None)

    def _listen_to_the_session(self, wanted: bool) -> None:
        """Or let it wait: orders and the keeper are heard anyway."""
        if wanted is self._listens:
            return
        self._listens = wanted
        for what, call in self._asked.items():
            if wanted:
                self._watch(what, call)
            else:
                self._selector.unregister(what)

    def _watch(self, what: Any, call: Callable[[], None]) -> None:
        self._selector.register(what, selectors.EVENT_READ, call)

    def _hear_questions(self, fd: int, call: Callable[[], None]) -> None:
        self._asked[fd] = call
        if self._listens:
            self._watch(fd, call)

    # -- the beginning -----------------------------------------------------------------------

    def _begin_late(self) -> bool:
        """Whether its rules are in force; if not, the session goes on as it was."""
        try:
            self._set(None)
            answer: channel.Message = {"ok": self._later(self._post.sandbox)}
        except (PlatformError, OSError) as exc:
            answer = _error(exc)
            self._tell({"dismissed": True})
        channel.send(self._launcher, answer)
        return "ok" in answer

    def _set(self, listener: int | None) -> None:
        """Everything in force; then the keeper is told."""
        post = self._post
        proc = os.open(f"/proc/{post.init.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if ProcessId.of(post.init.pid) != post.init:
                raise RuntimeFailed("the session has ended")
            held = self._open_files(proc)
        finally:
            os.close(proc)
        if listener is not None:
            self._handed_over = post.sandbox.handed_over
            truth = Truth(
                hostname=post.hostname,
                mem_bytes=post.mem_bytes,
                used_bytes=lambda: post.group.counters().mem_bytes or 0,
            )
            calls = Calls(Listener(listener), self._handed_over, truth, self._refusals.add)
            self._calls = calls
            self._hear_questions(listener, calls.ready)
        self._put_in_force(post.sandbox)
        channel.send(self._keeper, {"set": True}, held)

    def _open_files(self, proc: int) -> list[int]:
        """The descriptors that the keeper holds with us."""
        try:
            group = fanotify.Group()
        except OSError:  # Without root: then no rule about files has come so far.
            return []
        self._files = Files(group, self._refusals.add)
        self._files.connect(proc)
        self._hear_questions(group.fileno(), self._files.ready)
        return [group.fileno()]

    # -- the rules ---------------------------------------------------------------------------

    def _replace(self, sandbox: Sandbox) -> list[str]:
        """Other rules. Raises PolicyUnkept, OSError: then the former ones are in force."""
        before = self._sandbox
        try:
            self._put_in_force(sandbox)
        except (PlatformError, OSError):
            self._put_in_force(before)
            raise
        return self._later(sandbox)

    def _put_in_force(self, sandbox: Sandbox) -> None:
        if self._files is not None:
            self._files.replace(sandbox.files)
        elif sandbox.files:
            raise PolicyUnkept("rules about files can't be kept here: fanotify takes root.")
        if self._calls is not None:
            self._calls.replace(sandbox.counts, sandbox.answers)
        if self._fence is not None:
            self._fence.replace(sandbox.nets, sandbox.names)
        elif sandbox.nets:
            self._fence = Fence.attach(self._post.group, sandbox.nets, sandbox.names)
            self._watch(self._fence, self._hear_fence)
        self._set_watch(bool(sandbox.watches))
        self._sandbox = sandbox

    def _set_watch(self, wanted: bool) -> None:
        """Of system calls; what was made before does not count."""
        if wanted and self._watch_of_calls is None:
            self._watch_of_calls = Watch.of(self._post.group)
        elif not wanted and self._watch_of_calls is not None:
            self._read_watch()
            self._watch_of_calls.close()
            self._watch_of_calls = None

    def _read_watch(self, due_at: float = 0.0) -> None:
        now = time.monotonic()
        if self._watch_of_calls is None or now < due_at:
            return
        self._watch_at = now + PERIOD_S
        for call in self._watch_of_calls.read():
            for rule in self._sandbox.watches:
                self._refusals.add(rule, "call", call, 0)

    def _later(self, sandbox: Sandbox) -> list[str]:
        """Places of rules that this session's filter does not hand over."""
        counts = (rule.place for rule in sandbox.counts if not self._hears(*rule.calls))
        answers = (rule.place for rule in sandbox.answers if not self._hears(rule.call))
        return [*counts, *answers]

    def _hears(self, *calls: str) -> bool:
        return self._handed_over.issuperset(calls)

    def _hear_fence(self) -> None:
        """Not again at once: a session could be refused as fast as we read."""
        assert self._fence is not None
        if self._read_fence() and not self._fence_rests:
            self._selector.unregister(self._fence)
            self._fence_rests = True

    def _read_fence(self) -> bool:
        """Whether there was something."""
        found = self._fence.read() if self._fence is not None else []
        for met in found:
            self._refusals.add(met.rule, met.what, met.object, met.pid, met.times)
        return bool(found)

    # -- the keeper --------------------------------------------------------------------------

    def _hear_keeper(self) -> None:
        message, fds = channel.receive(self._keeper)
        if message is None:
            self._over = True
        elif "ping" in message:
            self._tell({"pong": True})
        elif "finish" in message:
            self._finish()
        elif "set" in message:
            try:
                self._set(fds[0] if fds else None)
            except (PlatformError, OSError) as exc:
                self._tell({"failed": _error(exc)["text"]})

    def _tell(self, message: channel.Message) -> bool:
        """False: the keeper has not read what was told before."""
        try:
            channel.send(self._keeper, message)
        except BlockingIOError:
            return False
        return True

    def _finish(self) -> None:
        """Nobody asks any more; tell what is left."""
        self._read_fence()
        self._read_watch()
        self._keeper.settimeout(_FINISH_S)
        with contextlib.suppress(TimeoutError):
            while news := self._refusals.take(at_once=True):
                channel.send(self._keeper, {"refused": news})
            channel.send(self._keeper, {"finished": True})
        self._keeper.setblocking(False)

    def _tell_refusals(self) -> None:
        news = self._refusals.take()
        if news and not self._tell({"refused": news}):
            self._refusals.put_back(news)
        if news and self._fence is not None and self._fence_rests:
            self._watch(self._fence, self._hear_fence)
            self._fence_rests = False

    # -- the launcher ------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            link, _ = self._socket.accept()
            link.setblocking(False)
            self._watch(link, partial(self._obey, link))

    def _obey(self, link: socket.socket) -> None:
        """One request a connection. Only who may enter our folder can make one."""
        self._selector.unregister(link)
        with link:
            message, fds = channel.receive(link)
            if message is None or not fds:
                return
            try:
                answer: channel.Message = {
                    "ok": self._replace(checks.sandbox(channel.from_memory(fds[0])))
                }
            except (PlatformError, OSError) as exc:
                answer = _error(exc)
            finally:
                os.close(fds[0])
            with contextlib.suppress(BlockingIOError):
                channel.send(link, answer)

    # -- the end -----------------------------------------------------------------------------

    def _bury_init(self) -> None:
        """No process of the session lives: the keeper will leave."""
        self._selector.unregister(self._init_fd)

    def _end(self) -> None:
        """Nothing of the session may live when our descriptors are closed."""
        self._post.group.thaw()  # A version 1 freezer holds even SIGKILL back.
        processes.kill(self._init_fd)
        with selectors.DefaultSelector() as death:
            death.register(self._init_fd, selectors.EVENT_READ)
            death.select()
        with contextlib.suppress(OSError):
            os.unlink(f"{self._post.folder}/{FOLDER}/{SOCKET}")


def _open(process: ProcessId) -> int:
    fd = process.open()
    if fd is None:
        raise RuntimeFailed("the session has ended")
    return fd


def _error(exc: PlatformError | OSError) -> channel.Message:
    if isinstance(exc, PlatformError):
        return {"error": exc.code, "text": exc.text}
    return {"error": RuntimeFailed.code, "text": f"the guard can't keep its rules: {exc}"}


def _listen(folder: str) -> socket.socket:
    """Root's alone; by a short name, as socket paths are."""
    here = f"{folder}/{FOLDER}"
    os.makedirs(here, stat.S_IRWXU, exist_ok=True)
    fd = os.open(here, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        path = f"/proc/self/fd/{fd}/{SOCKET}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        listener.listen(4)
    finally:
        os.close(fd)
    return listener
