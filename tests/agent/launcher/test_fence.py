"""Programs in the kernel that judge addresses: with a control group and servers of our own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import select
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from madang.agent.launcher import bpf, cgroups, syscalls
from madang.agent.launcher.fence import Fence
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import PolicyUnkept
from madang.wire.policy import Act, Answer, NetRule, Resolved

MPTCP, FASTOPEN, UDP_LITE = 262, 0x20000000, 136
HOSTS: Final = ("127.0.0.1", "0.0.0.0", "::ffff:127.0.0.1", "::ffff:0.0.0.0")


def lacking() -> str:
    """Why this machine can't run these tests."""
    if os.geteuid() != 0:
        return "needs root: programs in the kernel"
    folder = cgroups.detect("madang-probe-fence").group("x").net_folder
    return "" if folder else "needs control groups of version 2 (they may be beside version 1)"


pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())


class Cage:
    """A group with a fence; functions run in it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.fence = Fence(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))

    def run(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Its JSON result, computed by a process that is in the group."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                _compute(self.folder, writer, function, arguments)
            os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            data = file.read()
        assert os.waitpid(pid, 0)[1] == 0
        return json.loads(data)

    def met(self) -> list[tuple[str, str, int]]:
        return sorted((met.what, met.object, met.times) for met in self.fence.read())


def _compute(folder: str, writer: int, function: Callable[..., Any], arguments: Any) -> None:
    cgroups.write(f"{folder}/cgroup.procs", 0)
    try:
        result = function(*arguments)
    except OSError as exc:
        result = errno.errorcode.get(exc.errno or 0, repr(exc))
    except BaseException:
        result = traceback.format_exc()
    os.write(writer, json.dumps(result).encode())
    os._exit(0)


@pytest.fixture
def cage() -> Iterator[Cage]:
    found = cgroups.detect(f"madang-test-{secrets.token_hex(4)}")
    group = found.make("f")
    assert group.net_folder is not None
    made = Cage(group.net_folder)
    yield made
    made.fence.close()
    assert group.remove()
    found.remove()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """TCP on all addresses, of both versions."""
    with socket.create_server(
        ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
    ) as made:
        yield made


@pytest.fixture
def port(server: socket.socket) -> int:
    found: int = server.getsockname()[1]
    return found


def deny(*targets: str, act: Act = Act.CONNECT, code: int = errno.EPERM, line: int = 1) -> NetRule:
    return NetRule(layer="site", line=line, act=act, targets=targets, code=code)


def only(
    *targets: str, act: Act = Act.CONNECT, answer: Answer = Answer.ERRNO, line: int = 1
) -> NetRule:
    return NetRule(layer="site", line=line, act=act, targets=targets, others=True, answer=answer)


def connect(host: str, port: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> str:
    with _socket(host, kind, protocol) as sock:
        sock.connect((host, port))
    return "ok"


def send(host: str, port: int, flags: int = 0, kind: int = socket.SOCK_DGRAM) -> str:
    with _socket(host, kind) as sock:
        sock.sendto(b"x", flags, (host, port))
    return "ok"


def send_message(host: str, port: int) -> str:
    with _socket(host, socket.SOCK_DGRAM) as sock:
        sock.sendmsg([b"x"], [], 0, (host, port))
    return "ok"


def bind(host: str, port: int, kind: int = socket.SOCK_STREAM) -> str:
    with _socket(host, kind) as sock:
        sock.bind((host, port))
    return "ok"


def _socket(host: str, kind: int, protocol: int = 0) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind, protocol)


def test_a_refused_address_gets_the_rules_error_and_is_told(cage: Cage, port: int) -> None:
    cage.fence.replace([deny(f"127.0.0.0/8:{port}", code=errno.ECONNREFUSED, line=7)])

    assert cage.run(connect, "127.0.0.1", port) == "ECONNREFUSED"
    assert select.select([cage.fence], [], [], PATIENCE_S)[0]
    [met] = cage.fence.read()
    assert (met.rule.line, met.what, met.object) == (7, "connect", f"127.0.0.1:{port}")
    assert met.pid > 0
    assert cage.fence.read() == []
    assert not select.select([cage.fence], [], [], 0)[0]


def test_processes_outside_are_left_alone(cage: Cage, port: int) -> None:
    cage.fence.replace([deny("0.0.0.0/0", "[::]/0")])

    assert connect("127.0.0.1", port) == "ok"
    assert cage.met() == []


@pytest.mark.parametrize("host", HOSTS)
def test_every_name_of_a_refused_address_is_refused(cage: Cage, port: int, host: str) -> None:
    cage.fence.replace([deny(f"127.0.0.0/8:{port}")])

    assert cage.run(connect, host, port) == "EPERM"


def test_ipv4_by_ipv6_is_judged_as_ipv4(cage: Cage, port: int) -> None:
    cage.fence.replace([only("[::]/0")])
    assert cage.run(connect, "::ffff:127.0.0.1", port) == "EPERM"
    cage.fence.replace([only("127.0.0.1")])
    assert cage.run(connect, "::ffff:127.0.0.1", port) == "ok"
    assert cage.run(connect, "::1", port) == "EPERM"


def bound_to_ipv4(port: int) -> str:
    """``::`` of a socket that is bound to IPv4 is 127.0.0.1."""
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::ffff:127.0.0.1", 0))
        sock.connect(("::", port))
    return "ok"


def test_the_unspecified_address_of_ipv6_can_mean_ipv4(cage: Cage, port: int) -> None:
    assert cage.run(bound_to_ipv4, port) == "ok", "else this test shows nothing"
    cage.fence.replace([deny("127.0.0.0/8")])

    assert cage.run(bound_to_ipv4, port) == "EPERM"


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        made.setblocking(False)
        yield made


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("way", [send, send_message])
def test_sending_without_a_connection_is_judged(
    cage: Cage, receiver: socket.socket, host: str, way: Callable[..., str]
) -> None:
    port = receiver.getsockname()[1]
    assert cage.run(way, host, port) == "ok"
    assert receiver.recv(10) == b"x"
    cage.fence.replace([deny(f"127.0.0.1:{port}")])

    assert cage.run(way, host, port) == "EPERM"
    with pytest.raises(BlockingIOError):
        receiver.recv(10)


def connected_elsewhere(allowed: int, refused: int) -> str:
    """A socket that has a peer may still name another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", allowed))
        sock.send(b"a")
        sock.sendto(b"x", ("127.0.0.1", refused))
    return "ok"


def test_a_connected_socket_is_judged_by_the_address_it_names(
    cage: Cage, receiver: socket.socket
) -> None:
    port = receiver.getsockname()[1]
    cage.fence.replace([deny(f"127.0.0.1:{port}")])

    assert cage.run(connected_elsewhere, port - 1, port) == "EPERM"
    with pytest.raises(BlockingIOError):
        receiver.recv(10)


def test_connect_of_udp_is_judged(cage: Cage, port: int) -> None:
    cage.fence.replace([deny(f"127.0.0.1:{port}")])

    assert cage.run(connect, "127.0.0.1", port, socket.SOCK_DGRAM) == "EPERM"


def test_fast_open_is_judged(cage: Cage, port: int, server: socket.socket) -> None:
    cage.fence.replace([deny(f"127.0.0.1:{port}")])

    assert cage.run(send, "127.0.0.1", port, FASTOPEN, socket.SOCK_STREAM) == "EPERM"
    assert not select.select([server], [], [], 0)[0]


def test_multipath_tcp_is_judged(cage: Cage, port: int) -> None:
    try:
        assert cage.run(connect, "127.0.0.1", port, socket.SOCK_STREAM, MPTCP) == "ok"
    except AssertionError:
        pytest.skip("this kernel has no MPTCP")
    cage.fence.replace([deny(f"127.0.0.1:{port}")])

    assert cage.run(connect, "127.0.0.1", port, socket.SOCK_STREAM, MPTCP) == "EPERM"
    assert cage.run(connect, "127.0.0.1", port + 1, socket.SOCK_STREAM, MPTCP) == "ECONNREFUSED"


def ping() -> str:
    """A socket that sends to any address, where the machine lets everybody ping."""
    syscalls.unshare(syscalls.CLONE_NEWNET)
    cgroups.write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    return "ok"


def test_protocols_that_pass_the_hooks_by_get_no_socket(cage: Cage) -> None:
    assert cage.run(ping) == "ok"
    cage.fence.replace([deny("10.0.0.0/8", code=errno.EHOSTUNREACH)])

    assert cage.run(ping) == "EHOSTUNREACH"
    assert cage.met() == [("socket", "protocol 1", 1)]
    assert cage.run(_open, socket.SOCK_DGRAM, UDP_LITE) in {"EHOSTUNREACH", "EPROTONOSUPPORT"}
    assert cage.run(_open, socket.SOCK_STREAM, 0) == "ok"


def _open(kind: int, protocol: int) -> str:
    socket.socket(socket.AF_INET, kind, protocol).close()
    return "ok"


def over_unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
    return "ok"


def test_unix_sockets_are_left_alone(cage: Cage, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        cage.fence.replace([only("192.0.2.1"), only("192.0.2.1", act=Act.BIND)])

        assert cage.run(over_unix, path) == "ok"


def test_binds_are_judged(cage: Cage) -> None:
    cage.fence.replace([only("127.0.0.0/8:47000-47999", act=Act.BIND)])

    assert cage.run(bind, "127.0.0.1", 47001) == "ok"
    assert cage.run(bind, "127.0.0.1", 46999) == "EPERM"
    assert cage.run(bind, "127.0.0.1", 47001, socket.SOCK_DGRAM) == "ok"
    assert cage.run(bind, "0.0.0.0", 47001) == "EPERM"
    assert cage.run(bind, "::", 47001) == "EPERM"
    assert cage.run(bind, "127.0.0.1", 0) == "EPERM"
    assert ("bind", "[::]:47001", 1) in cage.met()


def test_rules_about_binds_say_nothing_about_connects(cage: Cage, port: int) -> None:
    cage.fence.replace([deny("0.0.0.0/0", "[::]/0", act=Act.BIND)])

    assert cage.run(connect, "127.0.0.1", port) == "ok"


def test_what_is_only_logged_passes_and_is_told(cage: Cage, port: int) -> None:
    cage.fence.replace([only(answer=Answer.LOG)])

    assert cage.run(connect, "127.0.0.1", port) == "ok"
    assert cage.met() == [("connect", f"127.0.0.1:{port}", 1)]


def several(port: int, times: int) -> str:
    for _ in range(times):
        with contextlib.suppress(PermissionError):
            connect("127.0.0.1", port)
    return "ok"


def test_refusals_are_counted_and_a_flood_of_them_costs_bounded_memory(
    cage: Cage, port: int
) -> None:
    cage.fence.replace([deny(f"127.0.0.1:{port}")])
    cage.run(several, port, 12)
    assert cage.met() == [("connect", f"127.0.0.1:{port}", 12)]

    cage.run(several, port, 5000)
    [(_, _, times)] = cage.met()
    assert 100 < times < 5000, "the ring was full, what came after was only refused"
    cage.run(several, port, 3)
    assert cage.met() == [("connect", f"127.0.0.1:{port}", 3)], "it is told of again"


def talk(port: int, reader: int, writer: int) -> list[str]:
    """Connect, wait for a sign, use the connection, connect again."""
    found = []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        os.write(writer, b"1")
        os.read(reader, 1)
        sock.sendall(b"still here")
        found.append("sent")
        try:
            found.append(connect("127.0.0.1", port))
        except OSError as exc:
            found.append(errno.errorcode[exc.errno or 0])
    return found


def test_new_rules_meet_running_processes_and_leave_connections_alone(
    cage: Cage, server: socket.socket, port: int
) -> None:
    ready, told = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        reader, writer = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
        os.close(reader)
        with contextlib.suppress(BaseException):
            cgroups.write(f"{cage.folder}/cgroup.procs", 0)
            result = talk(port, told[0], ready[1])
            os._exit(0 if result == ["sent", "EPERM"] else 1)
        os.close(writer)
        os._exit(2)
    os.read(ready[0], 1)
    cage.fence.replace([deny(f"127.0.0.1:{port}")])
    os.write(told[1], b"1")
    status = os.waitpid(pid, 0)[1]
    for fd in (*ready, *told):
        os.close(fd)

    assert os.waitstatus_to_exitcode(status) == 0
    taken, _ = server.accept()
    with taken:
        assert taken.recv(100) == b"still here"


def test_names_are_the_addresses_that_were_found(cage: Cage, port: int) -> None:
    rules = [only(f"server.test:{port}")]
    cage.fence.replace(rules, [Resolved(name="server.test", addresses=("127.0.0.1",))])
    assert cage.run(connect, "127.0.0.1", port) == "ok"
    assert cage.run(connect, "::1", port) == "EPERM"
    cage.fence.replace(rules, [Resolved(name="server.test")])

    assert cage.run(connect, "127.0.0.1", port) == "EPERM"


def test_where_there_is_no_version_2_it_is_said_what_to_do() -> None:
    with pytest.raises(PolicyUnkept, match="mount -t cgroup2"):
        Fence.attach(cgroups.Group(version=1), [only()])


def test_rules_hold_after_whoever_set_them_has_gone(cage: Cage, port: int) -> None:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            group = os.open(cage.folder, os.O_RDONLY | os.O_DIRECTORY)
            Fence(group).replace([deny(f"127.0.0.1:{port}")])
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert cage.run(connect, "127.0.0.1", port) == "EPERM"

    later = Fence(os.open(cage.folder, os.O_RDONLY | os.O_DIRECTORY))
    later.replace([deny("192.0.2.1")])
    assert cage.run(connect, "127.0.0.1", port) == "ok", "a later fence takes the place of theirs"
    later.replace([])
    assert cage.run(_open, socket.SOCK_DGRAM, UDP_LITE) in {"ok", "EPROTONOSUPPORT"}
    later.close()


def test_no_rules_take_everything_off(cage: Cage, port: int) -> None:
    cage.fence.replace([only(), only(act=Act.BIND)])
    assert cage.run(connect, "127.0.0.1", port) == "EPERM"
    cage.fence.replace([])

    assert cage.run(connect, "127.0.0.1", port) == "ok"
    with open_folder(cage.folder) as group:
        for place in (bpf.CONNECT4, bpf.CONNECT6, bpf.BIND4, bpf.SOCK_CREATE):
            assert bpf.attached(group, place) == []


@contextlib.contextmanager
def open_folder(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_former_rules_hold_when_new_ones_can_not_be_set(
    cage: Cage, port: int, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    cage.fence.replace([deny(f"127.0.0.1:{port}")])
    before, real, calls = os.listdir("/proc/self/fd"), bpf.attach, iter(range(100))

    def attach(group: int, program: int, place: int, former: int | None = None) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOMEM, "no memory")
        real(group, program, place, former)

    monkeypatch.setattr(bpf, "attach", attach)
    with pytest.raises(PolicyUnkept, match="no memory"):
        cage.fence.replace([deny("192.0.2.1"), only("192.0.2.1", act=Act.BIND)])
    monkeypatch.setattr(bpf, "attach", real)

    assert cage.run(connect, "127.0.0.1", port) == "EPERM"
    assert cage.run(bind, "127.0.0.1", 0) == "ok"
    assert cage.met() == [("connect", f"127.0.0.1:{port}", 1)]
    assert os.listdir("/proc/self/fd") == before


def test_replacing_leaves_no_descriptors(cage: Cage) -> None:
    cage.fence.replace([deny("192.0.2.1")])
    before = os.listdir("/proc/self/fd")
    for last in range(5):
        cage.fence.replace([deny(f"192.0.2.{last}"), deny(f"192.0.2.{last}", act=Act.BIND)])
    cage.fence.replace([deny("192.0.2.1")])

    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_kernel_that_can_not_do_it_all_still_refuses(
    cage: Cage, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels before 6.0 know no other error than EPERM, and some tell no process."""
    monkeypatch.setattr(bpf, "SET_RETVAL", 9999)
    monkeypatch.setattr(bpf, "GET_PID", 9998)
    cage.fence.replace([deny(f"127.0.0.1:{port}", code=errno.EACCES)])

    assert cage.run(connect, "127.0.0.1", port) == "EPERM"
    assert [met.pid for met in cage.fence.read()] == [0]
