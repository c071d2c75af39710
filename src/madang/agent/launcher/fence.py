"""Whom a session may talk to: programs in the kernel that judge its connects, sends and binds.

They are attached to the session's control group of version 2 and so meet every socket that is made
in it. They see the address that the kernel has already copied: no thread can change it after the
look. Two look-ups (``addresses``) decide; another set of rules is another set of tables, and one
program takes the former's place at once. The programs stay when we are gone, until the group goes:
rules hold without anybody who watches.

What judges what:

- ``connect4/6``: connect of TCP, UDP and MPTCP, and TCP's fast open.
- ``sendmsg4/6``: each send of UDP that names an address.
- ``bind4/6``: bind.
- ``sock_create``: with connect rules, protocols that send without any of these (ping, UDP-Lite).

Connections that stand are not looked at again: a new rule is for what is connected from then on.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import mmap
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

from madang.agent.launcher import bpf, cgroups
from madang.agent.launcher.bpf import Code, Map, Ring
from madang.agent.launcher.cgroups import Group
from madang.wire import addresses
from madang.wire.addresses import EPHEMERAL, Names, Ports, Table
from madang.wire.errors import PolicyUnkept
from madang.wire.policy import Act, Answer, NetRule, Resolved

TAKES: Final = "rules about addresses take root, and control groups of version 2"
PROTOCOLS: Final = (6, 17, 262)
"""TCP, UDP, MPTCP: whatever they send to an address goes by one of our programs."""

_PLACES: Final = {
    Act.CONNECT: {
        bpf.CONNECT4: "connect4", bpf.CONNECT6: "connect6",
        bpf.SENDMSG4: "sendmsg4", bpf.SENDMSG6: "sendmsg6",
    },
    Act.BIND: {bpf.BIND4: "bind4", bpf.BIND6: "bind6"},
}  # fmt: skip
_ALL_PLACES: Final = (bpf.SOCK_CREATE, *(place for places in _PLACES.values() for place in places))
_V6: Final = frozenset({bpf.CONNECT6, bpf.SENDMSG6, bpf.BIND6})
_RING_BYTES: Final = 16 * 1024
"""Little: who is refused without end shall not keep the guard busy."""
_MOST_READ: Final = 500
"""At once: a ring's worth, and some that came meanwhile."""
_RECORD: Final = struct.Struct("=QIHH16s")
"""Process and thread, number of the rule, port as the network has it, place, address."""
_VERDICT: Final = struct.Struct("=Ii")
"""Number of the rule, what the call returns: 0, or an error's number below 0."""
_ADDRESS_SIZE, _CLASS_SIZE = 20, 10
_PORT_RANGE: Final = "/proc/sys/net/ipv4/ip_local_port_range"
_MAPPED_WORD: Final = int.from_bytes(b"\0\0\xff\xff", sys.byteorder)

# Where things lie on a program's stack.
_ADDRESS_KEY, _ADDRESS = -24, -20
_CLASS_KEY, _CLASS, _PORT = -40, -36, -32
_TOLD: Final = -80
# Where they lie in what a program is given.
_IP4, _IP6, _USER_PORT, _PROTOCOL = 4, 8, 24, 12


@dataclass(frozen=True, slots=True)
class _Tables:
    classes: Map
    ports: Map


@dataclass(frozen=True, slots=True)
class _Can:
    """What a kernel's programs can do beyond judging."""

    answer: bool
    """With another error than EPERM; since 6.0."""
    tell_pid: bool


_ABILITIES: Final = (_Can(True, True), _Can(True, False), _Can(False, True), _Can(False, False))


@dataclass(frozen=True, slots=True)
class Met:
    """What a rule has met since it was last asked."""

    rule: NetRule
    what: str
    """``connect``, ``bind`` or ``socket``."""
    object: str
    """``10.0.0.5:5432``, ``[fd00::1]:80`` or ``protocol 1``."""
    pid: int
    """Of the last who tried; on the host. 0: not known."""
    times: int
    """At least: what comes faster than it is read is only refused."""


class Fence:
    """Around one control group."""

    def __init__(self, group: int) -> None:
        """*group*: descriptor of its folder, ours from now on. What is attached there already is
        an older fence's, and counts as the former rules.
        """
        self._group = group
        self._ephemeral = _ephemeral()
        self._ring = Ring(max(_RING_BYTES, mmap.PAGESIZE))
        self._programs: dict[int, int] = {}
        for place in _ALL_PLACES:
            for program in bpf.attached(group, place)[:1]:
                self._programs[place] = program
        self._numbers = itertools.count()
        self._rules: dict[int, NetRule] = {}
        self._told: Mapping[int, NetRule] = {}
        """By the numbers in records: those that count, and those before."""

    @classmethod
    def attach(
        cls, group: Group, rules: Sequence[NetRule], names: Iterable[Resolved] = ()
    ) -> Fence:
        """Raises PolicyInvalid, PolicyUnkept."""
        if group.net_folder is None:
            raise PolicyUnkept(
                f"{TAKES}. Mount them, `mount -t cgroup2 none /sys/fs/cgroup/unified` (make the "
                "folder), and start Madang's launcher again."
            )
        with ExitStack() as failed:
            try:
                folder = os.open(group.net_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                failed.callback(os.close, folder)
                fence = cls(folder)
            except OSError as exc:
                raise _unkept(exc) from exc
            failed.pop_all()
            failed.callback(fence.close)
            fence.replace(rules, names)
            failed.pop_all()
        return fence

    def fileno(self) -> int:
        """Readable when ``read`` has something to tell."""
        return self._ring.fd

    def replace(self, rules: Sequence[NetRule], names: Iterable[Resolved] = ()) -> None:
        """Let *rules* count, and only they; a call meanwhile meets the former or the new ones.

        Raises PolicyInvalid for too many, PolicyUnkept where the kernel takes no such programs; the
        former rules hold then.
        """
        numbers = {next(self._numbers): rule for rule in rules}
        try:
            programs = self._load(numbers, {each.name: each.addresses for each in names})
            self._told = self._rules | numbers
            self._exchange(self._programs, programs)
        except OSError as exc:
            raise _unkept(exc) from exc
        self._rules, self._programs = numbers, programs

    def _exchange(self, former: dict[int, int], programs: dict[int, int]) -> None:
        """Close what does not count in the end."""
        swapped: list[int] = []
        unused = programs
        try:
            for place, program in programs.items():
                bpf.attach(self._group, program, place, former.get(place))
                swapped.append(place)
            for place in former.keys() - programs.keys():
                bpf.detach(self._group, former[place], place)
            unused = former
        except OSError:
            for place in swapped:
                if place in former:
                    bpf.attach(self._group, former[place], place, programs[place])
                else:
                    bpf.detach(self._group, programs[place], place)
            raise
        finally:
            for program in unused.values():
                os.close(program)

    def _load(self, rules: Mapping[int, NetRule], names: Names) -> dict[int, int]:
        """Place → a program for it."""
        found: dict[int, int] = {}
        with ExitStack() as maps, ExitStack() as failed:
            for act, places in _PLACES.items():
                if not any(rule.act is act for rule in rules.values()):
                    continue
                table = addresses.table(rules, act, names, self._ephemeral)
                tables = _tables(maps, table, rules)
                for place, name in places.items():
                    found[place] = _load(bpf.SOCK_ADDR, place, name, partial(self._judge, tables))
                    failed.callback(os.close, found[place])
            if (blamed := _blamed(rules)) is not None:
                make = partial(self._judge_protocol, blamed, rules[blamed])
                found[bpf.SOCK_CREATE] = _load(bpf.SOCK, bpf.SOCK_CREATE, "socket", make)
            failed.pop_all()
        return found

    # -- what runs in the kernel -----------------------------------------------------------------

    def _judge(self, tables: _Tables, place: int, can: _Can) -> Code:
        """Address → class, class and port → verdict; nothing found: it passes."""
        code = Code()
        code.move(6, 1)
        code.put32(_ADDRESS_KEY, 128)
        if place in _V6:
            for word in range(0, 16, 4):
                code.load32(1, 6, _IP6 + word)
                code.store32(_ADDRESS + word, 1)
        else:
            code.put32(_ADDRESS, 0)
            code.put32(_ADDRESS + 4, 0)
            code.put32(_ADDRESS + 8, _MAPPED_WORD)
            code.load32(1, 6, _IP4)
            code.store32(_ADDRESS + 12, 1)
        _look_up(code, tables.classes, _ADDRESS_KEY)
        code.if_equal(0, 0, "closed")  # Every address has a class.
        code.load32(1, 0, 0)
        code.put32(_CLASS_KEY, 48)
        code.store32(_CLASS, 1)
        code.load32(1, 6, _USER_PORT)
        code.store16(_PORT, 1)
        _look_up(code, tables.ports, _CLASS_KEY)
        code.if_equal(0, 0, "passes")
        code.load32(7, 0, 0)
        code.load32(8, 0, 4)
        self._tell(code, place, can)
        code.if_equal(8, 0, "passes")
        if can.answer:
            code.move(1, 8)
            code.call(bpf.SET_RETVAL)
        code.label("closed")
        code.leave(0)
        code.label("passes")
        code.leave(1)
        return code

    def _judge_protocol(self, number: int, rule: NetRule, place: int, can: _Can) -> Code:
        code = Code()
        code.load32(9, 1, _PROTOCOL)
        for protocol in PROTOCOLS:
            code.if_equal(9, protocol, "passes")
        code.set(7, number)
        code.store32(_ADDRESS, 9)
        for word in range(4, 16, 4):
            code.put32(_ADDRESS + word, 0)
        code.put16(_PORT, 0)
        self._tell(code, place, can)
        if can.answer:
            code.set(1, -rule.code)
            code.call(bpf.SET_RETVAL)
        code.leave(0)
        code.label("passes")
        code.leave(1)
        return code

    def _tell(self, code: Code, place: int, can: _Can) -> None:
        """Register 7: the rule's number. A full ring is nobody's error."""
        if can.tell_pid:
            code.call(bpf.GET_PID)
        else:
            code.set(0, 0)
        code.store64(_TOLD, 0)
        code.store32(_TOLD + 8, 7)
        code.load16(1, 10, _PORT)
        code.store16(_TOLD + 12, 1)
        code.put16(_TOLD + 14, place)
        for word in range(0, 16, 4):
            code.load32(1, 10, _ADDRESS + word)
            code.store32(_TOLD + 16 + word, 1)
        code.map(1, self._ring)
        code.stack(2, _TOLD)
        code.set(3, _RECORD.size)
        code.set(4, 0)
        code.call(bpf.RINGBUF_OUTPUT)

    # -- what it tells ---------------------------------------------------------------------------

    def read(self) -> list[Met]:
        """What rules have met since the last time; some of it may be told the next time."""
        times: Counter[tuple[NetRule, str, str]] = Counter()
        pids: dict[tuple[NetRule, str, str], int] = {}
        for record in itertools.islice(self._ring.read(), _MOST_READ):
            task, number, port, place, address = _RECORD.unpack(record)
            rule = self._told.get(number)
            if rule is not None:
                key = (rule, *_said(place, address, port))
                times[key] += 1
                pids[key] = task >> 32
        return [Met(*key, pids[key], count) for key, count in times.items()]

    def close(self) -> None:
        """The programs stay attached."""
        self._ring.close()
        for fd in (*self._programs.values(), self._group):
            os.close(fd)
        self._programs = {}
        self._group = -1


def _unkept(exc: OSError) -> PolicyUnkept:
    return PolicyUnkept(
        f"{TAKES}; it refused: {exc.strerror}. Start `madang up` as root; the kernel needs "
        "CONFIG_CGROUP_BPF."
    )


def possible() -> bool:
    """Whether this machine has what rules about addresses take."""
    code = Code()
    code.leave(1)
    try:
        os.close(bpf.load(bpf.SOCK_ADDR, bpf.CONNECT4, code.bytes(), "madang_probe"))
    except OSError:
        return False
    return cgroups.has_v2()


def _ephemeral() -> Ports:
    """Ports that the kernel may choose: ours, and those of a new network namespace."""
    low, high = map(int, cgroups.read(_PORT_RANGE).split() or EPHEMERAL)
    return min(low, EPHEMERAL[0]), max(high, EPHEMERAL[1])


def _tables(maps: ExitStack, table: Table, rules: Mapping[int, NetRule]) -> _Tables:
    """*table* as maps of the kernel, which *maps* closes."""
    classes = Map(bpf.LPM_TRIE, _ADDRESS_SIZE, 4, max(1, len(table.prefixes)))
    maps.callback(classes.close)
    ports = Map(bpf.LPM_TRIE, _CLASS_SIZE, _VERDICT.size, max(1, len(table.ports)))
    maps.callback(ports.close)
    for (first, bits), number in table.prefixes.items():
        key = struct.pack("=I", bits) + first.to_bytes(16, "big")
        classes.put(key, struct.pack("=I", number))
    for (number, port, bits), decides in table.ports.items():
        rule = rules[decides]
        key = struct.pack("=II", 32 + bits, number) + port.to_bytes(2, "big")
        returned = 0 if rule.answer is Answer.LOG else -rule.code
        ports.put(key, _VERDICT.pack(decides, returned))
    return _Tables(classes, ports)


def _look_up(code: Code, table: Map, key: int) -> None:
    code.map(1, table)
    code.stack(2, key)
    code.call(bpf.LOOKUP)


def _load(kind: int, place: int, name: str, make: Callable[[int, _Can], Code]) -> int:
    """With what this kernel can of the things that we would like."""
    for can in _ABILITIES[:-1]:
        with contextlib.suppress(OSError):
            return bpf.load(kind, place, make(place, can).bytes(), f"madang_{name}")
    return bpf.load(kind, place, make(place, _ABILITIES[-1]).bytes(), f"madang_{name}")


def _blamed(rules: Mapping[int, NetRule]) -> int | None:
    """The rule that refuses protocols which could pass the others by."""
    refusing = (
        number
        for number, rule in rules.items()
        if rule.act is Act.CONNECT and rule.answer is not Answer.LOG
    )
    return next(refusing, None)


def _said(place: int, address: bytes, port: int) -> tuple[str, str]:
    """(what was done, with what), in words."""
    if place == bpf.SOCK_CREATE:
        return "socket", f"protocol {int.from_bytes(address[:4], sys.byteorder)}"
    found = ipaddress.IPv6Address(address)
    shown = found.ipv4_mapped or f"[{found}]"
    what = next(act for act, places in _PLACES.items() if place in places)
    return what.value, f"{shown}:{socket.ntohs(port)}"
