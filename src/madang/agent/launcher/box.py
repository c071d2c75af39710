"""Sessions that Docker starts. The init's side.

Docker makes one container for the session, its *box*: namespaces, user, no capabilities, no new
privileges, a filter. Process 1 in it is an init of ours again (``guest``), which starts all
programs of the session as ``native``'s init does. So nothing goes through the engine once the
session has begun: no stream, no signal, no exec::

    keeper ── init ── lifeline ─┐   in the slot; waits for the end of the box
       └──────────── channel ── guest, process 1 in the box ── programs
    dockerd ── shim ────────────┘

Docker can't see our mounts, so the box begins with the host's ``/usr`` and our code; as long as
nothing but the guest is in it, a helper of the launcher (``boxes``) moves it into the session's
control group and gives it the session's root, the same as for every runtime.

    init    POST containers/create, start
    guest   connects to our door, with a pidfd of itself
    init    → keeper → launcher: the pidfd, and a socket for the answer
    helper  group, root; then the network
    init    gives up its powers
            → guest: the keeper's channel, the lifeline, the order; and waits for its end

Whatever is killed: the init dies with the keeper, the guest with the init, all programs with the
guest, and the engine removes a box that has ended. One that never began is removed by the launcher.
"""

from __future__ import annotations

import io
import os
import select
import shutil
import signal
import socket
import struct
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import madang
from madang.agent.launcher import channel, seccomp, syscalls
from madang.agent.launcher.engine import Engine, EngineFailed
from madang.agent.launcher.order import Order, View

FOLDER: Final = "box"
"""In the folder of mounts: a door for each start under way."""
DOOR: Final = "/madang/door"
CODE: Final = "/madang/code"
NEW_ROOT: Final = "/mnt"
"""Where the session's root appears in the box, to become its root."""
LABEL: Final = "madang.launcher"
NAME: Final = "madang.box"
"""Another, with the container's name: dead ones have lost it."""
IMAGE: Final = "madang-box:1"
"""Folders and nothing else; made where it is missing."""
_IMAGE_FOLDERS: Final = ("dev", "etc", "madang", "mnt", "proc", "sys", "tmp", "usr")
_HOST_FOLDERS: Final = ("bin", "lib", "lib32", "lib64", "libx32", "usr")
"""What a Python of the machine needs to start."""
BEGIN_S: Final = 25.0
"""For the box to be there. The launcher gives up somewhat later."""
_LOOK_S: Final = 0.5
_NAMESPACES: Final = syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
_GUEST: Final = (
    f"import sys; sys.path.insert(0, {CODE!r}); from madang.agent.launcher import guest; "
    "guest.main()"
)


class BoxFailed(Exception):
    """The session can't begin, in words."""


def run(link: socket.socket, order: Order) -> None:
    """Begin the session, then wait for the end of its box."""
    assert order.view is not None
    lifeline, held = os.pipe2(os.O_CLOEXEC)
    try:
        guest = _begin(link, order, order.view, lifeline)
    except (BoxFailed, EngineFailed, OSError) as exc:
        channel.send(link, {"failed": f"docker: {exc}"[:1000]})
        return
    link.close()
    poll = select.poll()
    poll.register(guest, select.POLLIN)
    poll.poll()
    os.close(held)


def _begin(link: socket.socket, order: Order, view: View, lifeline: int) -> int:
    """A pidfd of the guest, in whose hands the session is now."""
    late = time.monotonic() + BEGIN_S
    engine = Engine(order.runtime_program)
    with _door(order, view) as (path, listener):
        _create(engine, order, configuration(order, path))
        engine.post(f"/containers/{order.box}/start")
        door = _opened(engine, order, listener, late)
    with door:
        door.settimeout(max(0.001, late - time.monotonic()))
        message, fds = channel.receive(door)
        if message is None or len(fds) != 1:
            raise BoxFailed("its first process said nothing sensible")
        guest = fds[0]
        syscalls.setns(guest, _NAMESPACES)
        _be_admitted(link, guest, late)
        memory = channel.to_memory(order.to_json())
        _seal(order, guest)
        channel.send(door, {"begin": True}, [link.fileno(), lifeline, memory])
        os.close(memory)
        os.close(lifeline)
        answer, _ = channel.receive(door)
        if answer is None or "failed" in answer:
            told = "it was killed" if answer is None else answer["failed"]
            raise BoxFailed(f"its first process can't go on: {told}")
    return guest


def _seal(order: Order, guest: int) -> None:
    """See what the session sees, and be able to do nothing, before anything of it runs."""
    program = seccomp.program()
    syscalls.setns(guest, syscalls.CLONE_NEWNS)
    syscalls.drop_bounding_set()
    os.setgroups([])
    os.setresgid(order.uid, order.uid, order.uid)
    os.setresuid(order.uid, order.uid, order.uid)
    syscalls.drop_capabilities()
    syscalls.die_with_parent(signal.SIGKILL)
    syscalls.no_new_privileges()
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    seccomp.install(program)


@contextmanager
def _door(order: Order, view: View) -> Iterator[tuple[str, socket.socket]]:
    """(path, listener) of a socket to which the session's uid alone can connect."""
    folder = f"{os.path.dirname(view.root)}/{FOLDER}/{order.box}"
    os.mkdir(folder, 0o700)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as listener:
            here = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            listener.bind(f"/proc/self/fd/{here}/door")  # A path may have 107 bytes.
            os.close(here)
            os.chown(f"{folder}/door", order.uid, order.uid)
            os.chmod(f"{folder}/door", 0o600)
            listener.listen(1)
            yield f"{folder}/door", listener
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _create(engine: Engine, order: Order, config: dict[str, Any]) -> None:
    path = f"/containers/create?name={order.box}"
    try:
        engine.post(path, config)
    except EngineFailed as exc:
        if exc.status != 404:
            raise
        repository, _, tag = IMAGE.partition(":")
        engine.post(f"/images/create?fromSrc=-&repo={repository}&tag={tag}", _image())
        engine.post(path, config)


def _opened(engine: Engine, order: Order, listener: socket.socket, late: float) -> socket.socket:
    """The guest's connection; breaks off if its process has ended."""
    listener.settimeout(_LOOK_S)
    while True:
        try:
            door, _ = listener.accept()
        except TimeoutError:
            _check_runs(engine, order)
            if time.monotonic() > late:
                raise BoxFailed(f"not ready after {BEGIN_S:.0f} s") from None
            continue
        if _peer_uid(door) == order.uid:
            return door
        door.close()


def _check_runs(engine: Engine, order: Order) -> None:
    code = ""
    try:
        state = engine.get(f"/containers/{order.box}/json")["State"]
        if state["Status"] in {"created", "running"}:
            return
        code = f" with {state['ExitCode']}"
    except EngineFailed as exc:
        if exc.status != 404:
            raise
    raise BoxFailed(
        f"its first process ended{code}. Does the engine run on this machine, with the same /usr?"
    )


def _be_admitted(link: socket.socket, guest: int, late: float) -> None:
    """Wait for the launcher's word that the box has its group, root and network."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            channel.send(link, {"guest": True}, [guest, theirs.fileno()])
        ours.settimeout(max(0.001, late - time.monotonic()))
        if not ours.recv(1):
            raise BoxFailed("the launcher has left")


def _peer_uid(link: socket.socket) -> int:
    uid: int = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return uid


def _image() -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        for name in _IMAGE_FOLDERS:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
    return memory.getvalue()


def configuration(order: Order, door: str) -> dict[str, Any]:
    """Of the container, as ``containers/create`` takes it."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    mark = order.box.split("-")[1]
    return {
        "Image": IMAGE,
        "Entrypoint": [],
        "Cmd": [python, "-I", "-S", "-B", "-c", _GUEST],
        "User": f"{order.uid}:{order.uid}",
        "Env": [f"PATH={os.path.dirname(python)}"],
        "WorkingDir": "/",
        "Hostname": order.spec.hostname,
        "StopSignal": "SIGKILL",  # The guest hears no other; who stops boxes need not wait.
        "Labels": {LABEL: mark, NAME: order.box, "madang.kernel": order.kernel},
        "HostConfig": {
            "AutoRemove": True,
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "none"},
            "NetworkMode": "none",
            "IpcMode": "private",
            "CgroupnsMode": "private",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges", f"seccomp={order.profile}"],
            "ReadonlyRootfs": True,
            "Init": False,
            "Mounts": [
                *(_bound(path, path) for path in _host_folders(python)),
                _bound(os.path.dirname(os.path.abspath(madang.__file__)), f"{CODE}/madang"),
                _bound(door, DOOR),
            ],
        },
    }


def _host_folders(python: str) -> list[str]:
    found = [f"/{name}" for name in _HOST_FOLDERS if os.path.isdir(f"/{name}")]
    if not python.startswith("/usr/"):
        found.append(sys.base_prefix)
    return found


def _bound(source: str, target: str) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": source,
        "Target": target,
        "ReadOnly": True,
        "BindOptions": {"Propagation": "rprivate"},
    }
