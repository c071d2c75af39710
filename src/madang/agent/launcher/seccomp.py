"""The system calls a session may make: a classic BPF program, built here and installed by prctl.

The list is an allow-list: calls that the tables know and nothing below names are allowed; numbers
that the tables don't know (newer calls, the x32 interface) answer ENOSYS, which libraries take as
"old kernel". The filter is the last of several fences: a session has no capabilities, its own
uid and namespaces, and a read-only root. What stands here is therefore what an ordinary user could
reach in the kernel but a session has no business with; Docker's and systemd's defaults agree with
nearly all of it.

Program: check the architecture, then a binary search over ranges of numbers, whose leaves are
answers or checks of single arguments. A call costs about nine instructions.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import syscalls
from madang.agent.launcher.seccomp_tables import numbers

AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

ALLOW: Final = 0x7FFF0000
KILL_PROCESS: Final = 0x80000000
ERRNO: Final = 0x00050000

DENIED: Final[Mapping[str, tuple[int, str]]] = {
    name: (code, why)
    for code, names, why in (
        (errno.EPERM, "mount umount2 pivot_root chroot", "would change what it sees as files"),
        (
            errno.EPERM,
            "open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr",
            "the same by the newer interface",
        ),
        (errno.EPERM, "setns", "entering namespaces"),
        (errno.ENOSYS, "clone3", "hides its flags behind a pointer; libraries then use clone"),
        (errno.EPERM, "kexec_load kexec_file_load reboot", "replaces or stops the kernel"),
        (errno.EPERM, "init_module finit_module delete_module", "loads code into the kernel"),
        (errno.EPERM, "bpf perf_event_open", "programs and counters inside the kernel"),
        (errno.EPERM, "userfaultfd", "stalls the kernel inside a copy: makes races winnable"),
        (errno.ENOSYS, "io_uring_setup io_uring_enter io_uring_register", "passes this filter by"),
        (errno.EPERM, "keyctl add_key request_key", "key rings are not separated by namespaces"),
        (errno.EPERM, "open_by_handle_at name_to_handle_at", "opens files past any root"),
        (errno.EPERM, "fanotify_init fanotify_mark", "watches other people's file accesses"),
        (errno.EPERM, "acct quotactl quotactl_fd swapon swapoff", "administration of the machine"),
        (errno.EPERM, "settimeofday clock_settime clock_adjtime", "the machine's clock"),
        (errno.EPERM, "syslog lookup_dcookie", "tells kernel addresses and other users' paths"),
        (errno.EPERM, "iopl ioperm modify_ldt", "hardware ports, exotic segments"),
        (errno.EPERM, "vhangup sethostname setdomainname", "acts on more than the caller"),
        (
            errno.ENOSYS,
            "_sysctl afs_syscall create_module epoll_ctl_old epoll_wait_old",
            "obsolete",
        ),
        (errno.ENOSYS, "get_kernel_syms getpmsg nfsservctl putpmsg query_module", "obsolete"),
        (errno.ENOSYS, "security sysfs tuxcall uselib ustat vserver", "obsolete"),
    )
    for name in names.split()
}
"""Name → errno and why. A name that an architecture lacks is skipped."""


@dataclass(frozen=True, slots=True)
class AnyBit:
    """Refuse the call if the argument's low word has any of ``mask``."""

    argument: int
    mask: int
    code: int


@dataclass(frozen=True, slots=True)
class NotIn:
    """Refuse the call unless the argument's low word is one of ``values``.

    ``when``: the check applies only where argument 0 is one of these.
    """

    argument: int
    values: tuple[int, ...]
    code: int
    when: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class In:
    """Refuse the call if the argument's low word is one of ``values``."""

    argument: int
    values: tuple[int, ...]
    code: int


Check = AnyBit | NotIn | In

NEW_NAMESPACES: Final = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
CLONE_NEWTIME: Final = 0x80
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
IP_PROTOCOLS: Final = (0, 1, 6, 17, 58, 136, 262)
"""Any, ICMP, TCP, UDP, ICMPv6, UDP-Lite, MPTCP; others load rarely used kernel modules."""
NETLINK_ROUTE: Final = 0
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB = 0x40000, 0x4, 0o4000
PERSONALITIES: Final = (0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
"""Linux, 32-bit Linux, either with an old version number, without address randomisation (for
debuggers), and the question which one it is."""

_FAMILIES: Final = NotIn(0, (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK), errno.EAFNOSUPPORT)

CHECKED: Final[Mapping[str, tuple[Check, ...]]] = {
    # A user namespace would give it capabilities over kernel code that expects an administrator.
    "clone": (AnyBit(0, NEW_NAMESPACES, errno.EPERM),),
    "unshare": (AnyBit(0, NEW_NAMESPACES | CLONE_NEWTIME, errno.EPERM),),
    # VSOCK reaches the hypervisor, ALG and others are attack surface, PACKET reads the wire.
    "socket": (
        _FAMILIES,
        NotIn(2, IP_PROTOCOLS, errno.EPROTONOSUPPORT, when=(AF_INET, AF_INET6)),
        NotIn(2, (NETLINK_ROUTE,), errno.EPROTONOSUPPORT, when=(AF_NETLINK,)),
    ),
    "socketpair": (_FAMILIES,),
    # Typing into somebody's terminal. The kernel compares the low 32 bits, so do we.
    "ioctl": (In(1, (TIOCSTI, TIOCLINUX), errno.EPERM),),
    # Reserved for others by the administrator, and outside of the session's memory limit. Answered
    # as by a kernel without them; transparent ones are not meant.
    "mmap": (AnyBit(3, MAP_HUGETLB, errno.EINVAL),),
    "memfd_create": (AnyBit(1, MFD_HUGETLB, errno.EINVAL),),
    "shmget": (AnyBit(2, SHM_HUGETLB, errno.EINVAL),),
    "personality": (NotIn(0, PERSONALITIES, errno.EPERM),),
}

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_INSTRUCTION: Final = struct.Struct("<HBBI")
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16

Answer = int | tuple[Check, ...]


class _Assembler:
    """Instructions, last one first: so each jump's target is known when the jump is written."""

    def __init__(self) -> None:
        self._reversed: list[tuple[int, int, int, int]] = []
        self._returns: dict[int, int] = {}

    def emit(self, code: int, value: int, yes: int = 0, no: int = 0) -> int:
        """Put an instruction in front; *yes* and *no* are labels. Its own label."""
        here = len(self._reversed)
        if code in {_EQUAL, _AT_LEAST, _ANY_BIT}:
            yes, no = here - yes, here - no
            self._reversed.append((code, yes, no, value))
        else:
            self._reversed.append((code, 0, 0, value))
        return here + 1

    def jump(self, label: int) -> int:
        return self.emit(_JUMP, len(self._reversed) - label)

    def answer(self, value: int) -> int:
        """Label of an instruction that returns *value*, near enough for a short jump."""
        known = self._returns.get(value)
        if known is None or len(self._reversed) - known > 200:
            known = self._returns[value] = self.emit(_RETURN, value)
        return known

    def program(self) -> bytes:
        return b"".join(_INSTRUCTION.pack(*parts) for parts in reversed(self._reversed))


def program(arch: str | None = None) -> bytes:
    """The filter for *arch* (``x86_64`` or ``aarch64``; default: this machine) as sock_filters."""
    arch = arch or platform.machine()
    if arch not in AUDIT_ARCH:
        raise ValueError(f"no system call table for {arch!r}")
    asm = _Assembler()
    search = _search(asm, _ranges(answers(arch)))
    start = asm.emit(_LOAD, _NR_OFFSET)
    assert start == search + 1, "the search follows the load"
    foreign = asm.answer(KILL_PROCESS)
    native = asm.jump(start)
    asm.emit(_EQUAL, AUDIT_ARCH[arch], native, foreign)
    asm.emit(_LOAD, _ARCH_OFFSET)
    return asm.program()


def answers(arch: str) -> dict[int, Answer]:
    """System call number → the filter's answer, or the checks that decide."""
    found: dict[int, Answer] = {}
    for name, number in numbers(arch).items():
        if name in DENIED:
            found[number] = ERRNO | DENIED[name][0]
        else:
            found[number] = CHECKED.get(name, ALLOW)
    return found


def _ranges(found: Mapping[int, Answer]) -> list[tuple[int, Answer]]:
    """First number of each run of equal answers; the last run is the unknown rest."""
    runs: list[tuple[int, Answer]] = []
    for number in range(max(found) + 2):
        answer = found.get(number, ERRNO | errno.ENOSYS)
        if not runs or runs[-1][1] != answer:
            runs.append((number, answer))
    return runs


def _search(asm: _Assembler, runs: list[tuple[int, Answer]]) -> int:
    """Label of code that finds the run of the number in the accumulator."""
    if len(runs) == 1:
        answer = runs[0][1]
        return asm.answer(answer) if isinstance(answer, int) else _checks(asm, answer)
    middle = len(runs) // 2
    high = _search(asm, runs[middle:])
    low = _search(asm, runs[:middle])
    return asm.emit(_AT_LEAST, runs[middle][0], high, low)


def _checks(asm: _Assembler, checks: tuple[Check, ...]) -> int:
    passed = asm.answer(ALLOW)
    for check in reversed(checks):
        passed = _check(asm, check, passed)
    return passed


def _check(asm: _Assembler, check: Check, passed: int) -> int:
    """Label of code that refuses or goes on at *passed*."""
    refused = asm.answer(ERRNO | check.code)
    if isinstance(check, AnyBit):
        asm.emit(_ANY_BIT, check.mask, refused, passed)
    elif isinstance(check, In):
        _one_of(asm, check.values, refused, passed)
    else:
        _one_of(asm, check.values, passed, refused)
    label = asm.emit(_LOAD, _ARGS_OFFSET + 8 * check.argument)
    if isinstance(check, NotIn) and check.when:
        _one_of(asm, check.when, label, passed)
        label = asm.emit(_LOAD, _ARGS_OFFSET)
    return label


def _one_of(asm: _Assembler, values: tuple[int, ...], yes: int, no: int) -> int:
    for value in reversed(values):
        no = asm.emit(_EQUAL, value, yes, no)
    return no


def install(program: bytes) -> None:
    """Put *program* on this thread and its children for good; needs no_new_privs."""
    syscalls.install_filter(program)
