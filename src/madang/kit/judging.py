"""What live rules say to a file or an address, without a session: for trying a policy out."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from madang.wire.policy import Act, FileRule, NetRule, Sandbox, strictest
from madang.wire.policy_live import FILES_NEEDED, Target

_ACCESS: Final = frozenset({"open", "execute"})
_ACTS: Final = frozenset(Act)


def judge_live(sandbox: Sandbox, what: str, thing: str) -> tuple[bool, FileRule | NetRule | None]:
    """Whether this can be judged, and the rule that decides about it; None: it passes.

    *what* and *thing* as in ``Refusal``. Numbers of calls can't be judged, nor names in rules:
    what they stood for then is not known.
    """
    if what in _ACCESS:
        files = (r for r in strictest(sandbox.files) if _refuses_file(r, what, thing))
        return True, next(files, None)
    if what in _ACTS:
        address = _address(thing)
        if address is None:
            return False, None
        nets = [rule for rule in strictest(sandbox.nets) if rule.act == what]
        if any(_target(text).name for rule in nets for text in rule.targets):
            return False, None
        return True, next((rule for rule in nets if _refuses_address(rule, *address)), None)
    return False, None


# --- files


def _refuses_file(rule: FileRule, what: str, path: str) -> bool:
    if what not in rule.access:
        return False
    named = rule.patterns if not rule.others else (*rule.patterns, *FILES_NEEDED)
    return any(_pattern(each).fullmatch(path) for each in named) is not rule.others


@lru_cache(maxsize=4096)
def _pattern(text: str) -> re.Pattern[str]:
    """``*``: within a name; ``**``: any number of names, none too."""
    parts = "".join("(?:/.*)?" if p == "**" else "/" + _name(p) for p in text[1:].split("/"))
    return re.compile(parts, re.DOTALL)


def _name(part: str) -> str:
    return "[^/]*".join(map(re.escape, part.split("*")))


# --- addresses

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _address(text: str) -> tuple[Address, int] | None:
    """``10.0.0.5:5432``, ``[::1]:80``"""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or len(port) > 5:
        return None
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
    if address.version == 6 and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address, int(port)


def _refuses_address(rule: NetRule, address: Address, port: int) -> bool:
    return _covered(rule.targets, address, port) is not rule.others


def _covered(targets: Iterable[str], address: Address, port: int) -> bool:
    for target in map(_target, targets):
        network = target.network
        if network is None or network.version != address.version:
            continue
        if target.low <= port <= target.high and address in network:
            return True
    return False


@lru_cache(maxsize=4096)
def _target(text: str) -> Target:
    return Target(text)
