"""``madang up``: keeps a launcher and a server alive; no input but signals.

Executed as ``python -P -m madang.daemon.supervisor FD`` with the settings in a memory file, so that
little is imported: the launcher and all sandboxes are forks of this process. It holds the listening
socket, so that callers wait, not fail, while a server is started again. Standard library only.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import madang
from madang.agent.launcher import mounts
from madang.agent.launcher.main import LauncherConfig
from madang.agent.launcher.network.networks import NetworkConfig
from madang.daemon.children import Child, fork_launcher, fork_server
from madang.daemon.logfile import redirect
from madang.daemon.state import Owner, Running, StateFolder, born
from madang.daemon.sweeping import sweep, waiting_sandboxes
from madang.wire import exits
from madang.wire.errors import ConfigInvalid, HostLacks, PlatformError, PortTaken, from_problem
from madang.wire.size import GIB

STOP_SERVER_S: Final = 12.0
STOP_LAUNCHER_S: Final = 5.0
READY_S: Final = 60.0
FRUITLESS_STARTS: Final = 3
WARM_SHARE: Final = 16
MOST_WARM: Final = 2 * GIB
"""A child that died so often before all was ready will never be."""
FILES: Final = 65536
"""Descriptors that server and launcher may hold: several for each session and connection."""


class Supervisor:
    """Start, watch, start again, stop."""

    def __init__(
        self, settings: dict[str, Any], folder: StateFolder, user: Owner, registries: str
    ) -> None:
        self.folder = folder
        self.ready = False
        self._settings = settings
        self._registries = registries
        self._user = user
        self._listener = listen(settings["server"]["host"], settings["server"]["port"])
        host, port = self._listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._launcher = Child("launcher", folder.join("launcher.log"), self._start_launcher)
        self._server = Child("server", folder.join("server", "server.log"), self._start_server)
        self._children = (self._launcher, self._server)
        self._stopping = False
        self._report = -1
        """The server's word is read from here; -1 once it was heard."""
        self._heard = b""
        self._wake = self._take_signals()

    def run(self, announce: Callable[[], None]) -> None:
        """Until a signal; *announce* is called once, when the server is ready for the first time.

        Raises what made the first start impossible.
        """
        begin, announced = time.monotonic(), False
        try:
            while not self._stopping:
                self._start_due()
                self._wait()
                if self.ready and not announced:
                    announce()
                    announced = True
                elif not announced:
                    self._check_hope(begin)
        finally:
            self._end(self._server, STOP_SERVER_S)
            sandboxes = waiting_sandboxes(self._launcher.pid, self.folder.path)
            self._end(self._launcher, STOP_LAUNCHER_S)
            sweep(sandboxes, self.folder.path)
            self._listener.close()

    def _take_signals(self) -> int:
        wake, wake_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        return wake

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _start_due(self) -> None:
        for child in self._children:
            if child.due is not None and child.due <= time.monotonic():
                child.run()
                self._tell()

    def _start_launcher(self) -> int:
        config = launcher_config(self._settings, self.folder.path, self._user)
        return fork_launcher(config, self.folder, self._listener)

    def _start_server(self) -> int:
        if self._report >= 0:
            os.close(self._report)
        self._report, report_in = os.pipe2(os.O_CLOEXEC)
        self._heard = b""
        word = {
            "settings": self._settings,
            "token_wanted": not self.folder.read_token(),
            "registries": self._registries,
        }
        try:
            return fork_server(word, self.folder, self._user, self._listener, report_in)
        finally:
            os.close(report_in)

    def _tell(self) -> None:
        """For ``down`` and ``doctor``."""
        pids = [os.getpid(), *(child.pid for child in self._children if child.pid)]
        (me, since), *children = [(pid, born(pid) or 0) for pid in pids]
        url = self.url if self.ready else ""
        self.folder.tell(Running(pid=me, born=since, url=url, children=tuple(children)))

    def _wait(self) -> None:
        """Until something happens: a signal, a dead child, the server's word, a due start."""
        waits = [child.due - time.monotonic() for child in self._children if child.due is not None]
        timeout = max(0.0, min(waits)) if waits else (None if self.ready else 1.0)
        readers = [self._wake] if self._report < 0 else [self._wake, self._report]
        readable, _, _ = select.select(readers, [], [], timeout)
        if self._wake in readable:
            os.read(self._wake, 4096)
        if self._report in readable:
            self._hear()
        self._reap()

    def _hear(self) -> None:
        """The server's one line: ready, with a token if there was none, or why not."""
        data = os.read(self._report, 65536)
        self._heard += data
        if data and b"\n" not in data:
            return
        os.close(self._report)
        self._report = -1
        if not data:
            return
        word = json.loads(self._heard)
        if word["op"] == "failed":
            if not self.ready:
                raise from_problem(word["code"], word["text"], {})
            say(f"server: {word['text']}")
            return
        if word["token"]:
            self.folder.write_token(word["token"])
        self.ready = True
        self._tell()

    def _reap(self) -> None:
        for child in self._children:
            if child.pid:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    say(child.ended(status))

    def _check_hope(self, begin: float) -> None:
        """Raise if the first start will not succeed any more."""
        for child in self._children:
            if child.deaths >= FRUITLESS_STARTS:
                text = f"the {child.name} does not start: {child.last_line()} (log: {child.log})"
                raise HostLacks(text)
        if time.monotonic() - begin > READY_S:
            raise PlatformError(
                f"the server was not ready after {READY_S:.0f} s: {self._server.last_line()} "
                f"(log: {self._server.log})"
            )

    def _end(self, child: Child, patience_s: float) -> None:
        """SIGTERM, wait, SIGKILL."""
        if not child.pid:
            return
        fd = os.pidfd_open(child.pid)
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            if not select.select([fd], [], [], patience_s)[0]:
                say(f"{child.name} did not leave within {patience_s:.0f} s; killed")
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        finally:
            os.close(fd)
            child.pid = 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortTaken, ConfigInvalid."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except PermissionError as exc:
        raise ConfigInvalid(f"port {port}: only root may use it; choose another.") from exc
    except OSError as exc:
        if exc.errno == 98:
            text = f"port {port} on {host} is in use. Choose another: `madang up --port N`; 0 takes"
            raise PortTaken(f"{text} any free one.", port=port) from exc
        raise ConfigInvalid(f"can't listen on {host}: {exc.strerror or exc}.") from exc


def launcher_config(settings: dict[str, Any], state: str, user: Owner) -> LauncherConfig:
    """What the launcher is told."""
    node = settings["node"]
    return LauncherConfig(
        state=state,
        server_uid=user.uid,
        base_uid=settings["server"]["uid"] + 1,
        uid_count=node["uid_count"],
        slots=node["slots"],
        warm_bytes=_warm_bytes(node["warm_memory_bytes"]),
        scratch_pool=node["scratch_pool"],
        scratch_default_bytes=settings["defaults"]["disk_bytes"],
        host_paths=tuple(node["host_paths"]),
        runtime=node["runtime"],
        runtimes=tuple(node["runtimes"]),
        docker_socket=node["docker_socket"],
        widen=tuple(settings["sandbox"]["widen"]),
        accept_unkept=settings["sandbox"]["accept_unkept"],
        network=NetworkConfig.of(settings["network"]),
    )


def _warm_bytes(asked: int | None) -> int:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total // WARM_SHARE, MOST_WARM) if asked is None else asked


def main() -> None:
    """The process: word from ``madang up`` in, exit code out."""
    with open(int(sys.argv[1]), "rb") as file:
        word = json.load(file)
    os.umask(0o022)
    _allow_files()
    verdict = -1
    if word["detach"]:
        verdict = _go_to_background()
    try:
        _run(word, verdict)
    except PlatformError as exc:
        text = f"error: {exc.text}\n       more: madang explain {exc.code}"
        print(text, file=sys.stderr, flush=True)
        sys.exit(exits.of_error(exc))


def _run(word: dict[str, Any], verdict: int) -> None:
    settings = word["settings"]
    if settings["server"]["runtime"] == "native" and not mounts.root_is_mount():
        raise HostLacks(f"{mounts.CHROOT_TEXT}. {mounts.CHROOT_MEND}")
    root = os.geteuid() == 0
    user = Owner(*[settings["server"]["uid"]] * 2) if root else Owner(os.geteuid(), os.getegid())
    folder = StateFolder.open(settings["server"]["state"], server=user)
    try:
        supervisor = Supervisor(settings, folder, user, word["registries"])

        def announce() -> None:
            told = save_client(word["client"], supervisor.url, folder.join("token"))
            print(_welcome(supervisor, told, time.time() - word["at"]), flush=True)
            if verdict >= 0:
                redirect(folder.join("supervisor.log"))
                os.write(verdict, b"ready")
                os.close(verdict)

        gc.collect()
        gc.freeze()
        supervisor.run(announce)
    finally:
        folder.close()


def _go_to_background() -> int:
    """Fork: the child goes on, and says by a pipe when it is ready; the parent exits then."""
    verdict, verdict_in = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(verdict)
        os.setsid()
        return verdict_in
    os.close(verdict_in)
    try:
        ready = os.read(verdict, 16) == b"ready"
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        os._exit(130)
    # The child has said why, and leaves with the code for it.
    os._exit(0 if ready else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


def save_client(path: str, url: str, token_file: str) -> bool:
    """Make *url* the server of this user's commands; whether that could be written."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            # A JSON string is a TOML string too.
            file.write(f"url = {json.dumps(url)}\ntoken_file = {json.dumps(token_file)}\n")
        os.replace(temporary, path)
    except OSError as exc:
        say(f"{path}: {exc.strerror}; tell commands of this server with MADANG_URL and `login`")
        return False
    return True


def _welcome(supervisor: Supervisor, told: bool, seconds: float) -> str:
    folder = supervisor.folder
    first = "" if told else f"MADANG_URL={supervisor.url} "
    return (
        f"✓ Madang {madang.__version__} is ready: {supervisor.url}  ({seconds:.1f} s)\n"
        f"  state  {folder.path}\n"
        f"  token  {folder.join('token')}  (only you can read it)\n"
        f"  next   {first}madang run -- python3 -c 'print(\"hello\")'"
    )


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def say(text: str) -> None:
    """One line of ours, with its time."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
