"""How fast somebody may guess.

Three counters are kept for each attempt: of the account, of the source address, and of both
together. Each lets some failures pass, then asks for a pause that doubles with every further one.
The pair is strict; the account alone is not, or anybody could lock out whom they like.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from typing import Final

FORGET_S: Final = 3600.0
"""Failures count as long as the next comes within this time."""
MAX_PAUSE_S: Final = 900.0
ACCOUNT_PAUSE_S: Final = 30.0
"""Longest pause where others may have made it necessary."""
SHARED_PAUSE_S: Final = 4.0
"""Longest pause of this machine's own address: through a proxy here, it is everybody's."""
_LOOPBACK: Final = frozenset({"127.0.0.1", str(ipaddress.ip_network("::1/64", strict=False))})


@dataclass(frozen=True, slots=True)
class Counter:
    subject: str
    free: int
    """Failures until the first pause."""
    most_s: float = MAX_PAUSE_S
    """Longest pause."""


def counters(account: str, source: str) -> tuple[Counter, ...]:
    """*account* is whatever was typed: stored as a hash."""
    near = network_of(source)
    shared = near in _LOOPBACK
    who = hashlib.sha256(account.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return (
        Counter(f"pair:{who}:{near}", 5, ACCOUNT_PAUSE_S if shared else MAX_PAUSE_S),
        Counter(f"source:{near}", 20, SHARED_PAUSE_S if shared else MAX_PAUSE_S),
        Counter(f"account:{who}", 50, ACCOUNT_PAUSE_S),
    )


def network_of(source: str) -> str:
    """One IPv4 address, or the /64 of an IPv6 address: what one person can have many of."""
    try:
        address = ipaddress.ip_address(source.partition("%")[0])
    except ValueError:
        return "unknown"
    if address.version == 6:
        if (mapped := getattr(address, "ipv4_mapped", None)) is not None:
            return str(mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def pause_s(counter: Counter, failures: int) -> float:
    """How long after the last failure the next attempt may come."""
    beyond = failures - counter.free
    if beyond < 0:
        return 0.0
    return min(2.0 ** min(beyond, 20), counter.most_s)


def left_s(counter: Counter, failures: int, since_s: float) -> float:
    """How long to wait still; *since_s* after the last failure."""
    if since_s > FORGET_S:
        return 0.0
    return max(0.0, pause_s(counter, failures) - max(0.0, since_s))
