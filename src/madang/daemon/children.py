"""The two processes that the supervisor keeps alive. Standard library only.

Both are forks that leave the terminal, get SIGTERM when the supervisor dies, and write to a log of
their own. The launcher goes on in the fork; the server is executed anew as another user.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from madang.agent.launcher import main as launcher
from madang.agent.launcher.main import LauncherConfig
from madang.daemon import confine
from madang.daemon.logfile import redirect
from madang.daemon.state import Owner, StateFolder

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 5.0
STEADY_S: Final = 30.0
"""Who has lived this long starts again without a pause."""

_PASSED_ON: Final = ("LANG", "LC_", "TZ", "SSL_CERT_", "UV_", "PIP_", "PYTHON")
"""Beginnings of the variables that the server gets of our environment; others may be secrets."""
_PROXIES: Final = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"})
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Child:
    """One process that is started again when it dies."""

    def __init__(self, name: str, log: str, start: Callable[[], int]) -> None:
        self.name = name
        self.log = log
        self.pid = 0
        self.deaths = 0
        self.due: float | None = 0.0
        """When to start it; None while it runs."""
        self._start = start
        self._started = 0.0
        self._pause = 0.0

    def run(self) -> None:
        """Start it now."""
        self.pid, self._started, self.due = self._start(), time.monotonic(), None

    def ended(self, status: int) -> str:
        """Note the end and when to start again; says so in words."""
        now = time.monotonic()
        if now - self._started > STEADY_S:
            self._pause = 0.0
        self.pid, self.due = 0, now + self._pause
        self.deaths += 1
        again = f"starting it again in {self._pause:.1f} s" if self._pause else "starting it again"
        self._pause = min(max(FIRST_PAUSE_S, self._pause * 2), LONGEST_PAUSE_S)
        return f"{self.name} ended with {os.waitstatus_to_exitcode(status)}; {again}"

    def last_line(self) -> str:
        """The end of its log."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def fork_launcher(config: LauncherConfig, folder: StateFolder, close: socket.socket) -> int:
    """The launcher's pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _detach(parent, folder)
        close.detach()
        redirect(folder.join("launcher.log"))
        # Its keepers are ordinary users, like the server.
        _open_view([folder.path, *config.host_paths], config.server_uid)
        launcher.serve(config)
    except BaseException as exc:
        _last_words("launcher", exc)
    finally:
        os._exit(1)


def fork_server(
    settings: dict[str, Any], folder: StateFolder, user: Owner, listener: socket.socket, report: int
) -> int:
    """The server's pid. It listens on *listener* and writes one line to *report*."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _detach(parent, folder)
        fds = (memory_file(json.dumps(settings).encode()), listener.fileno(), report)
        _open_view([folder.path], user.uid)
        if user.uid != os.geteuid():
            confine.become(user.uid, user.gid)
            confine.die_with(parent)
        redirect(folder.join("server", "server.log"))
        for fd in fds:
            os.set_inheritable(fd, True)
        os.chdir("/")
        module = ("-P", "-m", "madang.daemon.server")
        os.execve(sys.executable, [sys.executable, *module, *map(str, fds)], _environment(folder))
    except BaseException as exc:
        _last_words("server", exc)
    finally:
        os._exit(1)


def _detach(parent: int, folder: StateFolder) -> None:
    """Leave the terminal and the supervisor's signals and lock; end when it ends."""
    os.setsid()
    confine.die_with(parent)
    signal.set_wakeup_fd(-1)
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    os.close(folder.lock)


def _open_view(also: list[str], uid: int) -> None:
    """Let *uid* pass to what it needs; nothing to do for ourselves."""
    if uid == os.geteuid():
        return
    paths = confine.needed_paths(also)
    closed = confine.closed_parents(paths, uid)
    if closed:
        confine.open_view(paths, closed)


def _environment(folder: StateFolder) -> dict[str, str]:
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PASSED_ON) or name.upper() in _PROXIES
    }
    if "PYTHONPATH" in passed:
        parts = passed["PYTHONPATH"].split(os.pathsep)
        passed["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in parts if p)
    return passed | {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": folder.join("server"),
        "MALLOC_ARENA_MAX": "2",  # threads would else reserve and keep memory of their own
        "OPENBLAS_NUM_THREADS": "1",  # numpy's: a thread for each processor, and no use for them
    }


def memory_file(data: bytes) -> int:
    """A descriptor from which *data* can be read."""
    fd = os.memfd_create("settings")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _last_words(name: str, exc: BaseException) -> None:
    print(f"{name} could not be started: {exc}", file=sys.stderr, flush=True)
