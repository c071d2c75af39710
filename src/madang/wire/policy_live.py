"""What rules about files, addresses, counts and answers may say. For texts and for the launcher."""

from __future__ import annotations

import errno
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from madang.wire.errors import PolicyInvalid
from madang.wire.policy import (
    MAX_ADDRESSES,
    MAX_CALLS,
    MAX_PATTERN,
    MAX_PATTERNS,
    Access,
    Answer,
    AnswerRule,
    CountRule,
    FileRule,
    LiveRule,
    NetRule,
    Resolved,
    WatchRule,
    WriteRule,
)
from madang.wire.policy_base import known_calls, near_call

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "exec": ("execve", "execveat"),
    "fork": ("clone", "fork", "vfork"),
    "open": ("open", "openat", "openat2", "creat"),
    "connect": ("connect",),
}
"""What ``of`` stands for."""
UNCOUNTED: Final = frozenset(
    "brk close close_range epoll_wait epoll_pwait exit exit_group futex madvise mmap mprotect "
    "mremap munmap prctl read recvmsg restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn "
    "seccomp sendmsg write".split()
)
"""Calls that a session's own first process makes while nobody can answer yet."""
ANSWERED: Final[Mapping[str, tuple[str, ...]]] = {
    "uname": ("nodename", "release", "version"),
    "sched_getaffinity": ("cpus",),
    "sysinfo": ("mem_bytes",),
}
"""Calls whose answer can be another → what of it."""
FILES_NEEDED: Final = (
    "/dev/**", "/proc/**", "/sys/**", "/etc/ld.so.cache", "/etc/ld.so.preload",
    "/lib*/**/ld-linux*", "/usr/lib*/**/ld-linux*", "/lib*/ld-linux*", "/usr/lib*/ld-linux*",
    "/lib*/**/libc.so*", "/usr/lib*/**/libc.so*", "/lib*/ld-musl*", "/usr/lib*/ld-musl*",
)  # fmt: skip
"""Files that no program can do without: the loader, the C library, what the kernel makes up."""

MAX_LIMIT: Final = 1_000_000_000
MAX_RATE_LIMIT: Final = 10_000
"""Of a rule with ``per_s``: each call is remembered for so long."""
MIN_PER_S, MAX_PER_S = 0.01, 86_400
MAX_CPUS: Final = 1024
MAX_MEM_BYTES: Final = 2**50
_MAX_UTS: Final = 64
_PORT: Final = 65535
_TARGET: Final = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\](?:/(?P<six_bits>[0-9]{1,3}))?"
    r"|(?P<bare>[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)(?:/(?P<bare_bits>[0-9]{1,3}))?"
    r"|(?P<host>[^:/\[\]]{1,253})(?:/(?P<bits>[0-9]{1,2}))?)"
    r"(?::(?P<low>[0-9]{1,5})(?:-(?P<high>[0-9]{1,5}))?)?",
    re.ASCII,
)
_NAME: Final = re.compile(
    r"(?=.{1,253}\.?$)(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\.)*"
    r"[A-Za-z](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\.?",
    re.ASCII,
)
_NUMBERS: Final = re.compile(r"[0-9.]+", re.ASCII)


class Target:
    """A target of a NetRule, taken apart: a network, a name or ``*``, and ports."""

    __slots__ = ("every", "high", "low", "name", "network")

    def __init__(self, text: str) -> None:
        """Raises PolicyInvalid."""
        found = _TARGET.fullmatch(text)
        if found is None or len(text) > MAX_PATTERN:
            raise PolicyInvalid(f"{text[:60]!r} is no address; like 10.0.0.0/8:5432 or [::1]:80")
        self.low, self.high = _ports(text, found["low"], found["high"])
        self.name = ""
        self.network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
        host = found["six"] or found["bare"] or found["host"]
        bits = found["six_bits"] or found["bare_bits"] or found["bits"]
        self.every = host == "*" and not bits
        """Whether it is all addresses, of both versions."""
        if self.every:
            return
        if found["host"] and not _NUMBERS.fullmatch(host):
            if not _NAME.fullmatch(host) or bits:
                raise PolicyInvalid(f"{host[:60]!r} is no address and no name")
            self.name = host.rstrip(".").lower()
            return
        try:
            self.network = ipaddress.ip_network(f"{host}/{bits}" if bits else host, strict=True)
        except ValueError as exc:
            raise PolicyInvalid(f"{text[:60]!r}: {exc}") from exc


def _ports(text: str, low: str | None, high: str | None) -> tuple[int, int]:
    if low is None:
        return 0, _PORT
    first = int(low)
    last = int(high) if high is not None else first
    if not first <= last <= _PORT:
        raise PolicyInvalid(f"{text[:60]!r}: ports are 0 to {_PORT}, the lower one first")
    return first, last


def check_resolved(found: Resolved) -> None:
    """Raises PolicyInvalid."""
    target = Target(found.name)
    if target.name != found.name or len(found.addresses) > MAX_ADDRESSES:
        raise PolicyInvalid(
            f"{found.name[:60]!r} is no name with at most {MAX_ADDRESSES} addresses"
        )
    for address in found.addresses:
        try:
            ipaddress.ip_network(f"{address}/{128 if ':' in address else 32}")
        except ValueError as exc:
            raise PolicyInvalid(f"{address[:60]!r} is no address of {found.name}") from exc


def names_in(rules: Iterable[NetRule]) -> set[str]:
    """That are to be resolved."""
    targets = (target for rule in rules for target in map(Target, rule.targets))
    return {target.name for target in targets if target.name}


def check_pattern(pattern: str) -> str:
    """An absolute path without ``.``, ``..`` or empty parts. Raises PolicyInvalid."""
    shown = repr(pattern[:60])
    if not pattern.startswith("/") or len(pattern) > MAX_PATTERN:
        raise PolicyInvalid(f"{shown}: a path is absolute and at most {MAX_PATTERN} characters")
    if not pattern.isprintable():
        raise PolicyInvalid(f"{shown}: a path has printable characters only")
    parts = pattern[1:].split("/")
    if pattern != "/" and any(part in {"", ".", ".."} for part in parts):
        raise PolicyInvalid(f"{shown}: a path has no empty parts, no `.` and no `..`")
    if any("**" in part and part != "**" for part in parts):
        raise PolicyInvalid(f"{shown}: `**` stands for whole folders: /a/**/b or /a/**")
    return pattern


def check_folder(folder: str) -> str:
    """Of a write rule. Raises PolicyInvalid."""
    if "*" in check_pattern(folder):
        raise PolicyInvalid(f"{folder[:60]!r}: write rules take folders and files, no patterns")
    return folder


def check_live(rule: LiveRule | WriteRule) -> None:
    """What no rule may say. Raises PolicyInvalid, in words without the place."""
    if isinstance(rule, FileRule):
        _check_file(rule)
    elif isinstance(rule, WriteRule):
        _each(rule.folders, check_folder)
        if rule.answer is not Answer.ERRNO or rule.code != errno.EACCES:
            raise PolicyInvalid('a write rule takes no `with`: the kernel answers "EACCES"')
    elif isinstance(rule, NetRule):
        _each(rule.targets, Target, least=not rule.others)
        if rule.answer is Answer.KILL:
            raise PolicyInvalid('a rule about addresses takes "log" or an error, not "kill"')
    elif isinstance(rule, WatchRule):
        if rule.answer is not Answer.LOG:
            raise PolicyInvalid("a rule that watches refuses nothing; it takes no `with`")
    elif isinstance(rule, CountRule):
        _check_count(rule)
    else:
        _check_answer(rule)


def _each(items: Iterable[str], check: Callable[[str], object], least: int = 1) -> None:
    """*least* 0: ``only = []``, nothing but what every program needs."""
    found = tuple(items)
    if not least <= len(found) <= MAX_PATTERNS:
        raise PolicyInvalid(f"a rule names {int(least)} to {MAX_PATTERNS}")
    for item in found:
        check(item)


def _check_file(rule: FileRule) -> None:
    _each(rule.patterns, check_pattern, least=not rule.others)
    if not rule.access or not set(rule.access) <= set(Access):
        raise PolicyInvalid('access takes "open" and "execute"')
    if rule.answer is Answer.ERRNO and rule.code != errno.EPERM:
        raise PolicyInvalid('a rule about files answers "EPERM", "kill" or "log": no other error')


def _check_count(rule: CountRule) -> None:
    if rule.of and rule.calls != GROUPS.get(rule.of):
        raise PolicyInvalid(f"of takes one of {', '.join(GROUPS)}")
    if not 1 <= len(rule.calls) <= MAX_CALLS:
        raise PolicyInvalid(f"a rule names 1 to {MAX_CALLS} system calls")
    for call in rule.calls:
        if call not in known_calls():
            raise PolicyInvalid(f"{call[:60]!r} is no system call{near_call(call)}")
        if call in UNCOUNTED:
            raise PolicyInvalid(f"{call} can't be counted: the session's own start makes it")
    most = MAX_LIMIT if rule.per_s is None else MAX_RATE_LIMIT
    if not 1 <= rule.limit <= most:
        raise PolicyInvalid(f"limit is 1 to {most}")
    if rule.per_s is not None and not MIN_PER_S <= rule.per_s <= MAX_PER_S:
        raise PolicyInvalid(f"per_s is {MIN_PER_S} to {MAX_PER_S} seconds")


def _check_answer(rule: AnswerRule) -> None:
    if rule.call not in ANSWERED:
        raise PolicyInvalid(f"call takes one of {', '.join(ANSWERED)}")
    if rule.answer is not Answer.ERRNO or rule.code != errno.EPERM:
        raise PolicyInvalid("a rule that answers takes no `with`")
    given = {
        key for keys in ANSWERED.values() for key in keys if getattr(rule, key) not in {None, ""}
    }
    if not given or not given <= set(ANSWERED[rule.call]):
        known = ", ".join(ANSWERED[rule.call])
        raise PolicyInvalid(f"an answer to {rule.call} says some of {known}, and nothing else")
    for key in ("nodename", "release", "version"):
        text = getattr(rule, key)
        if len(text) > _MAX_UTS or not (text.isascii() and (text.isprintable() or not text)):
            raise PolicyInvalid(f"{key}: at most {_MAX_UTS} printable ASCII characters")
    if rule.cpus is not None and not 1 <= rule.cpus <= MAX_CPUS:
        raise PolicyInvalid(f"cpus is 1 to {MAX_CPUS}")
    if rule.mem_bytes is not None and not 1 <= rule.mem_bytes <= MAX_MEM_BYTES:
        raise PolicyInvalid(f"mem_bytes is 1 to {MAX_MEM_BYTES}")
