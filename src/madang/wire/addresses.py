"""Rules about addresses, compiled to two look-ups: address → class, (class, port) → verdict.

All addresses under one prefix that no rule divides further are met by the same rules: they are one
*class*. What decides at each port is found here, so that the kernel only looks it up, however many
rules there are. IPv4 lives at ``::ffff:a.b.c.d``, as sockets of version 6 name it: there is no
second name by which it could be reached.

Addresses that mean others are judged as these:

- ``connect`` to 0.0.0.0 or ``::`` goes to this machine, so it is judged as loopback.
- ``bind`` to 0.0.0.0 or ``::`` is to all addresses: a ``deny`` of any of them refuses it, an
  ``only`` must name it. ``::`` is IPv4 too (whether it is can't be seen).
- Port 0 of a ``bind`` is one that the kernel chooses: refused if one that it may choose is,
  unless ``only`` names port 0.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from madang.wire.errors import PolicyInvalid
from madang.wire.policy import Act, NetRule, Sandbox, strictest
from madang.wire.policy_live import Target, names_in

MAX_TARGETS: Final = 4096
"""Of all rules together: the guard has other things to do than to make tables."""
MAX_ENTRIES: Final = 65_536
"""Of either table."""
EPHEMERAL: Final[Ports] = (32_768, 60_999)
"""Ports that the kernel chooses from, in a new network namespace."""
PORTS: Final = 65_536
PASSES: Final = 0
"""The class that no rule refuses anything of."""

_BITS: Final = 128
_PORT_BITS: Final = 16
_MAPPED: Final = 0xFFFF << 32
_MAPPED_BITS: Final = 96

Prefix = tuple[int, int]
"""(first address, bits); IPv4 mapped."""
V6_ALL: Final[Prefix] = (0, 0)
V4_ALL: Final[Prefix] = (_MAPPED, _MAPPED_BITS)
V6_ANY: Final[Prefix] = (0, _BITS)
V4_ANY: Final[Prefix] = (_MAPPED, _BITS)
V6_LOOPBACK: Final[Prefix] = (1, _BITS)
V4_LOOPBACK: Final[Prefix] = (_MAPPED | 0x7F00_0001, _BITS)

Names = Mapping[str, Sequence[str]]
"""Name → its addresses now; none: it stands for nothing."""
NO_NAMES: Final[Names] = {}
Ports = tuple[int, int]
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Covered = Mapping[int, Sequence[Target]]
"""Rule's number → those of its targets that an address is in."""
_Segments = tuple[tuple[int, int, int], ...]
"""(first port, last port, number of the rule that decides); the rest passes."""


@dataclass(slots=True)
class Table:
    """What the kernel looks up for one kind of call."""

    prefixes: dict[Prefix, int] = field(default_factory=dict)
    """→ class."""
    ports: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(class, first port, bits) → number of the rule that decides."""


def table(
    rules: Mapping[int, NetRule], act: Act, names: Names = NO_NAMES, ephemeral: Ports = EPHEMERAL
) -> Table:
    """Of the rules about *act*; *rules*, by their numbers, may have others.

    Raises PolicyInvalid for too many.
    """
    return _Compiler(rules, act, names, ephemeral).table()


def unresolved(sandbox: Sandbox) -> Iterator[str]:
    """Names in its rules that stand for nothing, in words."""
    known = {found.name for found in sandbox.names if found.addresses}
    for rule in sandbox.nets:
        does = "allows" if rule.others else "refuses"
        for name in sorted(names_in([rule]) - known):
            yield f"policy: {rule.place} {does} nothing by {name}: it has no address now"


def look_up(found: Table, address: str, port: int) -> int | None:
    """The number of the rule that decides, as the kernel finds it: by the longest prefixes."""
    value, most = _prefix(ipaddress.ip_network(address))
    for bits in range(most, -1, -1):
        number = found.prefixes.get((value >> (_BITS - bits) << (_BITS - bits), bits))
        if number is not None:
            return _look_up_port(found, number, port)
    return None


def _look_up_port(found: Table, number: int, port: int) -> int | None:
    for bits in range(_PORT_BITS, -1, -1):
        first = port >> (_PORT_BITS - bits) << (_PORT_BITS - bits)
        if (decides := found.ports.get((number, first, bits))) is not None:
            return decides
    return None


def _prefix(network: _Network) -> Prefix:
    first = int(network.network_address)
    if network.version == 4:
        return _MAPPED | first, _MAPPED_BITS + network.prefixlen
    return first, network.prefixlen


def is_v4(prefix: Prefix) -> bool:
    return prefix[1] >= _MAPPED_BITS and prefix[0] >> 32 == _MAPPED >> 32


class _Compiler:
    def __init__(
        self, rules: Mapping[int, NetRule], act: Act, names: Names, ephemeral: Ports
    ) -> None:
        self._rules = rules
        self._binds = act is Act.BIND
        self._names = names
        self._ephemeral = ephemeral
        numbers = {id(rule): number for number, rule in rules.items() if rule.act is act}
        self._order = [numbers[id(rule)] for rule in strictest(rules[n] for n in numbers.values())]
        self._rank = {number: rank for rank, number in enumerate(self._order)}
        self._others = [number for number in self._order if rules[number].others]
        self._targets: dict[Prefix, dict[int, list[Target]]] = {}
        for number in self._order:
            for target in map(Target, rules[number].targets):
                for prefix in self._prefixes(target):
                    found = self._targets.setdefault(prefix, {})
                    found.setdefault(number, []).append(target)
        self._lengths = sorted({bits for _, bits in self._targets})
        self._classes: dict[_Segments, int] = {(): PASSES}
        self._table = Table()

    def _prefixes(self, target: Target) -> Iterator[Prefix]:
        if target.every:
            yield from (V6_ALL, V4_ALL)
            return
        networks = [ipaddress.ip_network(each) for each in self._names.get(target.name, ())]
        for prefix in map(_prefix, [target.network] if target.network else networks):
            loopback = {} if self._binds else {V4_ANY: V4_LOOPBACK, V6_ANY: V6_LOOPBACK}
            yield loopback.get(prefix, prefix)

    def table(self) -> Table:
        if not self._order:
            return self._table
        for prefix in {V6_ALL, V4_ALL, *self._targets} - {V6_ANY, V4_ANY}:
            self._add(prefix, [self._covering(prefix)])
        for prefix in (V6_ANY, V4_ANY):
            self._add(prefix, list(self._realities(prefix)))
        return self._table

    def _realities(self, wildcard: Prefix) -> Iterator[_Covered]:
        """What each address that the wildcard means is in: all must be right."""
        both = wildcard == V6_ANY
        if self._binds:
            yield self._covering_wildcard(V4_ANY)
            if both:
                yield self._covering_wildcard(V6_ANY)
        else:
            yield self._covering(V4_LOOPBACK)
            if both:
                yield self._covering(V6_LOOPBACK)

    def _covering(self, prefix: Prefix) -> _Covered:
        found: dict[int, list[Target]] = {}
        address, bits = prefix
        for length in self._lengths:
            if length > bits:
                break
            wider = (address >> (_BITS - length) << (_BITS - length), length)
            if is_v4(wider) is is_v4(prefix):
                for number, targets in self._targets.get(wider, {}).items():
                    found.setdefault(number, []).extend(targets)
        return found

    def _covering_wildcard(self, wildcard: Prefix) -> _Covered:
        """Of a ``deny``, all targets of its version count: it would be bound to these, too."""
        found = dict(self._covering(wildcard))
        for number in self._order:
            if not self._rules[number].others:
                found[number] = [
                    target
                    for prefix, rules in self._targets.items()
                    if is_v4(prefix) is is_v4(wildcard)
                    for target in rules.get(number, ())
                ]
        return found

    def _add(self, prefix: Prefix, realities: Sequence[_Covered]) -> None:
        segments = tuple(self._segments(realities))
        number = self._classes.setdefault(segments, len(self._classes))
        self._table.prefixes[prefix] = number
        if number == len(self._classes) - 1 and segments:
            for first, last, rule in segments:
                for start, bits in _split(first, last):
                    self._table.ports[number, start, bits] = rule
        if max(len(self._table.prefixes), len(self._table.ports)) > MAX_ENTRIES:
            text = f"the addresses and ports of its rules come to more than {MAX_ENTRIES} entries"
            raise PolicyInvalid(f"the sandbox policy is too large: {text}. Name fewer.")

    def _segments(self, realities: Sequence[_Covered]) -> Iterator[tuple[int, int, int]]:
        edges = {0, 1, PORTS}
        for covered in realities:
            for targets in covered.values():
                for target in targets:
                    edges |= {target.low, target.high + 1}
        concerned = {*self._others}.union(*realities)
        rules = sorted(concerned, key=self._rank.__getitem__)
        run: tuple[int, int, int] | None = None
        for first, after in pairwise(sorted(edges)):
            decides = self._decides(rules, realities, first)
            if run is not None and run[2] == decides:
                run = (run[0], after - 1, run[2])
                continue
            if run is not None:
                yield run
            run = None if decides is None else (first, after - 1, decides)
        if run is not None:
            yield run

    def _decides(
        self, rules: Sequence[int], realities: Sequence[_Covered], port: int
    ) -> int | None:
        chosen = self._binds and port == 0
        refuses: Callable[[NetRule, Iterable[Target], int], bool]
        refuses = self._refuses_choice if chosen else _refuses
        for number in rules:
            for covered in realities:
                if refuses(self._rules[number], covered.get(number, ()), port):
                    return number
        return None

    def _refuses_choice(self, rule: NetRule, covered: Iterable[Target], _port: int) -> bool:
        low, high = self._ephemeral
        if rule.others:
            return not any(t.low == 0 or (t.low <= low and t.high >= high) for t in covered)
        return any(t.low == 0 or (t.low <= high and t.high >= low) for t in covered)


def _refuses(rule: NetRule, covered: Iterable[Target], port: int) -> bool:
    """*covered*: the rule's targets that the address is in."""
    return any(target.low <= port <= target.high for target in covered) is not rule.others


def _split(first: int, last: int) -> Iterator[tuple[int, int]]:
    """(start, bits) of the fewest prefixes that make up the ports *first* to *last*."""
    while first <= last:
        size = first & -first or PORTS
        while size > last - first + 1:
            size //= 2
        yield first, _PORT_BITS + 1 - size.bit_length()
        first += size
