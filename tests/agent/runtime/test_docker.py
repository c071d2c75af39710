"""Sessions in boxes that Docker makes: what they are given, who may say what, deaths."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from madang.agent.launcher import box, boxes, engine, guest, main, registry
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.engine import Engine, EngineFailed
from madang.agent.launcher.offers import DOCKER, Offers
from madang.agent.launcher.order import Order
from madang.testing.docker import Docker, docker_daemon, missing
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import (
    PYTHON,
    ChosenRuntime,
    Launcher,
    Sessions,
    open_launcher,
    spec,
)
from madang.testing.sessions import sessions as open_sessions
from madang.wire.errors import RuntimeFailed, RuntimeNotOffered
from madang.wire.kernel import NATIVE, KernelId
from madang.wire.session import Reason
from madang.wire.size import MIB

UID = 2_000_073_000
needs_docker = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def launcher(docker: Docker) -> Iterator[Launcher]:
    with open_launcher(docker_socket=docker.socket) as found:
        yield found


@pytest.fixture
async def sessions(launcher: Launcher, docker: Docker) -> AsyncIterator[Sessions]:
    async with open_sessions(ChosenRuntime(launcher, DOCKER), launcher) as found:
        yield found
    await docker.wait_empty()


def record_of(sessions: Sessions, kernel: KernelId) -> registry.Record:
    found = registry.load(sessions.runtime.kernel_dir(kernel))
    assert found is not None
    return found


def only_box(docker: Docker) -> dict[str, Any]:
    (found,) = docker.containers()
    inspected: dict[str, Any] = docker.engine.get(f"/containers/{found['Id']}/json")
    return inspected


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# -- what the box is given -----------------------------------------------------------------------


async def test_docker_is_asked_for_as_little_as_possible(
    sessions: Sessions, docker: Docker
) -> None:
    kernel = await sessions.start("/bin/sleep", "1000")
    found, uid = only_box(docker), record_of(sessions, kernel).uid
    asked = found["HostConfig"]

    assert found["Config"]["User"] == f"{uid}:{uid}"
    assert found["Config"]["Labels"]["madang.kernel"] == str(kernel)
    assert asked["CapDrop"] == ["ALL"]
    assert not asked["CapAdd"] and not asked["Privileged"] and not asked["Binds"]
    assert asked["ReadonlyRootfs"] and asked["AutoRemove"]
    assert (asked["NetworkMode"], asked["IpcMode"]) == ("none", "private")
    assert (asked["PidMode"], asked["UTSMode"], asked["CgroupnsMode"]) == ("", "", "private")
    assert asked["SecurityOpt"][0] == "no-new-privileges"
    assert asked["SecurityOpt"][1].startswith("seccomp={")
    assert all(each["ReadOnly"] for each in asked["Mounts"])


async def test_none_of_its_processes_has_powers_and_all_are_in_its_group(
    sessions: Sessions, docker: Docker
) -> None:
    kernel = await sessions.start("/bin/sleep", "1000")
    record = record_of(sessions, kernel)
    assert record.group is not None
    pids = record.group.processes()

    assert len(pids) == 3  # The slot's init, the guest, the program.
    assert only_box(docker)["State"]["Pid"] in pids
    for pid in pids:
        status = status_of(pid)
        assert status["Uid"].split() == [str(record.uid)] * 4
        assert {status[f"Cap{which}"] for which in ("Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert record.init is not None
    for name in ("net", "mnt", "ipc", "uts"):  # Whoever looks for them finds the session's.
        seen = {os.readlink(f"/proc/{pid}/ns/{name}") for pid in pids}
        assert len(seen) == 1, name


async def test_its_programs_see_what_native_s_see(sessions: Sessions, launcher: Launcher) -> None:
    """And nothing of what the box began with."""
    look = ("/bin/sh", "-c", "cat /proc/self/mountinfo; ls -A / /mnt /madang /dev; id; env | sort")
    done = await sessions.run(*look)
    async with open_sessions(ChosenRuntime(launcher, NATIVE)) as native:
        other = await native.run(*look)

    assert done.code == other.code == 0
    assert plain(done.out) == plain(other.out)
    assert not list((launcher.state / "mounts" / box.FOLDER).iterdir())


def plain(text: bytes) -> list[str]:
    """Without numbers of mounts and devices, the session's own uid and folders."""
    mount = re.compile(r"^\d+ \d+ \d+:\d+ \S+ (.*) - (\S+).*$", re.MULTILINE)
    found = mount.sub(r"\1 \2", text.decode())
    return sorted(re.sub(r"20\d{8}|s\d+-\w{6}|MADANG_SESSION=\w*", "N", found).splitlines())


async def test_a_small_session_has_all_of_its_size(sessions: Sessions) -> None:
    """The engine's own processes, and our guest's beginning, are not the session's."""
    code = """
import os, time
for _ in range(3):
    if not os.fork(): time.sleep(1000)
print("three")
os.fork()
"""
    done = await sessions.python(code, mem_bytes=16 * MIB, pids=4)

    assert (done.out, done.code) == (b"three\n", 1)
    assert done.ended.reason is Reason.PIDS


# -- whom it believes ----------------------------------------------------------------------------

KEPT = """Pid:\t1
Uid:\t5\t5\t5\t5
Gid:\t5\t5\t5\t5
Groups:\t
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t0000000000000000
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Pid:\t1", "Pid:\t7", "first process"),
        ("Uid:\t5\t5", "Uid:\t5\t0", "runs as"),
        ("Gid:\t5", "Gid:\t0", "runs as"),
        ("Groups:\t", "Groups:\t5 27", "groups 5 27"),
        ("CapBnd:\t0", "CapBnd:\t1", "left in CapBnd"),
        ("CapAmb:\t0", "CapAmb:\t1", "left in CapAmb"),
        ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "new privileges"),
        ("Seccomp:\t2", "Seccomp:\t0", "no filter"),
    ],
)
def test_a_box_that_is_not_as_asked_for_runs_nothing(old: str, new: str, words: str) -> None:
    assert guest.unkept(5, KEPT) == ""
    assert words in guest.unkept(5, KEPT.replace(old, new, 1))


def order(uid: int = UID, **more: Any) -> Order:
    group = Group(version=1, paths={"memory": "/no/such/group"})
    return Order(
        kernel="0123456789abcdef.1",
        spec=spec("/bin/true"),
        io="io",
        scratch="scratch",
        scratch_enforced="quota",
        group=group,
        cpus=[],
        uid=uid,
        **more,
    )


def test_no_process_but_the_session_s_own_is_admitted(tmp_path: Path) -> None:
    """A keeper in a hostile server's hands may send anything: root's processes, the launcher."""
    process = subprocess.Popen(["/bin/sleep", "1000"])
    other = os.pidfd_open(process.pid)
    try:
        with open(tmp_path / "file", "w") as file:
            for fd in (other, file.fileno()):
                with pytest.raises(RuntimeFailed, match="not the session's"):
                    boxes._admit(fd, order(), str(tmp_path))
        process.kill()
        process.wait()
        with pytest.raises(RuntimeFailed, match="not the session's"):
            boxes._admit(other, order(os.geteuid()), str(tmp_path))
    finally:
        process.kill()
        process.wait()
        os.close(other)


def test_word_is_given_to_whatever_there_is_without_waiting(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, open(tmp_path / "file", "w") as file, open("/dev/null") as nothing:
        with pytest.raises(BlockingIOError):
            while True:
                ours.send(b"x" * 4096)
        for fd in (ours.fileno(), file.fileno(), nothing.fileno()):
            word = boxes.Word(os.dup(fd))
            word.give()
            word.withdraw()
        assert (tmp_path / "file").read_bytes() == b""


# -- the engine as a partner ---------------------------------------------------------------------


@contextmanager
def partner(path: Path, behave: Callable[[socket.socket], None]) -> Iterator[None]:
    """An engine that does something else."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen()

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            with link:
                try:
                    behave(link)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def says(text: bytes) -> Callable[[socket.socket], None]:
    def behave(link: socket.socket) -> None:
        request_of(link)
        link.sendall(text)

    return behave


def hang(link: socket.socket) -> None:
    request_of(link)
    link.recv(1)  # Until the other side has had enough.


def without_end(link: socket.socket) -> None:
    request_of(link)
    link.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        link.sendall(b"[" * 65536)


def request_of(link: socket.socket) -> tuple[bytes, bytes]:
    """(head, body)"""
    data = b""
    while b"\r\n\r\n" not in data:
        data += link.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
    while len(body) < length:
        body += link.recv(65536)
    return head, body


def lies(docker: Docker, changed: dict[str, Any]) -> Callable[[socket.socket], None]:
    """Makes containers otherwise than it was asked to."""

    def behave(link: socket.socket) -> None:
        head, body = request_of(link)
        if head.startswith(b"POST /containers/create"):
            config = json.loads(body)
            for name, value in changed.items():
                (config if name in config else config["HostConfig"])[name] = value
            body = json.dumps(config).encode()
            head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
        with socket.socket(socket.AF_UNIX) as real:
            real.connect(docker.socket)
            real.sendall(head + b"\r\n\r\n" + body)
            while part := real.recv(65536):
                link.sendall(part)

    return behave


@needs_docker
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"CapDrop": []}, "capabilities are left in CapBnd"),
        ({"SecurityOpt": ["seccomp=unconfined"]}, "new privileges can be had"),
        ({"SecurityOpt": ["no-new-privileges", "seccomp=unconfined"]}, "there is no filter"),
        ({"GroupAdd": ["27"]}, "it has the groups 27"),
        ({"User": "0:0"}, "its first process"),
        ({"PidMode": "host"}, "not the first process"),
        ({"Cmd": ["/usr/bin/false"]}, "its first process ended"),
    ],
    ids=str,
)
async def test_a_lying_engine_starts_nothing(
    docker: Docker, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    with (
        partner(tmp_path / "s", lies(docker, changed)),
        open_launcher(docker_socket=f"{tmp_path}/s") as launcher,
    ):
        async with open_sessions(ChosenRuntime(launcher, DOCKER), launcher) as found:
            with pytest.raises(RuntimeFailed, match=words):
                await found.start("/bin/true")
    await docker.wait_empty()


ANSWERED = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (says(b""), "does not answer"),
        (says(b"garbage"), "does not answer"),
        (says(b"HTTP/1.0 x OK\r\n\r\n"), "does not answer"),
        (hang, "does not answer"),
        (without_end, "without end"),
        (says(b'HTTP/1.0 500 No\r\n\r\n{"message": "no space left"}'), "no space left"),
        (says(b"HTTP/1.0 404 No\r\n\r\n[1]"), "status 404"),
    ],
    ids=["nothing", "garbage", "no status", "hangs", "endless", "words", "no words"],
)
def test_a_bad_engine_is_an_error_in_words(
    tmp_path: Path, behave: Callable[[socket.socket], None], words: str
) -> None:
    with partner(tmp_path / "s", behave):
        with pytest.raises(EngineFailed, match=words):
            Engine(f"{tmp_path}/s", call_s=0.5).post("/containers/create", {})


@pytest.mark.skipif(os.geteuid() != 0, reason="the socket must be root's")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"[]", "no Docker engine"),
        (b'{"ApiVersion": "1.40"}', "API 1.40 is too old"),
        (b'{"ApiVersion": "new"}', "too old"),
        (b'{"ApiVersion": "1.44", "SecurityOptions": []}', "without seccomp"),
        (b'{"ApiVersion": "1.44", "SecurityOptions": ["name=rootless"]}', "rootless"),
        (b'{"ApiVersion": "1.44", "SecurityOptions": ["name=userns,x"]}', "maps users"),
    ],
)
def test_an_engine_that_can_not_be_used_is_not_offered(
    tmp_path: Path, answer: bytes, words: str
) -> None:
    with partner(tmp_path / "s", says(ANSWERED + answer)):
        found = Offers("native", (DOCKER,), rootless=False, docker_socket=f"{tmp_path}/s")
    assert words in found.missing[DOCKER]
    with pytest.raises(RuntimeNotOffered, match=words):
        found.of(spec("/bin/true", runtime=DOCKER))


@pytest.mark.skipif(os.geteuid() != 0, reason="the socket must be root's")
def test_a_socket_of_others_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "s"
    good = ANSWERED + b'{"ApiVersion": "1.41", "SecurityOptions": ["name=seccomp"]}'

    assert "node.docker_socket" in engine.find(str(path))
    with partner(path, says(good)):
        assert engine.find(str(path)) == ""
        path.chmod(0o666)
        assert "root alone" in engine.find(str(path))
        path.chmod(0o600)
        os.chown(path, UID, UID)
        assert "root alone" in engine.find(str(path))
    assert "root alone" in engine.find("/dev/null")


# -- deaths --------------------------------------------------------------------------------------


def shim_of(pid: int) -> int:
    return int(status_of(pid)["PPid"])


@pytest.mark.parametrize("who", ["keeper", "init", "guest", "shim"])
async def test_killing_any_of_its_processes_ends_it_all(
    sessions: Sessions, docker: Docker, who: str
) -> None:
    kernel = await sessions.start("/bin/sh", "-c", "setsid sleep 1000 & echo on; sleep 1000")
    await sessions.until(kernel, b"on")
    first = only_box(docker)["State"]["Pid"]
    record = record_of(sessions, kernel)
    assert record.keeper is not None and record.init is not None
    pids = {"keeper": record.keeper.pid, "init": record.init.pid}
    pids |= {"guest": first, "shim": shim_of(first)}

    os.kill(pids[who], signal.SIGKILL)
    await asyncio.wait_for(_ended(sessions, kernel), PATIENCE_S)
    ended = await sessions.runtime.settle(kernel)

    assert ended.reason in {Reason.LOST, Reason.SIGNAL}  # `sessions` sees that nothing is left.


async def _ended(sessions: Sessions, kernel: KernelId) -> None:
    while any(each.kernel == kernel and each.running for each in await sessions.runtime.adopt()):
        await sessions.runtime.wait_change()


async def test_a_frozen_session_can_be_killed(sessions: Sessions) -> None:
    kernel = await sessions.start(*PYTHON, "import time; print('on', flush=True); time.sleep(99)")
    await sessions.until(kernel, b"on")
    await sessions.runtime.freeze(kernel)

    ended = await asyncio.wait_for(sessions.runtime.settle(kernel), PATIENCE_S)

    assert ended.signal == signal.SIGKILL


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[tuple[Docker, Launcher, Sessions]]:
    """With an engine and a launcher that may be killed."""
    if why := missing():
        pytest.skip(why)
    with docker_daemon() as docker, open_launcher(docker_socket=docker.socket) as launcher:
        async with open_sessions(ChosenRuntime(launcher, DOCKER), launcher) as found:
            yield docker, launcher, found
        await docker.wait_empty()


async def test_a_session_outlives_launcher_and_engine(
    own: tuple[Docker, Launcher, Sessions],
) -> None:
    """Nothing goes through the engine; its next one, as is its way, ends what it finds."""
    docker, launcher, sessions = own
    kernel = await sessions.start("/bin/sh", "-c", "read x; echo $x; exit 5", stdin=True)
    other = await sessions.start("/bin/sleep", "1000")
    launcher.kill()
    docker.kill()
    launcher.start()

    found = await sessions.runtime.adopt()
    more = await sessions.exec(kernel, "e1", "/bin/echo", "still here")
    await sessions.runtime.freeze(kernel)
    await sessions.runtime.thaw(kernel)
    feed = await sessions.keepers.stdin(sessions.io(kernel))
    await feed.write(b"y\n")
    done = await sessions.outcome(kernel)
    await feed.close()

    assert {each.enforced["runtime"] for each in found} == {DOCKER}
    assert more.out == b"still here\n"
    assert (done.out, done.code) == (b"y\n", 5)

    with pytest.raises(RuntimeNotOffered, match="does not answer"):
        await sessions.start("/bin/true")
    docker.start()
    await asyncio.wait_for(_ended(sessions, other), PATIENCE_S)
    assert (await sessions.runtime.settle(other)).reason in {Reason.LOST, Reason.SIGNAL}


async def test_without_its_engine_no_session_starts_and_with_it_again_it_does(
    own: tuple[Docker, Launcher, Sessions],
) -> None:
    docker, _, sessions = own
    asked = spec("/bin/true")
    kernel = await sessions.prepare(asked)
    docker.stop()

    with pytest.raises(RuntimeFailed, match="Docker does not answer at"):
        await sessions.runtime.start(kernel, asked)
    docker.start()
    await sessions.runtime.start(kernel, asked)

    assert (await sessions.outcome(kernel)).code == 0


async def test_a_start_that_hangs_in_the_engine_can_be_ended(
    own: tuple[Docker, Launcher, Sessions],
) -> None:
    docker, launcher, sessions = own
    asked = spec("/bin/true")
    kernel = await sessions.prepare(asked)
    assert docker.process is not None
    docker.process.send_signal(signal.SIGSTOP)
    try:
        start = asyncio.create_task(sessions.runtime.start(kernel, asked))
        async with asyncio.timeout(PATIENCE_S):
            while record_of(sessions, kernel).init is None:
                await asyncio.sleep(0.01)
        init = record_of(sessions, kernel).init
        assert init is not None
        os.kill(init.pid, signal.SIGKILL)
        with pytest.raises(RuntimeFailed, match="could not be started"):
            await start
    finally:
        docker.process.send_signal(signal.SIGCONT)
    await sessions.runtime.remove(kernel)
    assert launcher.leftovers() == []


async def test_boxes_that_were_left_are_swept_and_those_of_others_are_not(
    own: tuple[Docker, Launcher, Sessions],
) -> None:
    """A launcher and an init were killed between two requests to the engine."""
    docker, launcher, sessions = own
    kernel = await sessions.start("/bin/sleep", "1000")
    mark = main.mark_of(str(launcher.state))
    for name in (f"madang-{mark}-s77-abcdef", "madang-another-s1-abcdef"):
        config = box.configuration(order(box=name, profile="{}"), f"{launcher.state}/door")
        config["Labels"][box.LABEL] = name.split("-")[1]
        config["HostConfig"]["Mounts"] = []
        config["HostConfig"]["SecurityOpt"] = []
        docker.engine.post(f"/containers/create?name={name}", config)
    launcher.kill()
    launcher.start()
    await sessions.runtime.adopt()

    def names() -> set[str]:
        return {name for each in docker.containers() for name in each["Names"]}

    async with asyncio.timeout(PATIENCE_S):
        while f"/madang-{mark}-s77-abcdef" in names():
            await asyncio.sleep(0.02)
    assert "/madang-another-s1-abcdef" in names()
    assert len(names()) == 2
    assert (await sessions.exec(kernel, "e1", "/bin/echo", "on")).out == b"on\n"
    docker.engine.remove("madang-another-s1-abcdef")
