"""Both tables of rules (``man 8 nft``): the machine's for all sessions, and a session's own."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from madang.agent.launcher.network import netlink
from madang.agent.launcher.network.netlink import ACK, CREATE, Netlink, attribute, nest
from madang.wire.network import Net, NetworkMode, Refusal, Target, show_address

OWN_TABLE: Final = "madang"
RESOLVER: Final = "127.0.0.53"
"""Where a session's own programs ask for names."""
ALWAYS_FORBIDDEN: Final = tuple(
    Net.parse(text)
    for text in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")
)
"""This machine, metadata services and other neighbours on the link, everybody at once."""
MAX_CONNECTIONS: Final = 4096
"""Of one session at once: they take room in the machine's table of connections."""
MAX_LEARNT: Final = 4096
"""Addresses of names that are open at once, for each range of ports."""
MAX_REFUSED: Final = 128
"""Refused addresses that are told apart."""
QUESTIONS_PER_S: Final = 200
_NFT_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin"
_INET, _IPV4 = 1, 2
_SUBSYSTEM: Final = 10
_GET_TABLE, _NEW_ELEMENT, _GET_ELEMENTS, _GET_OBJECT = (
    _SUBSYSTEM << 8 | number for number in (1, 12, 13, 19)
)
_DELETE_ELEMENT: Final = _SUBSYSTEM << 8 | 14
_BATCH_BEGIN, _BATCH_END = 16, 17
_COUNTER: Final = 1
_ENOENT, _MOST_WORDS, _MOST_RULES = 2, 500, 1 << 22


def nft_path() -> str | None:
    return shutil.which("nft", path=_NFT_PATH)


def load(text: str) -> None:
    """Put all of it in force in this namespace, or nothing. Raises OSError."""
    _nft("-f", "-", text=text)


def in_force() -> str:
    """All rules of this namespace, whosever they are. Raises OSError."""
    return _nft("list", "ruleset")


def _nft(*arguments: str, text: str = "") -> str:
    path = nft_path()
    if path is None:
        raise FileNotFoundError(_ENOENT, "nft is not installed")
    given, said, wrong = (os.memfd_create(name) for name in ("given", "said", "wrong"))
    try:
        os.write(given, text.encode())
        os.lseek(given, 0, os.SEEK_SET)
        fds = enumerate((given, said, wrong))
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in fds]
        pid = os.posix_spawn(path, [path, *arguments], {}, file_actions=actions)
        if os.waitpid(pid, 0)[1]:
            words = os.pread(wrong, _MOST_WORDS, 0).decode(errors="replace")
            raise OSError(f"nft refused: {' '.join(words.split())}")
        return os.pread(said, _MOST_RULES, 0).decode(errors="replace")
    finally:
        for fd in (given, said, wrong):
            os.close(fd)


# -- the machine's ---------------------------------------------------------------------------


def machine_table(table: str, prefix: str, pool: Net, forbidden: Iterable[Net]) -> str:
    """*prefix*: how the machine's ends of sessions' interfaces begin. Replaces what was there."""
    sessions = f'"{prefix}*"'
    return f"""
table inet {table} {{}}
delete table inet {table}
table inet {table} {{
    chain arriving {{
        type filter hook prerouting priority raw; policy accept;
        iifname {sessions} meta nfproto != ipv4 drop
        iifname {sessions} ip hdrlength > 5 drop comment "options, such as source routes"
        iifname {sessions} fib saddr . iif oif 0 drop comment "a source that is not its own"
        iifname {sessions} fib daddr type != unicast reject with icmpx admin-prohibited \
            comment "this machine, before others' rules can redirect it"
    }}
    chain for_us {{
        type filter hook input priority filter - 10; policy accept;
        iifname {sessions} reject with icmpx admin-prohibited
    }}
    chain from_us {{
        type filter hook output priority filter - 10; policy accept;
        oifname {sessions} ct state new drop
    }}
    chain through {{
        type filter hook forward priority filter - 10; policy accept;
        iifname {sessions} oifname {sessions} reject with icmpx admin-prohibited
        iifname {sessions} ip daddr {{ {_listed(forbidden)} }} reject with icmpx admin-prohibited
        oifname {sessions} ct state != {{ established, related }} drop
    }}
    chain leaving {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {pool} oifname != {sessions} masquerade
    }}
}}
"""


def _listed(nets: Iterable[Net]) -> str:
    """Ranges without those that lie in others: a set of nft takes each address once."""
    kept: list[Net] = []
    for net in sorted(set(nets)):
        if not kept or not net.within(kept[-1]):
            kept.append(net)
    return ", ".join(map(str, kept))


def has_table(filters: Netlink, table: str) -> bool:
    try:
        filters.get(_GET_TABLE, _general(_INET) + attribute(1, table), f"table {table}")
    except OSError as exc:
        if exc.errno != _ENOENT:
            raise
        return False
    return True


# -- a session's -----------------------------------------------------------------------------


def port_ranges(targets: Sequence[Target]) -> list[tuple[int, int]]:
    """Those of names; ``learnt0``, ``learnt1``, … hold the addresses for each."""
    return sorted({target.ports for target in targets if target.net is None})


def session_table(
    mode: NetworkMode, targets: Sequence[Target], address: int, forbidden: Iterable[Net]
) -> str:
    """*address*: the session's own."""
    ranges = port_ranges(targets)
    opened = [
        f"ip daddr {target.net} meta l4proto {{ tcp, udp }} th dport {_ports(target.ports)} accept"
        for target in targets
        if target.net is not None
    ]
    opened += [
        f"ip daddr @learnt{number} meta l4proto {{ tcp, udp }} th dport {_ports(ports)} accept"
        for number, ports in enumerate(ranges)
    ]
    if mode is NetworkMode.FULL:
        opened = ["meta l4proto { tcp, udp, icmp } accept"]
    sets = "".join(
        f"    set learnt{number} {{ type ipv4_addr; flags timeout; size {MAX_LEARNT}; }}\n"
        for number in range(len(ranges))
    )
    allowed = "\n        ".join(opened)
    return f"""
table inet {OWN_TABLE} {{
{sets}    set refused {{
        type ipv4_addr . inet_proto . inet_service; flags dynamic; size {MAX_REFUSED};
    }}
    counter refused {{}}
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        meta nfproto ipv4 ct state established,related accept
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oifname "lo" goto own
        meta nfproto != ipv4 goto refuse
        ip saddr != {show_address(address)} goto refuse
        ip hdrlength > 5 goto refuse
        ct state established,related accept
        ip daddr {{ {_listed(forbidden)} }} goto refuse
        ct state new ct count over {MAX_CONNECTIONS} goto refuse
        {allowed}
        goto refuse
    }}
    chain own {{
        ip daddr {RESOLVER} th dport 53 limit rate over {QUESTIONS_PER_S}/second burst 400 packets drop
        accept
    }}
    chain refuse {{
        counter name refused
        meta nfproto ipv4 meta l4proto {{ tcp, udp }} \\
            update @refused {{ ip daddr . meta l4proto . th dport counter }}
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }}
}}
"""  # noqa: E501


def _ports(ports: tuple[int, int]) -> str:
    first, last = ports
    return str(first) if first == last else f"{first}-{last}"


def learn(filters: Netlink, number: int, addresses: Sequence[int], seconds: int) -> None:
    """Open the way to *addresses* for so long, from now. Raises OSError when the set is full."""
    elements = [
        nest(1, nest(1, attribute(1, address.to_bytes(4))), _timeout(seconds))
        for address in addresses
    ]
    body = _general(_INET) + attribute(1, OWN_TABLE) + attribute(2, f"learnt{number}")
    body += nest(3, *elements)
    try:  # What is known keeps its old time unless it goes first.
        _apply(filters, (_DELETE_ELEMENT, 0, body), (_NEW_ELEMENT, CREATE, body))
    except OSError as exc:
        if exc.errno != _ENOENT:
            raise
        _apply(filters, (_NEW_ELEMENT, CREATE, body))


def _timeout(seconds: int) -> bytes:
    return attribute(4, struct.pack("!Q", seconds * 1000))


def _apply(filters: Netlink, *changes: tuple[int, int, bytes]) -> None:
    edge = struct.pack("!BBH", 0, 0, _SUBSYSTEM)
    data = filters.message(_BATCH_BEGIN, 0, edge)
    for kind, flags, body in changes[:-1]:
        data += filters.message(kind, flags, body)
    kind, flags, body = changes[-1]
    last = filters.message(kind, flags | ACK, body)
    number = filters.number
    data += last + filters.message(_BATCH_END, 0, edge)
    filters.send(data, number, "addresses of names")


def refused(filters: Netlink) -> tuple[list[Refusal], int]:
    """(what was refused, how many packets in all) so far."""
    body = _general(_INET) + attribute(1, OWN_TABLE) + attribute(2, "refused")
    found = []
    for answer in filters.dump(_GET_ELEMENTS, body, "what was refused"):
        elements = netlink.attributes(dict(netlink.attributes(answer[4:])).get(3, b""))
        found += [_refusal(dict(netlink.attributes(element))) for _, element in elements]
    body = _general(_INET) + attribute(1, OWN_TABLE) + attribute(2, "refused")
    answer = filters.get(_GET_OBJECT, body + attribute(3, _big(_COUNTER)), "what was refused")
    data = dict(netlink.attributes(dict(netlink.attributes(answer[4:])).get(4, b"")))
    return found, int.from_bytes(data.get(2, b""))


def _refusal(element: dict[int, bytes]) -> Refusal:
    key = dict(netlink.attributes(element[1]))[1]
    expression = dict(netlink.attributes(element.get(7, b"")))
    counted = dict(netlink.attributes(expression.get(2, b"")))
    protocol = "tcp" if key[4] == 6 else "udp"
    port = int.from_bytes(key[8:10])
    target = f"{show_address(int.from_bytes(key[:4]))}:{port}/{protocol}"
    return Refusal(target=target, count=int.from_bytes(counted.get(2, b"")))


def _general(family: int) -> bytes:
    return struct.pack("!BBH", family, 0, 0)


def _big(number: int) -> bytes:
    return struct.pack("!I", number)
