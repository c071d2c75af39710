"""A pair of interfaces between the machine and a session, addresses, routes, bandwidth."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from madang.agent.launcher.network import netlink
from madang.agent.launcher.network.netlink import CREATE, EXCLUSIVE, Netlink, attribute, nest
from madang.wire.network import Net

INSIDE: Final = "eth0"
"""What the session calls its end."""
PAIR_BITS: Final = 31
_NEW_LINK, _DELETE_LINK, _NEW_ADDRESS, _GET_ADDRESS = 16, 17, 20, 22
_NEW_ROUTE, _GET_ROUTE, _NEW_QUEUE = 24, 26, 36
_LINK: Final = struct.Struct("=BxHiII")
_IFLA_NAME, _IFLA_INFO, _IFLA_NETNS_FD = 3, 18, 28
_VETH_PEER: Final = 1
_UP: Final = 1
_MAIN_TABLE, _BY_BOOT, _UNICAST = 254, 3, 1
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_TC_ROOT: Final = 0xFFFFFFFF
_TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_ETHERNET: Final = 1
_LEAST_BURST: Final = 128 * 1024
"""Bytes: two of the largest packets that the kernel hands over."""
_BURST_S: Final = 0.01
_QUEUE_S: Final = 0.05


def make_pair(route: Netlink, name: str, namespace: int) -> None:
    """*name* here, ``INSIDE`` in the network namespace of that descriptor."""
    peer = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_NAME, INSIDE)
    peer += attribute(_IFLA_NETNS_FD, namespace)
    body = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_NAME, name)
    body += nest(_IFLA_INFO, attribute(1, b"veth"), nest(2, attribute(_VETH_PEER, peer)))
    route.change(_NEW_LINK, CREATE | EXCLUSIVE, body, f"interface {name}")


def forbid_ipv6(name: str) -> None:
    """Before it is brought up, or it gives itself an address."""
    path = f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"
    if os.path.exists(path):
        _write(path, "1")


def forward(name: str) -> None:
    """Take from *name* what is addressed to others."""
    _write(f"/proc/sys/net/ipv4/conf/{name}/forwarding", "1")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def bring_up(route: Netlink, name: str, address: int) -> None:
    """Its address, and the other end's, are reached by it."""
    index = socket.if_nametoindex(name)
    value = address.to_bytes(4)
    body = struct.pack("=BBBBi", socket.AF_INET, PAIR_BITS, 0, 0, index)
    body += attribute(2, value) + attribute(1, value)
    route.change(_NEW_ADDRESS, CREATE | EXCLUSIVE, body, f"address of {name}")
    route.change(_NEW_LINK, 0, _LINK.pack(0, 0, index, _UP, _UP), f"interface {name}")


def delete(route: Netlink, index: int) -> None:
    """And its other end. No error if it is gone."""
    with contextlib.suppress(OSError):
        route.change(_DELETE_LINK, 0, _LINK.pack(0, 0, index, 0, 0), f"interface {index}")


def remove(route: Netlink, name: str) -> None:
    """What is left of a pair whose session has ended: the kernel takes its time with namespaces."""
    with contextlib.suppress(OSError):
        delete(route, socket.if_nametoindex(name))


def names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def set_default_route(route: Netlink, gateway: int) -> None:
    body = struct.pack("=8BI", socket.AF_INET, 0, 0, 0, _MAIN_TABLE, _BY_BOOT, 0, _UNICAST, 0)
    body += attribute(_RTA_GATEWAY, gateway.to_bytes(4))
    route.change(_NEW_ROUTE, CREATE | EXCLUSIVE, body, "default route")


def limit(route: Netlink, name: str, bits: int) -> None:
    """What leaves by *name* gets so many bits per second; more waits a little, then is dropped."""
    index, rate = socket.if_nametoindex(name), bits // 8
    burst = max(_LEAST_BURST, int(rate * _BURST_S))
    queue = burst + int(rate * _QUEUE_S)
    spec = struct.pack("=BBHhHI", 0, _ETHERNET, 0, 0, 0, min(rate, 0xFFFFFFFF))
    parms = spec + bytes(12) + struct.pack("=III", min(queue, 0xFFFFFFFF), 0, 0)
    options = attribute(_TBF_PARMS, parms) + attribute(_TBF_BURST, min(burst, 0xFFFFFFFF))
    if rate > 0xFFFFFFFF:
        options += attribute(_TBF_RATE64, struct.pack("=Q", rate))
    body = struct.pack("=BxxxiIII", 0, index, 0, _TC_ROOT, 0)
    body += attribute(1, "tbf") + nest(2, options)
    route.change(_NEW_QUEUE, CREATE | EXCLUSIVE, body, f"bandwidth of {name}")


def routes(route: Netlink) -> Iterator[tuple[Net, str]]:
    """IPv4 routes of the main table, but default ones: (range, interface)."""
    for body in route.dump(_GET_ROUTE, struct.pack("=8BI", socket.AF_INET, *[0] * 8), "routes"):
        found = dict(netlink.attributes(body[12:]))
        if body[4] != _MAIN_TABLE or _RTA_DST not in found or _RTA_OIF not in found:
            continue
        index = int.from_bytes(found[_RTA_OIF], "little")
        try:
            yield Net(int.from_bytes(found[_RTA_DST]), body[1]), socket.if_indextoname(index)
        except OSError:  # It has just gone.
            continue


def addresses(route: Netlink) -> list[int]:
    """IPv4 addresses of the machine itself."""
    body = struct.pack("=BBBBi", socket.AF_INET, 0, 0, 0, 0)
    found = []
    for answer in route.dump(_GET_ADDRESS, body, "addresses"):
        known = dict(netlink.attributes(answer[8:]))
        if value := known.get(2, known.get(1)):
            found.append(int.from_bytes(value))
    return found


def traffic(name: str) -> tuple[int, int]:
    """(bytes received, bytes sent) by *name*, of the network namespace that we are in."""
    with open("/proc/thread-self/net/dev", encoding="ascii") as file:
        for line in file:
            interface, _, numbers = line.partition(":")
            if interface.strip() == name:
                fields = numbers.split()
                return int(fields[0]), int(fields[8])
    return 0, 0
