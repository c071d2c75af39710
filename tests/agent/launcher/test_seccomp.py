"""The filter, interpreted over all numbers, and once for real."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import struct
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from madang.agent.launcher import seccomp
from madang.agent.launcher.seccomp import ALLOW, AUDIT_ARCH, ERRNO, KILL_PROCESS
from madang.wire.policy import judge
from madang.wire.policy_base import BASE_RULES
from madang.wire.syscalls import numbers

ARCHES = sorted(AUDIT_ARCH)
PROGRAMS = {arch: seccomp.program(arch) for arch in ARCHES}
MASK32, MASK64 = 2**32 - 1, 2**64 - 1
WORDS = st.integers(0, MASK64)


def interpret(program: bytes, data: bytes) -> int:
    """Classic BPF as the kernel runs it for seccomp; each step is counted, loops can't be."""
    instructions = list(struct.iter_unpack("<HBBI", program))
    at, accumulator = 0, 0
    while True:
        code, yes, no, value = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x05:
            at += value
        elif code == 0x06:
            return int(value)
        else:
            taken = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[code]
            at += yes if taken else no


def ask(arch: str, number: int, *args: int, audit: int | None = None) -> int:
    words = [word & MASK64 for word in (*args, *[0] * 6)][:6]
    audit = AUDIT_ARCH[arch] if audit is None else audit
    data = struct.pack("<IIQ6Q", number & MASK32, audit, 0x7F00DEADBEEF, *words)
    return interpret(PROGRAMS[arch], data)


def call(arch: str, name: str, *args: int) -> int:
    return ask(arch, numbers(arch)[name], *args)


UNCHANGED = {
    "x86_64": "04f962da5a6f133a3ef4667133f7bf10679ebc2afc3eaaefa837bb40c51add1e",
    "aarch64": "c8a54d50c81f7c75e6f63f1608dd7b1e2edc9355c989c35b73a40f0950b440e5",
}
"""SHA-256 of the base's programs. A change of the base is a decision: tell users."""


@pytest.mark.parametrize("arch", ARCHES)
def test_the_base_is_what_it_was(arch: str) -> None:
    assert hashlib.sha256(PROGRAMS[arch]).hexdigest() == UNCHANGED[arch]


@pytest.mark.parametrize("arch", ARCHES)
def test_every_known_call_gets_the_answer_of_its_rule(arch: str) -> None:
    looked_at = {call for rule in BASE_RULES if not rule.always for call in rule.calls}
    for name, number in numbers(arch).items():
        if name not in looked_at:
            rule = judge(BASE_RULES, name, [0] * 6)
            assert ask(arch, number) == (ALLOW if rule is None else ERRNO | rule.code), name


@pytest.mark.parametrize("arch", ARCHES)
def test_every_unknown_number_does_not_exist(arch: str) -> None:
    known = set(numbers(arch).values())
    for number in range(5000):
        if number not in known:
            assert ask(arch, number) == ERRNO | errno.ENOSYS, number


@pytest.mark.parametrize("arch", ARCHES)
@given(number=st.integers(0, MASK32), args=st.lists(WORDS, min_size=6, max_size=6))
@example(number=0x40000000, args=[0] * 6)
@example(number=MASK32, args=[0] * 6)
def test_only_known_calls_are_ever_allowed(arch: str, number: int, args: list[int]) -> None:
    answer = ask(arch, number, *args)
    assert answer == ALLOW or answer & 0xFFFF0000 == ERRNO
    if answer == ALLOW:
        assert number in numbers(arch).values()


@pytest.mark.parametrize("number", range(0, 500, 7))
def test_the_x32_interface_does_not_exist(number: int) -> None:
    assert ask("x86_64", 0x40000000 | number) == ERRNO | errno.ENOSYS


@pytest.mark.parametrize("arch", ARCHES)
@given(audit=st.integers(0, MASK32), number=st.integers(0, 600))
@example(audit=0x40000003, number=4)
def test_a_foreign_architecture_is_killed(arch: str, audit: int, number: int) -> None:
    if audit != AUDIT_ARCH[arch]:
        assert ask(arch, number, audit=audit) == KILL_PROCESS


NAMESPACES = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)


@pytest.mark.parametrize("arch", ARCHES)
@given(flags=WORDS)
def test_no_clone_and_no_unshare_makes_a_namespace(arch: str, flags: int) -> None:
    new = any(flags & flag for flag in NAMESPACES)
    assert (call(arch, "clone", flags) == ALLOW) is not new
    assert (call(arch, "unshare", flags) == ALLOW) is not (new or bool(flags & 0x80))


@pytest.mark.parametrize("arch", ARCHES)
def test_threads_and_processes_can_be_made(arch: str) -> None:
    pthread_create, fork, vfork = 0x3D0F00, 0x1200011, 0x4111
    assert {call(arch, "clone", flags) for flags in (pthread_create, fork, vfork)} == {ALLOW}
    assert call(arch, "clone3") == ERRNO | errno.ENOSYS


@pytest.mark.parametrize("arch", ARCHES)
@given(high=st.integers(0, MASK32), family=st.integers(0, 60), kind=st.integers(0, 7))
def test_sockets_are_of_four_families(arch: str, high: int, family: int, kind: int) -> None:
    for name in ("socket", "socketpair"):
        answer = call(arch, name, high << 32 | family, kind)
        assert answer == (ALLOW if family in {1, 2, 10, 16} else ERRNO | errno.EAFNOSUPPORT)


@pytest.mark.parametrize("arch", ARCHES)
@given(high=st.integers(0, MASK32), flags=st.integers(0, MASK32))
def test_nothing_takes_reserved_huge_pages(arch: str, high: int, flags: int) -> None:
    for name, before, bit in (("mmap", 3, 0x40000), ("memfd_create", 1, 4), ("shmget", 2, 0o4000)):
        answer = call(arch, name, *[0] * before, high << 32 | flags)
        assert answer == (ERRNO | errno.EINVAL if flags & bit else ALLOW)


@pytest.mark.parametrize("arch", ARCHES)
def test_rare_protocols_are_refused(arch: str) -> None:
    inet, inet6, netlink, unix = 2, 10, 16, 1
    sctp, dccp, audit = 132, 33, 9
    refused = ERRNO | errno.EPROTONOSUPPORT
    assert call(arch, "socket", inet, 1, sctp) == refused
    assert call(arch, "socket", inet6, 6, dccp) == refused
    assert call(arch, "socket", netlink, 3, audit) == refused
    assert call(arch, "socket", inet, 1, 6) == ALLOW
    assert call(arch, "socket", netlink, 3, 0) == ALLOW
    assert call(arch, "socket", unix, 1, 99) == ALLOW


@pytest.mark.parametrize("arch", ARCHES)
@given(high=st.integers(0, MASK32), fd=WORDS)
def test_nobody_types_into_a_terminal(arch: str, high: int, fd: int) -> None:
    for request in (0x5412, 0x541C):
        assert call(arch, "ioctl", fd, high << 32 | request) == ERRNO | errno.EPERM
    assert call(arch, "ioctl", fd, high << 32 | 0x5413) == ALLOW


@pytest.mark.parametrize("arch", ARCHES)
def test_personality_can_be_asked_but_hardly_changed(arch: str) -> None:
    assert call(arch, "personality", MASK32) == ALLOW
    assert call(arch, "personality", 0) == ALLOW
    assert call(arch, "personality", 0x0400000) == ERRNO | errno.EPERM


@pytest.mark.parametrize("arch", ARCHES)
def test_names_in_the_tables_exist_somewhere(arch: str) -> None:
    known = {name for each in ARCHES for name in numbers(each)}
    assert {call for rule in BASE_RULES for call in rule.calls} <= known
    assert len(PROGRAMS[arch]) // 8 < 4096


def test_the_tables_agree_with_the_running_kernel() -> None:
    table = numbers(platform.machine())
    libc = __import__("ctypes").CDLL(None)
    assert libc.syscall(table["getpid"]) == os.getpid()
    assert libc.syscall(table["getppid"]) == os.getppid()


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.program("riscv64")


LIVE = """
import ctypes, errno, os, socket, subprocess, sys, threading
from madang.agent.launcher import seccomp, syscalls
from madang.wire.policy import judge
from madang.wire.policy_base import BASE_RULES
from madang.wire.syscalls import numbers
syscalls.no_new_privileges()
seccomp.install(seccomp.program())
table = numbers(os.uname().machine)
libc = ctypes.CDLL(None, use_errno=True)

def code(name, *args):
    ctypes.set_errno(0)
    libc.syscall(table[name], *args)
    return ctypes.get_errno()

thread = threading.Thread(target=print, args=("a thread runs",))
thread.start(); thread.join()
print(subprocess.run(["/bin/echo", "a", "process", "runs"], check=True, capture_output=True).stdout)
assert code("mount", 0, 0, 0, 0, 0) == errno.EPERM
assert code("setns", 0, 0) == errno.EPERM
assert code("unshare", 0x10000000) == errno.EPERM
assert code("clone", 0x10000011, 0, 0, 0, 0) == errno.EPERM
assert code("bpf", 0, 0, 0) == errno.EPERM
assert code("io_uring_setup", 1, 0) == errno.ENOSYS
assert libc.syscall(4242) == -1 and ctypes.get_errno() == errno.ENOSYS
for family in (17, 38, 40, 44):
    try:
        socket.socket(family, socket.SOCK_RAW)
    except OSError as exc:
        assert exc.errno == errno.EAFNOSUPPORT
    else:
        raise AssertionError(family)
socket.socketpair(); socket.socket(); socket.socket(socket.AF_INET6)
print("held")
"""


def test_the_kernel_takes_the_filter_and_programs_still_run() -> None:
    done = subprocess.run([sys.executable, "-c", LIVE], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.endswith(b"held\n")


OLD_CALL = r"""
import ctypes, mmap
from madang.agent.launcher import seccomp, syscalls
page = mmap.mmap(-1, 4096, prot=7)
page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
function = ctypes.CFUNCTYPE(ctypes.c_int)(address)
syscalls.no_new_privileges()
seccomp.install(seccomp.program())
print(function())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit calls are a matter of x86")
def test_a_32_bit_call_kills_the_program() -> None:
    done = subprocess.run([sys.executable, "-c", OLD_CALL], capture_output=True, timeout=60)
    assert done.returncode == -31, (done.stdout, done.stderr)
