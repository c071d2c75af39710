"""The system calls a session may make: a classic BPF program, built here and installed by prctl.

It is compiled from the rules of a sandbox policy (``wire.policy``), the base first. Calls that the
tables know and no rule refuses are allowed; numbers that the tables don't know (newer calls, the
x32 interface) answer ENOSYS, which libraries take as "old kernel", whatever a policy says.

Program: check the architecture, then a binary search over ranges of numbers, whose leaves are
answers or checks of single arguments. A call costs about nine instructions.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final

from madang.agent.launcher import syscalls
from madang.wire.errors import PolicyInvalid, PolicyUnkept
from madang.wire.policy import NO_SANDBOX, Check, Look, Rule, Sandbox, When, rules_of, strictest
from madang.wire.policy import Answer as Does
from madang.wire.policy_base import BASE_RULES
from madang.wire.syscalls import numbers

AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

ALLOW: Final = 0x7FFF0000
KILL_PROCESS: Final = 0x80000000
ERRNO: Final = 0x00050000
LOG: Final = 0x7FFC0000
MAX_INSTRUCTIONS: Final = 4096
"""What the kernel takes."""
KEPT_PROGRAMS: Final = 64
LOGGED: Final = "/proc/sys/kernel/seccomp/actions_logged"

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_INSTRUCTION: Final = struct.Struct("<HBBI")
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16

Answer = int | tuple[Rule, ...]
"""What a number gets, or the rules that decide, strictest first; if none refuses, it passes."""


_NEAR: Final = 150
"""A short jump reaches 255 instructions; a check and its condition take up to 132."""


class _Assembler:
    """Instructions, last one first: so each jump's target is known when the jump is written."""

    def __init__(self) -> None:
        self._reversed: list[tuple[int, int, int, int]] = []
        self._returns: dict[int, int] = {}

    def emit(self, code: int, value: int, yes: int = 0, no: int = 0) -> int:
        """Put an instruction in front; *yes* and *no* are labels. Its own label."""
        here = len(self._reversed)
        if here >= MAX_INSTRUCTIONS:
            text = f"the kernel takes {MAX_INSTRUCTIONS} steps, and it has more"
            raise PolicyInvalid(f"the sandbox policy is too large: {text}. Check fewer values.")
        if code in {_EQUAL, _AT_LEAST, _ANY_BIT}:
            yes, no = here - yes, here - no
            self._reversed.append((code, yes, no, value))
        else:
            self._reversed.append((code, 0, 0, value))
        return here + 1

    @property
    def length(self) -> int:
        """Also the label of what was emitted last."""
        return len(self._reversed)

    def jump(self, label: int) -> int:
        return self.emit(_JUMP, len(self._reversed) - label)

    def near(self, label: int) -> int:
        """*label*, or a jump to it that the next check can reach."""
        return label if len(self._reversed) - label <= _NEAR else self.jump(label)

    def answer(self, value: int) -> int:
        """Label of an instruction that returns *value*, near enough for a short jump."""
        known = self._returns.get(value)
        if known is None or len(self._reversed) - known > _NEAR:
            known = self._returns[value] = self.emit(_RETURN, value)
        return known

    def program(self) -> bytes:
        return b"".join(_INSTRUCTION.pack(*parts) for parts in reversed(self._reversed))


def program(arch: str | None = None, sandbox: Sandbox = NO_SANDBOX) -> bytes:
    """The filter for *arch* (``x86_64`` or ``aarch64``; default: this machine) as sock_filters.

    A policy that was met before costs nothing. Raises PolicyInvalid for one that is too large.
    """
    return _program(arch or platform.machine(), sandbox.rules, sandbox.widen)


@lru_cache(maxsize=KEPT_PROGRAMS)
def _program(arch: str, rules: tuple[Rule, ...], widen: tuple[str, ...]) -> bytes:
    if arch not in AUDIT_ARCH:
        raise ValueError(f"no system call table for {arch!r}")
    asm = _Assembler()
    found = answers(arch, rules_of(Sandbox(rules=rules, widen=widen), BASE_RULES))
    search = _search(asm, _ranges(found))
    if search != asm.length:
        asm.jump(search)
    start = asm.emit(_LOAD, _NR_OFFSET)
    foreign = asm.answer(KILL_PROCESS)
    native = asm.jump(start)
    asm.emit(_EQUAL, AUDIT_ARCH[arch], native, foreign)
    asm.emit(_LOAD, _ARCH_OFFSET)
    return asm.program()


def answers(arch: str, rules: Iterable[Rule] = BASE_RULES) -> dict[int, Answer]:
    """System call number → the filter's answer, or the rules that decide."""
    ordered = [(rule, frozenset(rule.calls)) for rule in strictest(rules)]
    return {number: _answer(ordered, name) for name, number in numbers(arch).items()}


def _answer(ordered: Sequence[tuple[Rule, frozenset[str]]], call: str) -> Answer:
    deciding: list[Rule] = []
    for rule, calls in ordered:
        if (call in calls) is not rule.others:
            deciding.append(rule)
            if rule.always:  # What comes after it is never asked.
                break
    if not deciding:
        return ALLOW
    return value_of(deciding[0]) if deciding[0].always else tuple(deciding)


def value_of(rule: Rule) -> int:
    """What the filter returns for a call that *rule* refuses."""
    if rule.answer is Does.KILL:
        return KILL_PROCESS
    return LOG if rule.answer is Does.LOG else ERRNO | rule.code


def check_kept(sandbox: Sandbox, *, accept: bool, logged: str = LOGGED) -> list[str]:
    """What this kernel can't keep of a policy, in words: nothing, or what we may *accept*.

    Raises PolicyUnkept otherwise.
    """
    wanted = [rule for rule in sandbox.rules if rule.answer is Does.LOG]
    if not wanted or logs(logged):
        return []
    found = [
        f"policy: {rule.place} is not kept: the kernel logs no system calls" for rule in wanted
    ]
    if not accept:
        text = "Add `log` to kernel.seccomp.actions_logged, take the rule out, or set"
        raise PolicyUnkept(f"{found[0]}. {text} sandbox.accept_unkept.", place=wanted[0].place)
    return found


def logs(logged: str = LOGGED) -> bool:
    """Whether this kernel logs system calls."""
    return "log" in _words(logged)


def _words(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []


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
    high, low = asm.near(high), asm.near(low)
    return asm.emit(_AT_LEAST, runs[middle][0], high, low)


def _checks(asm: _Assembler, rules: tuple[Rule, ...]) -> int:
    """Label of code that asks the rules one after the other."""
    passed = asm.answer(ALLOW)
    for rule in reversed(rules):
        passed = _rule(asm, rule, passed)
    return passed


def _rule(asm: _Assembler, rule: Rule, passed: int) -> int:
    """Label of code that refuses or goes on at *passed*."""
    refused = asm.answer(value_of(rule))
    if rule.always:
        return refused
    passed = asm.near(passed)
    label = refused if rule.check is None else _check(asm, rule.check, refused, passed)
    return label if rule.when is None else _when(asm, rule.when, label, passed)


def _check(asm: _Assembler, check: Check, refused: int, passed: int) -> int:
    if check.test is Look.DENY_BITS:
        asm.emit(_ANY_BIT, check.values[0], refused, passed)
    elif check.test is Look.DENY:
        _one_of(asm, check.values, refused, passed)
    else:
        _one_of(asm, check.values, passed, refused)
    label = asm.emit(_LOAD, _ARGS_OFFSET + 8 * check.argument)
    if check.wide:
        asm.emit(_EQUAL, 0, label, refused)
        label = asm.emit(_LOAD, _ARGS_OFFSET + 8 * check.argument + 4)
    return label


def _when(asm: _Assembler, when: When, yes: int, no: int) -> int:
    _one_of(asm, when.values, yes, no)
    return asm.emit(_LOAD, _ARGS_OFFSET + 8 * when.argument)


def _one_of(asm: _Assembler, values: tuple[int, ...], yes: int, no: int) -> int:
    for value in reversed(values):
        no = asm.emit(_EQUAL, value, yes, no)
    return no


def install(program: bytes) -> None:
    """Put *program* on this thread and its children for good; needs no_new_privs."""
    syscalls.install_filter(program)
