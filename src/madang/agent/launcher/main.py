"""The launcher's process: one socket, one thread, one loop."""

from __future__ import annotations

import gc
import hashlib
import os
import selectors
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NoReturn

from madang.agent.launcher import cgroups, checks, init, registry, rootless, scratch, syscalls
from madang.agent.launcher.filters import Filters, keeps
from madang.agent.launcher.kernels import Kernels
from madang.agent.launcher.mounts import Templates
from madang.agent.launcher.network.networks import NetworkConfig
from madang.agent.launcher.offers import DOCKER_SOCKET, RUNTIMES, Offers
from madang.agent.launcher.processes import say
from madang.agent.launcher.protocol import Frames, frame
from madang.agent.launcher.registry import Uids
from madang.agent.launcher.timers import Timers
from madang.wire.errors import InvalidRequest, PlatformError, TooLarge
from madang.wire.kernel import NATIVE
from madang.wire.network import NetworkMode

SOCKET: Final = "launcher.sock"
_MAX_CLIENTS: Final = 64
_MAX_WAITING_BYTES: Final = 4 * 1024 * 1024
"""Of answers that a client does not read: then its requests wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherConfig:
    """What the supervisor tells the launcher."""

    state: str
    """The state folder, absolute."""
    server_uid: int
    """Who may ask; as the host counts."""
    base_uid: int = 2_000_000_001
    """First uid of sessions (root only)."""
    uid_count: int = 100_000
    slots: int = 3
    """Ready for the next sessions."""
    scratch_pool: int = 2
    """Ready disks of the default size."""
    scratch_default_bytes: int = 10 * 1024**3
    host_paths: tuple[str, ...] = ()
    """Further folders of the host that sessions see, read-only."""
    widen: tuple[str, ...] = ()
    """Rules of the policy's base that an administrator's layer may widen on this machine."""
    runtime: str = NATIVE
    """Of sessions that don't choose one."""
    runtimes: tuple[str, ...] = RUNTIMES
    """What sessions may choose, where it is installed."""
    docker_socket: str = DOCKER_SOCKET
    warm_bytes: int = 0
    """The most that warm interpreters may use; see ``warm``. Root only."""
    accept_unkept: bool = False
    """Start sessions also where a rule of their policy can't be kept, with a warning."""
    network: NetworkConfig = field(default_factory=NetworkConfig)


def serve(config: LauncherConfig) -> NoReturn:
    """Never returns; ends the process. Raises HostLacks where sessions can't be isolated."""
    supervisor = os.getppid()
    registry.refuse_newer(f"{config.state}/kernels")
    owner_uid, owner_gid, uids = _become_root(config)
    syscalls.set_process_name("madang-launcher")
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not registry.rejoin(f"{config.state}/kernels", syscalls.CLONE_NEWNS):
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, b"/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    launcher = _Launcher(config, (owner_uid, owner_gid), uids)
    init.warm()
    gc.collect()
    gc.freeze()
    # Only now: each change of the effective user clears it.
    syscalls.die_with_parent(signal.SIGTERM)
    if os.getppid() == supervisor:
        launcher.run()
    os._exit(0)


def _become_root(config: LauncherConfig) -> tuple[int, int, Uids | None]:
    """(uid and gid of the server, uids for sessions), all as our user namespace counts."""
    if os.geteuid() == 0 and config.server_uid != 0:
        return config.server_uid, config.server_uid, Uids(config.base_uid, config.uid_count)
    if os.geteuid() == 0:
        return 0, 0, Uids(config.base_uid, config.uid_count)
    if registry.rejoin(f"{config.state}/kernels", syscalls.CLONE_NEWUSER):
        first, count = rootless.rejoined()
    else:
        first, count = rootless.enter()
    return 0, 0, Uids(first, count) if count else None


class _Launcher:
    def __init__(self, config: LauncherConfig, owner: tuple[int, int], uids: Uids | None) -> None:
        self._config = config
        self._owner = owner
        self._rootless = not cgroups.is_init_user_namespace()
        self._own_uids = uids is not None
        self._selector = selectors.DefaultSelector()
        self._timers = Timers()
        self._clients: set[_Client] = set()
        self._hierarchies = cgroups.detect(_group_name(config.state))
        images = not self._rootless and os.path.exists("/dev/loop-control")
        images = images and scratch.mkfs_path() is not None
        self._images = images
        self._offers = Offers(
            config.runtime,
            config.runtimes,
            rootless=self._rootless,
            docker_socket=config.docker_socket,
        )
        self._listener = _listen(f"{config.state}/run", owner)
        self._kernels = Kernels(
            state=config.state,
            owner=owner,
            uids=uids,
            ready_slots=config.slots,
            hierarchies=self._hierarchies,
            templates=Templates(config.state, rootless=self._rootless, extra=config.host_paths),
            pool=scratch.Pool(
                f"{config.state}/scratch-pool",
                default_bytes=config.scratch_default_bytes,
                ready=config.scratch_pool,
                images=images,
            ),
            selector=self._selector,
            timers=self._timers,
            filters=Filters(config.widen, accept_unkept=config.accept_unkept),
            offers=self._offers,
            network=config.network,
            mark=mark_of(config.state),
            rootless=self._rootless,
            warm_bytes=0 if self._rootless else config.warm_bytes,
            changed=self._push_change,
        )
        self._kernels.open()

    def run(self) -> NoReturn:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        while True:
            for key, events in self._selector.select(self._timers.wait_s()):
                if self._selector.get_map().get(key.fd) is key:
                    key.data(events)
            self._timers.run()

    def _accept(self, _events: int) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError as exc:
            say(f"launcher: {exc}")
            return
        if _peer_uid(link) not in {0, self._owner[0]} or len(self._clients) >= _MAX_CLIENTS:
            link.close()
            return
        client = _Client(link, self._selector, self._serve)
        self._clients.add(client)

    def _serve(self, client: _Client, message: dict[str, Any] | None) -> None:
        """One request; None: the client has gone."""
        if message is None:
            self._clients.discard(client)
            return
        number = message.pop("id", None)
        answer = partial(client.answer, number if isinstance(number, int) else 0)
        try:
            self._perform(message, answer)
        except PlatformError as exc:
            answer(exc)
        except Exception as exc:  # The request boundary: a bad request must not end us.
            where = exc.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            line = f"{where.tb_frame.f_code.co_qualname}:{where.tb_lineno}" if where else ""
            # Not the message: it holds the session's environment.
            say(f"launcher: a request failed in {line}: {exc!r}"[:2000])
            answer(PlatformError("the launcher failed; its log says more."))

    def _perform(self, message: dict[str, Any], answer: Callable[[Any], None]) -> None:
        op = checks.operation(message.pop("op", None))
        if op == "hello":
            answer(self._facts())
            return
        if op == "list":
            answer({"kernels": self._kernels.list()})
            return
        if op == "warm":
            answer(self._kernels.warmth())
            return
        kernel = checks.kernel_id(message.pop("kernel", None))
        kernels = self._kernels
        if op in {"prepare", "start", "run"}:
            getattr(kernels, op)(kernel, checks.kernel_spec(message.pop("spec", None)), answer)
        elif op == "guard":
            kernels.guard(kernel, checks.sandbox(message.pop("sandbox", None)), answer)
        elif op in {"freeze", "thaw"}:
            kernels.freeze(kernel, answer, frozen=op == "freeze")
        else:
            getattr(kernels, op)(kernel, answer)

    def _push_change(self, kernel: str) -> None:
        for client in list(self._clients):
            client.push({"changed": kernel})

    def _facts(self) -> dict[str, Any]:
        has = self._hierarchies.bases
        enforced = {
            "cpu": "cgroup" if "cpu" in has else "none",
            "mem": "cgroup" if "memory" in has else "watch",
            "pids": "cgroup" if "pids" in has else "none",
            "disk": "quota" if self._images else "watch",
            "time": "keeper",
            "network": "namespace",
            "uid": "own" if self._own_uids else "shared",
            "seccomp": "filter",
        }
        warnings = [text for key, text in _MENDS.items() if enforced[key] in {"none", "watch"}]
        return {
            "rootless": self._rootless,
            "enforced": enforced,
            "warnings": warnings,
            "capacity": _capacity(self._config.state),
            "runtimes": self._offers.names,
            "networks": self._networks(),
            "keeps": {name: keeps(name) for name in self._offers.names},
            "accepts_unkept": self._config.accept_unkept,
        }

    def _networks(self) -> list[str]:
        """Modes that sessions may have here."""
        none = str(NetworkMode.NONE)
        return [none] if self._rootless else sorted({none, *self._config.network.modes})


_MENDS: Final = {
    "cpu": "CPU limits are not held: no cpu control group can be used. Start `madang up` as root, "
    "or delegate one: `systemd-run --user --scope -p Delegate=yes madang up`.",
    "mem": "Memory limits are only watched, not held: no memory control group can be used. Start "
    "`madang up` as root; on a Raspberry Pi boot with `cgroup_enable=memory`.",
    "pids": "The number of processes is not limited: no pids control group can be used. Start "
    "`madang up` as root.",
    "disk": "Disk limits are only watched, not held: that takes root, loop devices and e2fsprogs.",
}


def _capacity(state: str) -> dict[str, Any]:
    disk = os.statvfs(state)
    with open("/proc/meminfo", encoding="ascii") as file:
        mem_bytes = int(file.readline().split()[1]) * 1024
    with open("/proc/sys/kernel/pid_max", encoding="ascii") as file:
        pids = int(file.read())
    return {
        "cpu": float(len(os.sched_getaffinity(0))),
        "mem_bytes": mem_bytes,
        "disk_bytes": disk.f_bavail * disk.f_frsize,
        "pids": pids,
    }


class _Client:
    """A connection of the server; non-blocking both ways."""

    def __init__(
        self,
        link: socket.socket,
        selector: selectors.BaseSelector,
        serve: Callable[[_Client, dict[str, Any] | None], None],
    ) -> None:
        link.setblocking(False)
        self._link = link
        self._selector = selector
        self._serve = serve
        self._frames = Frames()
        self._out: list[tuple[bytearray, socket.socket | None]] = []
        """What is to be sent; a socket goes with the first byte of its frame."""
        self._waiting = 0
        self._closed = False
        selector.register(link, selectors.EVENT_READ, self._ready)

    def answer(self, number: int, result: Any) -> None:
        """A result, an error, or a socket, to request *number*."""
        if isinstance(result, PlatformError):
            error = {"error": result.code, "text": result.text}
            self._send({"id": number, **error, "details": _plain(result.details)})
        elif isinstance(result, socket.socket):
            self._send({"id": number, "ok": {}}, result)
        else:
            self._send({"id": number, "ok": result})

    def push(self, message: dict[str, Any]) -> None:
        """A hint; dropped for a client that does not read."""
        if self._waiting < _MAX_WAITING_BYTES:
            self._send(message)

    def _send(self, message: dict[str, Any], attached: socket.socket | None = None) -> None:
        if self._closed:
            if attached is not None:
                attached.close()
            return
        data = bytearray(frame(message))
        self._out.append((data, attached))
        self._waiting += len(data)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                data, attached = self._out[0]
                fds = [attached.fileno()] if attached is not None else []
                sent = socket.send_fds(self._link, [data], fds, socket.MSG_NOSIGNAL)
                if attached is not None:
                    attached.close()
                del data[:sent]
                self._waiting -= sent
                if data:
                    self._out[0] = (data, None)
                else:
                    self._out.pop(0)
        except BlockingIOError:
            pass
        except OSError:
            self._close()
            return
        events = selectors.EVENT_READ * (self._waiting < _MAX_WAITING_BYTES)
        self._selector.modify(
            self._link, events | selectors.EVENT_WRITE * bool(self._out), self._ready
        )

    def _ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ and not self._closed:
            self._read()

    def _read(self) -> None:
        try:
            data = self._link.recv(256 * 1024)
            messages = self._frames.feed(data)
        except BlockingIOError:
            return
        except OSError:
            self._close()
            return
        except (InvalidRequest, TooLarge) as exc:
            self.answer(0, exc)
            self._close()
            return
        if not data:
            self._close()
            return
        for message in messages:
            self._serve(self, message)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._selector.unregister(self._link)
            self._link.close()
            for _, attached in self._out:
                if attached is not None:
                    attached.close()
            self._serve(self, None)


def _plain(details: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in details.items() if isinstance(value, str | int | float)}


def _peer_uid(link: socket.socket) -> int:
    data = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    uid: int = struct.unpack("iII", data)[1]
    return uid


def _group_name(state: str) -> str:
    return f"madang-{mark_of(state)}"


def mark_of(state: str) -> str:
    """Two state folders on one machine never share control groups, interfaces or rules."""
    return hashlib.sha256(os.path.realpath(state).encode()).hexdigest()[:12]


def _listen(folder: str, owner: tuple[int, int]) -> socket.socket:
    """The socket, made as the server's user: in its folder we must not act as root."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    os.makedirs(folder, 0o700, exist_ok=True)
    here = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    os.chown(f"/proc/self/fd/{here}", *owner)
    path = f"/proc/self/fd/{here}/{SOCKET}"
    mask = os.umask(0o177)
    os.setegid(owner[1])
    os.seteuid(owner[0])
    try:
        if os.path.lexists(path):
            os.unlink(path)
        listener.bind(path)
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.umask(mask)
        os.close(here)
    listener.listen(_MAX_CLIENTS)
    return listener
