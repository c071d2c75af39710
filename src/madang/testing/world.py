"""A machine and an internet in network namespaces of their own; nothing real is touched.

::

    sessions ─ machine (192.0.2.2, its own services) ─── world (203.0.113.*, 10.9.9.9, …)

The world answers on every address of its own: ``hello`` with who is connected to whom (80, 443,
8080), as much as one can take (9000) or send (9001), UDP back to where it came from (7), and names
(53).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, NoReturn

from madang.agent.launcher import syscalls
from madang.agent.launcher.network import links, packets, rules
from madang.agent.launcher.network.netlink import CREATE, ROUTE, Netlink, attribute
from madang.testing.patience import PATIENCE_S
from madang.wire.network import Net

MACHINE: Final = "192.0.2.2"
WORLD: Final = "192.0.2.3"
GOOD: Final = "203.0.113.1"
OTHER: Final = "203.0.113.2"
RESOLVER: Final = "203.0.113.53"
PRIVATE: Final = "10.9.9.9"
METADATA: Final = "169.254.169.254"
MACHINE_PORT: Final = 2222
"""Of a service of the machine, on all of its addresses."""
HELLO: Final = (80, 443, 8080)
SOURCE, SINK, ECHO = 9000, 9001, 7
NAMES: Final = {
    "good.example": [GOOD],
    "a.good.example": [GOOD],
    "other.example": [OTHER],
    "evil.example": [PRIVATE, METADATA, "127.0.0.1", MACHINE],
    "mixed.example": [PRIVATE, GOOD],
    "large.example": [f"203.0.113.{number}" for number in range(1, 51)],
}
ALIASES: Final = {"alias.example": "good.example"}
SILENT: Final = "silent.example"
"""Nobody answers for it."""


def missing() -> str:
    """Why sessions can't have a network here; empty: they can."""
    if os.geteuid() != 0:
        return "networks take root"
    if rules.nft_path() is None:
        return "nft is not installed (apt-get install nftables)"
    return ""


class World:
    """Runs from ``open_world`` on. Paths stand for ``setns``."""

    def __init__(self, process: subprocess.Popen[bytes], world_pid: int) -> None:
        self.process = process
        self.machine = f"/proc/{process.pid}/ns/net"
        self.world = f"/proc/{world_pid}/ns/net"

    @contextlib.contextmanager
    def inside(self, namespace: str) -> Iterator[None]:
        """Be there, in this thread."""
        with open("/proc/thread-self/ns/net") as back, open(namespace) as there:
            syscalls.setns(there.fileno(), syscalls.CLONE_NEWNET)
            try:
                yield
            finally:
                syscalls.setns(back.fileno(), syscalls.CLONE_NEWNET)

    def machine_does(self, *argv: str) -> str:
        """What a command says in the machine's namespace."""
        with self.inside(self.machine):
            return subprocess.run(argv, capture_output=True, check=True, text=True).stdout


@contextlib.contextmanager
def open_world(*, forwarding: bool = True) -> Iterator[World]:
    argv = [sys.executable, "-m", "madang.testing.world", str(int(forwarding))]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield World(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def main() -> NoReturn:
    """The machine; its child is the world. Both end with whoever started them."""
    syscalls.die_with_parent(signal.SIGKILL)
    syscalls.unshare(syscalls.CLONE_NEWNET)
    syscalls.loopback_up()
    ready, ready_writer = os.pipe()
    go, go_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        syscalls.die_with_parent(signal.SIGKILL)
        syscalls.unshare(syscalls.CLONE_NEWNET)
        syscalls.loopback_up()
        os.write(ready_writer, b".")
        os.read(go, 1)
        _be_world()
        os.write(ready_writer, b".")
        signal.pause()
    os.read(ready, 1)
    with open(f"/proc/{pid}/ns/net") as namespace, Netlink(ROUTE) as route:
        links.make_pair(route, "up0", namespace.fileno())
        links.bring_up(route, "up0", _number(MACHINE))
        links.set_default_route(route, _number(WORLD))
    with open("/proc/sys/net/ipv4/ip_forward", "w", encoding="ascii") as file:
        file.write(sys.argv[1])
    _listen(MACHINE_PORT, _hello)
    os.write(go_writer, b".")
    os.read(ready, 1)
    print(pid, flush=True)
    while True:
        signal.pause()


def _be_world() -> None:
    with Netlink(ROUTE) as route:
        links.bring_up(route, links.INSIDE, _number(WORLD))
        for net in ("203.0.113.0/24", f"{PRIVATE}/32", f"{METADATA}/32"):
            _own(route, Net.parse(net))
        # Whoever would connect to a session knows the way to it.
        links.set_default_route(route, _number(MACHINE))
    for port in HELLO:
        _listen(port, _hello)
    _listen(SOURCE, _give)
    _listen(SINK, _take)
    _answer(ECHO, lambda data: data)
    _answer(53, _name)
    _listen(53, _name_by_tcp)


def _own(route: Netlink, net: Net) -> None:
    """A local route: all of *net* is ours."""
    index = socket.if_nametoindex("lo")
    body = struct.pack("=8BI", socket.AF_INET, net.bits, 0, 0, 255, 3, 254, 2, 0)
    body += attribute(1, net.base.to_bytes(4)) + attribute(4, index)
    route.change(24, CREATE, body, f"route to {net}")


def _number(address: str) -> int:
    return Net.parse(address).base


def _listen(port: int, serve: Callable[[socket.socket], None]) -> None:
    listener = socket.create_server(("0.0.0.0", port), backlog=128)

    def forever() -> None:
        while True:
            link, _ = listener.accept()
            threading.Thread(target=_served, args=(serve, link), daemon=True).start()

    threading.Thread(target=forever, daemon=True).start()


def _served(serve: Callable[[socket.socket], None], link: socket.socket) -> None:
    with link, contextlib.suppress(OSError):
        link.settimeout(PATIENCE_S)
        serve(link)


def _hello(link: socket.socket) -> None:
    here, there = link.getsockname(), link.getpeername()
    link.sendall(f"hello {there[0]}, here is {here[0]}:{here[1]}\n".encode())


def _give(link: socket.socket) -> None:
    data, late = bytes(1 << 16), time.monotonic() + PATIENCE_S
    while time.monotonic() < late:
        link.sendall(data)


def _take(link: socket.socket) -> None:
    while link.recv(1 << 16):
        pass


def _answer(port: int, reply: Callable[[bytes], bytes | None]) -> None:
    """By UDP, from the address that was asked."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
    sock.bind(("0.0.0.0", port))

    def forever() -> None:
        while True:
            data, notes, _, sender = sock.recvmsg(65535, 64)
            told = struct.unpack("=I4s4s", notes[0][2])
            note = struct.pack("=I4s4s", 0, told[1], b"\0\0\0\0")
            if (said := reply(data)) is not None:
                sock.sendmsg([said], [(socket.IPPROTO_IP, 8, note)], 0, sender)

    threading.Thread(target=forever, daemon=True).start()


def _name(data: bytes) -> bytes | None:
    """What the world knows of a name."""
    question = packets.read_question(data)
    name = question.name
    if name == SILENT:
        return None
    records = []
    if alias := ALIASES.get(name):
        target = b"".join(bytes([len(part)]) + part.encode() for part in alias.split(".")) + b"\0"
        records.append(b"\xc0\x0c" + struct.pack("!HHIH", 5, 1, 30, len(target)) + target)
        owner, name = target, alias
    else:
        owner = b"\xc0\x0c"
    about = owner + struct.pack("!HHIH", 1, 1, 30, 4)
    records += [about + _number(address).to_bytes(4) for address in NAMES.get(name, [])]
    flags = 0x8180 if records else 0x8183
    head = struct.pack("!HHHHHH", question.number, flags, 1, len(records), 0, 0)
    return head + question.plain + b"".join(records)


def _name_by_tcp(link: socket.socket) -> None:
    data = link.recv(512)
    if (said := _name(data[2:])) is not None:
        link.sendall(len(said).to_bytes(2) + said)


if __name__ == "__main__":
    main()
