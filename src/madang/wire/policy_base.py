"""The base layer of every sandbox policy: on by default, the same on every machine.

What stands here is what an ordinary user could reach in the kernel but a session has no business
with; Docker's and systemd's defaults agree with nearly all of it. It is the last of several
fences: a session has no capabilities, its own uid and namespaces, and a read-only root.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Mapping
from functools import cache
from typing import Final

from madang.wire.errors import PolicyInvalid
from madang.wire.policy import BASE, MAX_CALLS, Answer, Check, Look, Rule, When
from madang.wire.syscalls import AARCH64, LATER, X86_64

NEW_NAMESPACES: Final = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
CLONE_NEWTIME: Final = 0x80
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
FAMILIES: Final = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)
IP_PROTOCOLS: Final = (0, 1, 6, 17, 58, 136, 262)
"""Any, ICMP, TCP, UDP, ICMPv6, UDP-Lite, MPTCP; others load rarely used kernel modules."""
NETLINK_ROUTE: Final = 0
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB = 0x40000, 0x4, 0o4000
PERSONALITIES: Final = (0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
"""Linux, 32-bit Linux, either with an old version number, without address randomisation (for
debuggers), and the question which one it is."""

_DENIED: Final = (
    ("mounts", errno.EPERM, "mount umount2 pivot_root chroot",
     "would change what it sees as files"),
    ("new-mounts", errno.EPERM,
     "open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr",
     "the same by the newer interface"),
    ("enter-namespaces", errno.EPERM, "setns", "entering namespaces"),
    ("clone3", errno.ENOSYS, "clone3",
     "hides its flags behind a pointer; libraries then use clone"),
    ("reboot", errno.EPERM, "kexec_load kexec_file_load reboot",
     "replaces or stops the kernel"),
    ("modules", errno.EPERM, "init_module finit_module delete_module",
     "loads code into the kernel"),
    ("bpf", errno.EPERM, "bpf", "programs inside the kernel"),
    ("perf", errno.EPERM, "perf_event_open", "counters inside the kernel"),
    ("userfaultfd", errno.EPERM, "userfaultfd",
     "stalls the kernel inside a copy: makes races winnable"),
    ("io-uring", errno.ENOSYS, "io_uring_setup io_uring_enter io_uring_register",
     "passes this filter by"),
    ("keys", errno.EPERM, "keyctl add_key request_key",
     "key rings are not separated by namespaces"),
    ("handles", errno.EPERM, "open_by_handle_at name_to_handle_at",
     "opens files past any root"),
    ("fanotify", errno.EPERM, "fanotify_init fanotify_mark",
     "watches other people's file accesses"),
    ("administration", errno.EPERM, "acct quotactl quotactl_fd swapon swapoff",
     "administration of the machine"),
    ("clock", errno.EPERM, "settimeofday clock_settime clock_adjtime", "the machine's clock"),
    ("kernel-log", errno.EPERM, "syslog lookup_dcookie",
     "tells kernel addresses and other users' paths"),
    ("ports", errno.EPERM, "iopl ioperm modify_ldt", "hardware ports, exotic segments"),
    ("host", errno.EPERM, "vhangup sethostname setdomainname",
     "acts on more than the caller"),
    ("obsolete", errno.ENOSYS,
     "_sysctl afs_syscall create_module epoll_ctl_old epoll_wait_old", "obsolete"),
    ("obsolete", errno.ENOSYS,
     "get_kernel_syms getpmsg nfsservctl putpmsg query_module security sysfs", "obsolete"),
    ("obsolete", errno.ENOSYS, "tuxcall uselib ustat vserver", "obsolete"),
)  # fmt: skip


def _deny_bits(argument: int, mask: int) -> Check:
    return Check(argument=argument, test=Look.DENY_BITS, values=(mask,))


def _allow(argument: int, *values: int) -> Check:
    return Check(argument=argument, test=Look.ALLOW, values=values)


_CHECKED: Final[tuple[tuple[str, str, Check, When | None, int, str], ...]] = (
    ("namespaces", "clone", _deny_bits(0, NEW_NAMESPACES), None, errno.EPERM,
     "a user namespace would give it capabilities over kernel code that expects an administrator"),
    ("namespaces", "unshare", _deny_bits(0, NEW_NAMESPACES | CLONE_NEWTIME), None, errno.EPERM,
     "the same"),
    ("families", "socket socketpair", _allow(0, *FAMILIES), None, errno.EAFNOSUPPORT,
     "VSOCK reaches the hypervisor, ALG and others are attack surface, PACKET reads the wire"),
    ("protocols", "socket", _allow(2, *IP_PROTOCOLS), When(argument=0, values=(AF_INET, AF_INET6)),
     errno.EPROTONOSUPPORT, "others load rarely used kernel modules"),
    ("netlink", "socket", _allow(2, NETLINK_ROUTE), When(argument=0, values=(AF_NETLINK,)),
     errno.EPROTONOSUPPORT, "others administer the machine"),
    ("terminals", "ioctl", Check(argument=1, test=Look.DENY, values=(TIOCSTI, TIOCLINUX)), None,
     errno.EPERM, "typing into somebody's terminal"),
    ("huge-pages", "mmap", _deny_bits(3, MAP_HUGETLB), None, errno.EINVAL,
     "set aside for others, outside of the memory limit; transparent ones are not meant"),
    ("huge-pages", "memfd_create", _deny_bits(1, MFD_HUGETLB), None, errno.EINVAL, "the same"),
    ("huge-pages", "shmget", _deny_bits(2, SHM_HUGETLB), None, errno.EINVAL, "the same"),
    ("personality", "personality", _allow(0, *PERSONALITIES), None, errno.EPERM,
     "old bugs were kept for other systems' programs"),
)  # fmt: skip

FIXED: Final = frozenset({"clone3", "io-uring", "namespaces", "terminals"})
"""No layer may widen these: the other rules stand on them."""

_EVERY_PROGRAM: Final = """
access arch_prctl brk clone close close_range dup dup2 dup3 epoll_create1 epoll_ctl epoll_pwait
epoll_wait execve exit exit_group faccessat faccessat2 fcntl fstat futex getcwd getdents64 getegid
geteuid getgid getpgrp getpid getppid getrandom getuid gettid ioctl kill lseek lstat madvise mmap
mprotect mremap munmap newfstatat open openat pipe2 poll ppoll pread64 prlimit64 read readlink
readlinkat readv recvmsg restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigreturn
sched_getaffinity sendmsg set_robust_list set_tid_address setpgid setsid sigaltstack stat statx
sysinfo uname vfork wait4 waitid write writev chdir fchdir clock_gettime clock_nanosleep tgkill
"""
NEEDED: Final = frozenset(_EVERY_PROGRAM.split())
"""What the session's own first process and the start of any program take. Rules may log these, and
check their arguments, but not refuse them outright: nothing could run."""
POINTERS: Final[Mapping[str, tuple[int, ...]]] = {
    "open": (0,), "openat": (1,), "openat2": (1, 2), "creat": (0,), "execve": (0, 1, 2),
    "execveat": (1, 2, 3), "connect": (1,), "bind": (1,), "sendto": (1, 4), "sendmsg": (1,),
    "recvmsg": (1,), "unlink": (0,), "unlinkat": (1,), "rename": (0, 1), "renameat": (1, 3),
    "renameat2": (1, 3), "mkdir": (0,), "mkdirat": (1,), "symlink": (0, 1), "symlinkat": (0, 2),
    "link": (0, 1), "linkat": (1, 3), "chdir": (0,), "chmod": (0,), "fchmodat": (1,),
    "stat": (0, 1), "lstat": (0, 1), "newfstatat": (1, 2), "statx": (1, 4), "access": (0,),
    "faccessat": (1,), "faccessat2": (1,), "read": (1,), "write": (1,), "readlink": (0, 1),
    "readlinkat": (1, 2), "clone3": (0,), "truncate": (0,), "mount": (0, 1, 2, 4),
}  # fmt: skip
"""Arguments that are addresses: a filter can't look behind them, their values mean nothing."""


def check_rule(rule: Rule) -> Rule:
    """What no layer above the base may say. Raises PolicyInvalid, in words without the place."""
    if (not rule.calls and not rule.others) or len(rule.calls) > MAX_CALLS:
        raise PolicyInvalid(f"a rule names 1 to {MAX_CALLS} system calls")
    for call in rule.calls:
        check_call(rule, call)
    if rule.others and (rule.check or rule.when):
        raise PolicyInvalid("a rule about all other calls can't look at arguments")
    if rule.others and rule.answer is not Answer.LOG and not set(rule.calls) >= NEEDED:
        raise PolicyInvalid(f"{min(NEEDED - set(rule.calls))} is needed by every program")
    return rule


def check_call(rule: Rule, call: str) -> None:
    """Whether *rule* may name it. Raises PolicyInvalid."""
    if call not in known_calls():
        raise PolicyInvalid(f"{call[:60]!r} is no system call{near_call(call)}")
    if rule.others:
        return
    looks = [part.argument for part in (rule.check, rule.when) if part is not None]
    if any(argument in POINTERS.get(call, ()) for argument in looks):
        raise PolicyInvalid(f"argument {looks[0]} of {call} is an address, not a value to check")
    if call in NEEDED and rule.answer is not Answer.LOG:
        if rule.check is None:
            raise PolicyInvalid(f"{call} is needed by every program; check its arguments, or log")
        if rule.answer is Answer.KILL:
            raise PolicyInvalid(f"{call} is needed by every program; it can't kill, use an error")


def near_call(call: str) -> str:
    found = difflib.get_close_matches(call[:60], known_calls(), n=1)
    return f"; did you mean {found[0]}?" if found else ""


@cache
def known_calls() -> frozenset[str]:
    """Names of system calls on any architecture."""
    entries = (X86_64 + AARCH64 + LATER).split()
    return frozenset(entry.partition("=")[0] for entry in entries)


def _rules() -> tuple[Rule, ...]:
    found = [
        Rule(layer=BASE, line=0, name=name, code=code, calls=tuple(calls.split()), why=why)
        for name, code, calls, why in _DENIED
    ]
    found += [
        Rule(layer=BASE, line=0, name=name, code=code, calls=tuple(calls.split()), why=why,
             check=check, when=when)
        for name, calls, check, when, code, why in _CHECKED
    ]  # fmt: skip
    return tuple(found)


BASE_RULES: Final = _rules()
"""Their lines are those of ``kit.policy.render``; they go by name."""
NAMES: Final = tuple(dict.fromkeys(rule.name for rule in BASE_RULES))
