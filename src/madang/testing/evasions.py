"""How a hostile program tries to get around its session's policy. Runs there, as ``attacks`` do.

Each evasion does something that ``POLICY`` refuses, in a way that somebody may have forgotten, and
returns in words what it gained, or nothing. Without a policy each of them gains: else it would show
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

PORT, OTHER, UNBOUND = 47_771, 47_772, 47_773
"""Refused; allowed; not to be bound."""
CALLS = 5
CLOSED = "/work/secret"
"""The test puts it there."""
POLICY = f"""
version = 1

[[connect]]
deny = ["127.0.0.0/8:{PORT}", "[::1]:{PORT}"]

[[bind]]
deny = ["127.0.0.1:{UNBOUND}"]

[[files]]
deny = ["/work/secret", "/usr/bin/env"]

[[files]]
access = ["execute"]
only = ["/usr/**"]

[[write]]
only = ["/outputs", "/tmp"]

[[count]]
calls = ["getpriority"]
limit = {CALLS}
"""

Evasion = Callable[[], str | None]
EVASIONS: dict[str, Evasion] = {}
MPTCP, FASTOPEN, FASTOPEN_CONNECT, UDP_LITE = 262, 0x20000000, 30, 136
NAMES = ("127.0.0.1", "127.9.9.9", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0")
"""By which the server can be reached."""
FLIPS = 20_000
LIBC = ctypes.CDLL(None, use_errno=True)


def evasion(function: Evasion) -> Evasion:
    EVASIONS[function.__name__] = function
    return function


class Servers:
    """Of TCP and UDP at the refused port, and an allowed one."""

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self.tcp = self._stack.enter_context(self._dual(socket.SOCK_STREAM, PORT))
        self.tcp.listen(1024)
        self.udp = self._stack.enter_context(self._dual(socket.SOCK_DGRAM, PORT))
        self._stack.enter_context(self._dual(socket.SOCK_DGRAM, OTHER))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def _dual(kind: int, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        sock.setblocking(False)
        return sock

    def met(self) -> str | None:
        """Whether somebody has come."""
        with contextlib.suppress(BlockingIOError):
            link, who = self.tcp.accept()
            link.close()
            return f"connected from {who[0]}"
        with contextlib.suppress(BlockingIOError):
            data, who = self.udp.recvfrom(100)
            return f"sent {data!r} from {who[0]}"
        return None


def family(name: str) -> int:
    return socket.AF_INET6 if ":" in name else socket.AF_INET


def by_each_name(way: Callable[[str], None]) -> str | None:
    with Servers() as servers:
        for name in NAMES:
            with contextlib.suppress(OSError):
                way(name)
            if met := servers.met():
                return f"{name}: {met}"
    return None


@evasion
def connect_by_another_name() -> str | None:
    """Any service that a rule closes, by an address that the rule does not have."""

    def connect(name: str) -> None:
        with socket.socket(family(name)) as sock:
            sock.connect((name, PORT))

    return by_each_name(connect)


@evasion
def connect_from_an_address_of_ipv4() -> str | None:
    """The address of nobody then means 127.0.0.1."""
    with Servers() as servers, socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::ffff:127.0.0.1", 0))
        sock.connect(("::", PORT))
        return servers.met()


@evasion
def send_without_a_connection() -> str | None:
    """Datagrams need no connect: names asked of a server that is closed, data sent out."""

    def send(name: str) -> None:
        with socket.socket(family(name), socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (name, PORT))

    def send_message(name: str) -> None:
        with socket.socket(family(name), socket.SOCK_DGRAM) as sock:
            sock.sendmsg([b"x"], [], 0, (name, PORT))

    return by_each_name(send) or by_each_name(send_message)


@evasion
def send_to_another_than_the_peer() -> str | None:
    """A socket that is connected where it may be, and used for elsewhere."""
    with Servers() as servers, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", OTHER))
        sock.send(b"hello")
        with contextlib.suppress(OSError):
            sock.sendto(b"x", ("127.0.0.1", PORT))
        return servers.met()


@evasion
def send_several_at_once() -> str | None:
    """One call, many addresses (sendmmsg): the first is allowed."""
    number = {"x86_64": 307, "aarch64": 269}[os.uname().machine]
    text = ctypes.create_string_buffer(b"x")
    part = struct.pack("=QQ", ctypes.addressof(text), 1)
    parts = ctypes.create_string_buffer(part)
    targets = [ctypes.create_string_buffer(_sockaddr(port)) for port in (OTHER, PORT)]
    heads = b"".join(
        struct.pack("=QI4xQQQQi4xI4x", ctypes.addressof(target), 16, ctypes.addressof(parts), 1,
                    0, 0, 0, 0)
        for target in targets
    )  # fmt: skip
    vector = ctypes.create_string_buffer(heads)
    with Servers() as servers, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        LIBC.syscall(number, sock.fileno(), vector, 2, 0)
        return servers.met()


@evasion
def open_fast() -> str | None:
    """TCP that sends before it is connected, without connect."""
    with Servers() as servers:
        for name in ("127.0.0.1", "::1"):
            with contextlib.suppress(OSError), socket.socket(family(name)) as sock:
                sock.sendto(b"x", FASTOPEN, (name, PORT))
            with contextlib.suppress(OSError), socket.socket(family(name)) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, FASTOPEN_CONNECT, 1)
                sock.connect((name, PORT))
                sock.send(b"x")
        return servers.met()


@evasion
def connect_by_several_paths() -> str | None:
    """A protocol that makes its connections by itself (MPTCP)."""
    with Servers() as servers:
        for name in ("127.0.0.1", "::1"):
            with contextlib.suppress(OSError):
                with socket.socket(family(name), socket.SOCK_STREAM, MPTCP) as sock:
                    sock.connect((name, PORT))
        return servers.met()


@evasion
def use_another_protocol() -> str | None:
    """Whatever sends without being asked where to: UDP-Lite, ping."""
    for protocol in (UDP_LITE, socket.IPPROTO_ICMP):
        with contextlib.suppress(OSError):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, protocol) as sock:
                sock.sendto(b"\x08\0\0\0\0\1\0\1x", ("127.0.0.1", PORT))
                return f"protocol {protocol} sends"
    return None


@evasion
def change_the_address_while_it_is_looked_at() -> str | None:
    """A check of one address, a use of another: a second thread flips it in memory."""
    address = ctypes.create_string_buffer(_sockaddr(OTHER))
    flips = (struct.pack("!H", OTHER), struct.pack("!H", PORT))
    running = True

    def flip() -> None:
        while running:
            for each in flips:
                ctypes.memmove(ctypes.addressof(address) + 2, each, 2)

    thread = threading.Thread(target=flip)
    sys.setswitchinterval(1e-5)
    with Servers() as servers, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        thread.start()
        try:
            for _ in range(FLIPS):
                LIBC.sendto(sock.fileno(), b"x", 1, 0, address, 16)
        finally:
            running = False
            thread.join()
        return servers.met()


@evasion
def connect_in_a_process_of_its_own() -> str | None:
    """A child in another session and process group, whose parents have gone."""
    with Servers() as servers:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                with contextlib.suppress(OSError), socket.socket() as sock:
                    sock.connect(("127.0.0.1", PORT))
            os._exit(0)
        os.wait()
        for _ in range(20):
            if met := servers.met():
                return met
            time.sleep(0.01)
    return None


@evasion
def bind_by_another_name() -> str | None:
    """A service where none may be, for others to find."""
    for name in ("127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family(name), kind) as sock:
                if ":" in name:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.bind((name, UNBOUND))
                return f"bound to {name}"
    return None


def reads(*paths: str) -> str | None:
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            found = os.read(fd, 100)
            os.close(fd)
            return f"{path}: {found!r}"
    return None


@evasion
def open_by_another_path() -> str | None:
    """A file that a rule closes, by a path that the rule does not have."""
    os.symlink(CLOSED, "/tmp/link")
    folder = os.open("/work", os.O_PATH)
    itself = os.open(CLOSED, os.O_PATH)
    return reads(
        CLOSED, "/tmp/link", "/work/../work/./secret", "/proc/self/root/work/secret",
        "/proc/self/cwd/secret", f"/proc/self/fd/{folder}/secret", f"/proc/self/fd/{itself}",
        f"/proc/self/task/{os.getpid()}/fd/{itself}", f"/dev/fd/{itself}",
    )  # fmt: skip


@evasion
def open_under_another_name() -> str | None:
    """The file moved, or linked, to where no rule looks."""
    for other in ("/work/other", "/tmp/other", "/outputs/other"):
        with contextlib.suppress(OSError):
            os.link(CLOSED, other)
        with contextlib.suppress(OSError):
            os.rename(CLOSED, other)
        if gained := reads(other):
            os.rename(other, CLOSED)
            return gained
    return None


@evasion
def flip_a_path_while_it_is_judged() -> str | None:
    """A check of one file, the use of another: a second thread changes what the path leads to."""
    open("/tmp/fine", "w").close()
    running = True

    def flip() -> None:
        number = 0
        while running:
            for target in ("/tmp/fine", CLOSED):
                number += 1
                os.symlink(target, f"/tmp/new{number}")
                os.rename(f"/tmp/new{number}", "/tmp/flipping")

    thread = threading.Thread(target=flip)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(FLIPS // 4):
            if (gained := reads("/tmp/flipping")) and not gained.endswith("b''"):
                return gained
    finally:
        running = False
        thread.join()
    return None


@evasion
def change_files_elsewhere() -> str | None:
    """What the session was to leave as it is, replaced, cut short, or added to."""
    folder = os.open("/work", os.O_PATH)
    made = os.open("/tmp/mine", os.O_CREAT | os.O_WRONLY)
    ways: dict[str, Callable[[], object]] = {
        "make": lambda: os.open("/work/x", os.O_CREAT | os.O_WRONLY),
        "make by a descriptor": lambda: os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=folder),
        "make a folder": lambda: os.mkdir("/home/user/x"),
        "make a link": lambda: os.symlink("x", "/work/x"),
        "make a FIFO": lambda: os.mkfifo("/var/tmp/x"),
        "make without a name": lambda: os.open("/work", os.O_TMPFILE | os.O_WRONLY),
        "cut short": lambda: os.truncate("/work/evasions.py", os.stat("/work/evasions.py").st_size),
        "append": lambda: os.open("/work/evasions.py", os.O_WRONLY | os.O_APPEND),
        "link in": lambda: os.link(f"/proc/self/fd/{made}", "/work/x", follow_symlinks=True),
    }
    for name, way in ways.items():
        with contextlib.suppress(OSError):
            way()
            for path in ("/work/x", "/home/user/x", "/var/tmp/x"):
                with contextlib.suppress(OSError):
                    os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
            return name
    return None


def runs(*argv: str, program: str | int | None = None) -> bool:
    """Whether it can be executed at all."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        with contextlib.suppress(OSError):
            os.execve(program if program is not None else argv[0], argv, {})
        os._exit(127)
    os.close(writer)
    _, state = os.waitpid(pid, 0)
    said = os.read(reader, 100)
    os.close(reader)
    return state == 0 or bool(said)


def program_text() -> bytes:
    with open("/usr/bin/true", "rb") as file:
        return file.read()


@evasion
def execute_a_copy() -> str | None:
    """Programs of one's own, where only the machine's are to run."""
    with open("/tmp/copy", "wb") as file:
        file.write(program_text())
    os.chmod("/tmp/copy", stat.S_IRWXU)
    if runs("/tmp/copy"):
        return "a copy ran"
    fd = os.open("/tmp/copy", os.O_PATH)
    return "a copy ran by its descriptor" if runs("copy", program=f"/proc/self/fd/{fd}") else None


@evasion
def execute_a_script() -> str | None:
    """The same by a file that names its interpreter."""
    with open("/tmp/script", "w") as file:
        file.write("#!/usr/bin/python3\n")
    os.chmod("/tmp/script", stat.S_IRWXU)
    return "a script ran" if runs("/tmp/script") else None


@evasion
def execute_from_memory() -> str | None:
    """The same by a file that lies on no file system."""
    fd = os.memfd_create("copy", 0)
    os.write(fd, program_text())
    return "it ran" if runs("copy", program=fd) else None


@evasion
def execute_by_the_loader() -> str | None:
    """A program that is closed, by the loader, which only reads it."""
    for loader in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"):
        if os.path.exists(loader) and runs(loader, "/usr/bin/env"):
            return loader
    return None


@evasion
def call_more_often_than_counted() -> str | None:
    """More calls than a rule lets pass, by many threads at once."""
    number = {"x86_64": 140, "aarch64": 141}[os.uname().machine]
    passed: list[int] = []

    def ask() -> None:
        passed.append(sum(LIBC.syscall(number, 0, 0) >= 0 for _ in range(20)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{sum(passed)} calls" if sum(passed) > CALLS else None


@evasion
def answer_in_the_guard_s_place() -> str | None:
    """Calls that the guard is asked about, let go by the program itself."""
    number = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
    allow = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", 1, ctypes.addressof(allow)))
    LIBC.prctl(38, 1, 0, 0, 0)
    listener = LIBC.syscall(number, 1, 1 << 3, program)
    return f"a listener: {listener}" if listener >= 0 else None


@evasion
def hold_the_guard_up() -> str | None:
    """A guard that waits for a FIFO's other end, or is tired out, and then lets pass."""
    os.mkfifo("/tmp/fifo")
    children = []
    for kind in range(4):
        pid = os.fork()
        if pid == 0:
            signal.alarm(2)
            while True:
                with contextlib.suppress(OSError):
                    os.close(os.open("/tmp/fifo" if kind == 0 else CLOSED, os.O_RDONLY))
        children.append(pid)
    gained = None
    for _ in range(200):
        began = time.monotonic()
        gained = gained or reads(CLOSED, "/tmp/link")
        if time.monotonic() - began > 5:
            gained = gained or "others wait"
    for pid in children:
        os.waitpid(pid, 0)
    return gained


def _sockaddr(port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H4B8x", port, 127, 0, 0, 1)


def attempt(function: Evasion) -> str | None:
    """In a child of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            gained = function()
        except OSError:
            gained = None
        except BaseException as exc:
            gained = f"broke: {exc!r}"
        os.write(writer, (gained or "").encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, state = os.waitpid(pid, 0)
    return "hung" if os.WIFSIGNALED(state) else text or None


def results() -> Iterator[tuple[str, str | None]]:
    for name, function in EVASIONS.items():
        yield name, attempt(function)


if __name__ == "__main__":
    for found in results():
        print(json.dumps(found), flush=True)
