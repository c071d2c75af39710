"""The process that makes a session's network, and stays as long as the session does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final, NoReturn

from madang.agent.launcher import helpers, seccomp, syscalls
from madang.agent.launcher.network import links, names, netlink, rules
from madang.agent.launcher.network.netlink import Netlink
from madang.agent.launcher.processes import ProcessId, say
from madang.agent.launcher.registry import NETWORK_USE
from madang.wire.errors import HostLacks, RuntimeFailed
from madang.wire.network import (
    Net,
    Network,
    NetworkMode,
    NetworkUse,
    Refusal,
    Target,
    parse_target,
)

FORWARDING: Final = "/proc/sys/net/ipv4/ip_forward"
MEND_FORWARDING: Final = (
    "As root: `sysctl -w net.ipv4.ip_forward=1`; the same in a file of /etc/sysctl.d keeps it."
)
MEND_NFT: Final = "As root: `apt-get install nftables`."
MAX_SHOWN: Final = 64
"""Refusals that are told one by one."""
_NAME: Final = "madang-network"
_NET_ADMIN: Final = 12
_LOOK_S: Final = 2.0
_RETRY_S: Final = 0.5
_TELL_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is the same for all sessions of this launcher."""

    table: str
    prefix: str
    """Of the machine's ends of sessions' interfaces."""
    pool: Net
    forbidden: tuple[Net, ...]
    resolvers: tuple[str, ...]
    """Empty: those of the machine."""
    lock: str
    """A file; who holds it may change what sessions share."""

    def interface(self, number: int) -> str:
        return f"{self.prefix}{number}"

    def addresses(self, number: int) -> tuple[int, int]:
        """(the machine's, the session's)"""
        first = self.pool.base + 2 * number
        return first, first + 1

    @property
    def count(self) -> int:
        """Numbers are below it."""
        return 1 << (31 - self.pool.bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one warden does."""

    site: Site
    network: Network
    """Its bandwidth is what it gets."""
    number: int
    folder: str
    """The kernel's."""
    uid: int
    init: ProcessId
    again: bool = False
    """Another warden was here: all is made, only its sockets are missing."""
    renew: bool = False
    """The machine's table may be of other settings."""

    @property
    def targets(self) -> list[Target]:
        return [parse_target(text) for text in self.network.allow]


def run(plan: Plan, writer: int, init_fd: int) -> NoReturn:
    """Life of a warden, from the fork on. Word of the making goes to *writer*."""
    try:
        helpers.begin(_NAME, writer, init_fd)
        os.setsid()
        made: list[_Warden] = []

        def make() -> None:
            made.append(_make(plan, init_fd))

        if helpers.tell(writer, make):
            os.close(writer)
            made[0].serve()
    except BaseException as exc:
        say(f"madang network: {exc!r}")
    finally:
        os._exit(0)


def _make(plan: Plan, init_fd: int) -> _Warden:
    """Both ends, both tables, all sockets; then nothing is left of root but the one power."""
    namespace = os.open(f"/proc/{plan.init.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if ProcessId.of(plan.init.pid) != plan.init:
        raise RuntimeFailed("the session ended before it had its network.")
    with Netlink(netlink.ROUTE) as route:
        own = [Net(address, 32) for address in links.addresses(route)]
        if not plan.again:
            _make_outside(plan, route, namespace)
    forbidden = (*rules.ALWAYS_FORBIDDEN, plan.site.pool, *plan.site.forbidden, *own)
    asked = plan.site.resolvers or tuple(names.machine_resolvers())
    resolvers = names.connect_resolvers(asked)
    syscalls.setns(namespace, syscalls.CLONE_NEWNET)
    os.close(namespace)
    route = Netlink(netlink.ROUTE)
    if not plan.again:
        _make_inside(plan, route, forbidden)
    use = os.open(f"{plan.folder}/{NETWORK_USE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    warden = _Warden(plan, init_fd, use, route, Netlink(netlink.NETFILTER))
    warden.listen(resolvers, forbidden)
    _give_up_power(plan.uid)
    return warden


def _make_outside(plan: Plan, route: Netlink, namespace: int) -> None:
    site = plan.site
    if not forwards():
        text = "sessions can't have a network: this machine does not forward packets."
        raise HostLacks(f"{text} {MEND_FORWARDING}")
    if rules.nft_path() is None:
        raise HostLacks(f"sessions can't have a network: nft is not installed. {MEND_NFT}")
    interface, (address, _) = site.interface(plan.number), site.addresses(plan.number)
    with locked(site.lock):
        if clash := overlap(route, site):
            raise HostLacks(clash)
        ensure_table(site, renew=plan.renew)
        links.remove(route, interface)
        links.make_pair(route, interface, namespace)
    links.forbid_ipv6(interface)
    links.forward(interface)
    links.bring_up(route, interface, address)
    if plan.network.bandwidth_bits is not None:
        links.limit(route, interface, plan.network.bandwidth_bits)


def forwards() -> bool:
    with open(FORWARDING, encoding="ascii") as file:
        return file.read().strip() == "1"


def rehearse(site: Site) -> None:
    """Make everything once, in namespaces that go with us. Raises OSError."""
    syscalls.unshare(syscalls.CLONE_NEWNET)
    with Netlink(netlink.ROUTE) as route:
        here = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        address, other = site.addresses(1)
        rules.load(rules.machine_table(site.table, site.prefix, site.pool, site.forbidden))
        targets = [parse_target("a.example:80"), parse_target("192.0.2.0/24")]
        rules.load(rules.session_table(NetworkMode.ALLOW, targets, other, site.forbidden))
        links.make_pair(route, site.interface(1), here)
        links.bring_up(route, links.INSIDE, address)
        links.limit(route, links.INSIDE, 10**6)


def closed_by() -> str | None:
    """In words: who else drops what is forwarded here, and makes no exception for sessions."""
    found, table = rules.in_force(), ""
    for line in found.splitlines():
        words = line.split()
        if words[:1] == ["table"]:
            table = " ".join(words[1:3])
        elif "hook forward" in line and "policy drop" in line and '"md*"' not in found:
            return f"the rules of `{table}` drop what is forwarded"
    return None


def overlap(route: Netlink, site: Site) -> str | None:
    """In words: who on this machine uses addresses that are meant for sessions."""
    for net, interface in links.routes(route):
        if net.overlaps(site.pool) and not interface.startswith(site.prefix):
            text = f"the addresses for sessions, {site.pool}, are in use here: {net} on {interface}"
            return f"{text}. Set `network.addresses` to a range that nobody uses."
    return None


def ensure_table(site: Site, *, renew: bool) -> None:
    with Netlink(netlink.NETFILTER) as filters:
        if renew or not rules.has_table(filters, site.table):
            nets = (*rules.ALWAYS_FORBIDDEN, site.pool, *site.forbidden)
            rules.load(rules.machine_table(site.table, site.prefix, site.pool, nets))


def remove_table(site: Site) -> None:
    """Unless a session has a network after all."""
    with locked(site.lock), Netlink(netlink.NETFILTER) as filters:
        used = any(name.startswith(site.prefix) for name in links.names())
        if not used and rules.has_table(filters, site.table):
            rules.load(f"delete table inet {site.table}\n")


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _make_inside(plan: Plan, route: Netlink, forbidden: Sequence[Net]) -> None:
    gateway, address = plan.site.addresses(plan.number)
    links.forbid_ipv6(links.INSIDE)
    text = rules.session_table(plan.network.mode, plan.targets, address, forbidden)
    rules.load(text)  # Before there is a way out.
    links.bring_up(route, links.INSIDE, address)
    links.set_default_route(route, gateway)
    if plan.network.bandwidth_bits is not None:
        links.limit(route, links.INSIDE, plan.network.bandwidth_bits)


def _give_up_power(uid: int) -> None:
    """The one capability left acts on the namespace that we are in, the session's: the machine's
    rules are out of reach."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 0)
    syscalls.become(uid, _NET_ADMIN)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.no_new_privileges()
    seccomp.install(seccomp.program())


class _Warden:
    def __init__(
        self, plan: Plan, init_fd: int, use: int, route: Netlink, filters: Netlink
    ) -> None:
        self._plan = plan
        self._init_fd = init_fd
        self._use = use
        self._route = route
        self._filters = filters
        self._index = socket.if_nametoindex(links.INSIDE)
        self._ranges = rules.port_ranges(plan.targets)
        self._selector = selectors.DefaultSelector()
        self._names: names.Names | None = None
        self._told = NetworkUse()
        self._tell_at = 0.0

    def listen(
        self, resolvers: Sequence[Sequence[socket.socket]], forbidden: Sequence[Net]
    ) -> None:
        self._names = names.Names(
            mode=self._plan.network.mode,
            targets=self._plan.targets,
            forbidden=forbidden,
            learn=self._learn,
            resolvers=resolvers,
            listeners=names.listen(),
            selector=self._selector,
        )

    def _learn(self, ports: tuple[int, int], addresses: Sequence[int], seconds: int) -> None:
        try:
            rules.learn(self._filters, self._ranges.index(ports), addresses, seconds)
        except OSError as exc:  # The session gets the address, and is refused there.
            say(f"madang network: {self._plan.folder}: {exc}")

    def serve(self) -> None:
        assert self._names is not None
        over: list[bool] = []
        self._selector.register(self._init_fd, selectors.EVENT_READ, lambda _: over.append(True))
        while not over:
            wait = _RETRY_S if self._names.busy else _LOOK_S
            for key, events in self._selector.select(wait):
                if self._selector.get_map().get(key.fd) is key:
                    key.data(events)
            self._names.keep_time()
            if over or time.monotonic() >= self._tell_at:
                self._tell_at = time.monotonic() + _TELL_S
                self._tell()
        links.delete(self._route, self._index)

    def _tell(self) -> None:
        """Write down what is new. In place: the folder is not ours."""
        use = self._look()
        if use != self._told:
            self._told = use
            data = json.dumps(asdict(use)).encode()
            with contextlib.suppress(OSError):  # A full disk.
                os.pwrite(self._use, data, 0)
                os.ftruncate(self._use, len(data))

    def _look(self) -> NetworkUse:
        assert self._names is not None
        refused, count = rules.refused(self._filters)
        refused += [Refusal(target=name, count=n) for name, n in self._names.refused.items()]
        received, sent = links.traffic(links.INSIDE)
        refused.sort(key=lambda refusal: (-refusal.count, refusal.target))
        return NetworkUse(
            received_bytes=received,
            sent_bytes=sent,
            refused=tuple(refused[:MAX_SHOWN]),
            refused_count=count + self._names.refused_count,
        )


def make_process(plan: Plan, init_fd: int) -> tuple[int, int]:
    """(its pid, where word of its making is to be read). Raises OSError."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            run(plan, writer, init_fd)
    except OSError:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return pid, reader
