"""Which network a session has: none, what it names, or all of it; and what came of it.

A *target* says where a session with an allow-list may connect to: ``data.example.org:443``,
``*.example.org``, ``10.1.0.0/16:5432``, ``192.0.2.7:8000-8100``. Without a port it means all of
them, TCP and UDP.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from madang.wire.errors import NetworkInvalid

MAX_TARGETS: Final = 64
MIN_BITS: Final = 8_000
"""Bits per second: slower links time out."""
MAX_BITS: Final = 1_000_000_000_000
ALL_PORTS: Final = (1, 65535)
MAX_POOL_BITS: Final = 28
"""The smallest range of addresses for sessions: seven of them."""

_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(?:\*\.)?(?:{_LABEL}\.)*{_LABEL}", re.ASCII)
_PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)
_NUMBERS: Final = re.compile(r"[0-9.]+(?:/[0-9]+)?", re.ASCII)
_RATE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([kmgt]?)(?:bit)?(?:/s)?", re.ASCII)
_RATES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class NetworkMode(StrEnum):
    NONE = "none"
    """Nothing but the session's own loopback."""
    ALLOW = "allow"
    """What the targets name, and nothing else."""
    FULL = "full"
    """Everything that the machine's settings don't forbid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What a session asks for. Nobody can connect to it from outside in any mode."""

    mode: NetworkMode = NetworkMode.NONE
    allow: tuple[str, ...] = ()
    """Targets, with ``allow``: ``HOST``, ``*.HOST`` or ``ADDRESS[/BITS]``, each ``[:PORT[-PORT]]``.
    """
    bandwidth_bits: int | None = None
    """Bits per second, each way; None: the machine's limit."""

    def __bool__(self) -> bool:
        return self.mode is not NetworkMode.NONE

    def __str__(self) -> str:
        words = " ".join(("allow", *self.allow)) if self.allow else str(self.mode)
        rate = self.bandwidth_bits
        return words if rate is None else f"{words} at {format_rate(rate)}"


NO_NETWORK: Final = Network()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What a session tried to reach and may not."""

    target: str
    """A name that it asked for, or ``ADDRESS:PORT/tcp``."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkUse:
    """What a session did with its network so far."""

    received_bytes: int = 0
    sent_bytes: int = 0
    refused: tuple[Refusal, ...] = ()
    """Most often tried first; not all of them where there are many."""
    refused_count: int = 0
    """Packets and names refused, whatever they were for."""


@dataclass(frozen=True, slots=True, order=True)
class Net:
    """A range of IPv4 addresses."""

    base: int
    bits: int

    @classmethod
    def parse(cls, text: str) -> Net:
        """``192.0.2.0/24`` or ``192.0.2.7``. Raises ValueError, in words."""
        address, slash, length = text.partition("/")
        try:
            base = int.from_bytes(socket.inet_pton(socket.AF_INET, address))
        except (OSError, ValueError) as exc:
            raise ValueError(f"{text[:60]!r} is no IPv4 address or range") from exc
        bits = int(length) if length.isdecimal() and len(length) < 3 else -1 if slash else 32
        if not 0 <= bits <= 32:
            raise ValueError(f"{text[:60]!r}: /0 to /32 may stand behind an address")
        net = cls(base, bits)
        if base & ~net.mask & 0xFFFFFFFF:
            start = cls(base & net.mask, bits)
            raise ValueError(f"{text[:60]!r} does not begin where its range does: {start}")
        return net

    @property
    def mask(self) -> int:
        return 0xFFFFFFFF << (32 - self.bits) & 0xFFFFFFFF

    def __contains__(self, address: int) -> bool:
        return address & self.mask == self.base

    def within(self, other: Net) -> bool:
        return self.bits >= other.bits and self.base in other

    def overlaps(self, other: Net) -> bool:
        return self.within(other) or other.within(self)

    def __str__(self) -> str:
        return f"{show_address(self.base)}/{self.bits}"


def is_address(text: str) -> bool:
    """IPv4 or IPv6."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return True
    return False


def show_address(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4))


@dataclass(frozen=True, slots=True)
class Target:
    """One entry of an allow-list; a name or a range of addresses."""

    name: str
    """Lower case; ``*.`` in front: every name below it. Empty: see ``net``."""
    net: Net | None
    ports: tuple[int, int]
    """First and last."""

    def covers(self, name: str) -> bool:
        if self.name.startswith("*."):
            return name.endswith(self.name[1:])
        return name == self.name != ""


def parse_target(text: str) -> Target:
    """Raises NetworkInvalid, in words."""
    host, colon, ports = text.strip().lower().partition(":")
    if ":" in ports or host.startswith("["):
        raise NetworkInvalid(f"{text[:80]!r}: IPv6 can't be allowed yet; name an IPv4 address.")
    span = _parse_ports(text, ports) if colon else ALL_PORTS
    host = host.removesuffix(".")
    if _NUMBERS.fullmatch(host) or "/" in host:
        try:
            return Target("", Net.parse(host), span)
        except ValueError as exc:
            raise NetworkInvalid(f"{exc}.") from exc
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise NetworkInvalid(f"{text[:80]!r} is no HOST[:PORT], *.HOST[:PORT] or RANGE[:PORT].")
    return Target(host, None, span)


def _parse_ports(text: str, ports: str) -> tuple[int, int]:
    found = _PORTS.fullmatch(ports)
    first = int(found[1]) if found else 0
    last = int(found[2] or first) if found else 0
    if not 1 <= first <= last <= 65535:
        raise NetworkInvalid(f"{text[:80]!r}: ports are PORT or FIRST-LAST, from 1 to 65535.")
    return first, last


def check(network: Network) -> Network:
    """Return *network* if it makes sense, else raise NetworkInvalid that says what does not."""
    if network.allow and network.mode is not NetworkMode.ALLOW:
        raise NetworkInvalid(f"targets are named, but the mode is {network.mode}; use allow.")
    if network.mode is NetworkMode.ALLOW and not network.allow:
        raise NetworkInvalid(
            "the mode is allow, but no target is named, such as data.example.org:443."
        )
    if len(network.allow) > MAX_TARGETS:
        raise NetworkInvalid(f"{len(network.allow)} targets; the most is {MAX_TARGETS}.")
    for text in network.allow:
        parse_target(text)
    rate = network.bandwidth_bits
    if rate is not None and network.mode is NetworkMode.NONE:
        raise NetworkInvalid("a bandwidth is given, but no network: name targets or ask for full.")
    if rate is not None and not MIN_BITS <= rate <= MAX_BITS:
        words = f"{format_rate(MIN_BITS)} to {format_rate(MAX_BITS)}"
        raise NetworkInvalid(f"bandwidth: {format_rate(rate)} is not within {words}.")
    return network


def parse_rate(text: str) -> int:
    """``100mbit``, ``1.5g``, ``64000``: bits per second, by powers of 1000."""
    found = _RATE.fullmatch(text.strip().lower())
    if not found:
        raise NetworkInvalid(f"bandwidth: {text[:40]!r} is no number of bits/s like 100mbit.")
    return round(float(found[1]) * _RATES[found[2]])


def format_rate(bits: int) -> str:
    """As ``parse_rate`` reads it."""
    for unit in "tgmk":
        if bits >= _RATES[unit] and bits % (_RATES[unit] // 1000 or 1) == 0:
            return f"{bits / _RATES[unit]:g}{unit}bit"
    return f"{bits}bit"
