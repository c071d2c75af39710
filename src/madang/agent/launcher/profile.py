"""The session's system call filter once more, in the JSON that OCI runtimes and Docker read.

They compile it with libseccomp, which can only say "call X, if these arguments under these masks
are those values". So a rule becomes *cubes*: conditions of that kind, of which any one must hold.
What several rules say about one call is cut into cubes that exclude each other, because
libseccomp does not promise an order. The result decides like ``seccomp.program``, whatever a
call's number and arguments are, except that a foreign architecture's calls (x32's too) kill, and
that calls which libseccomp does not know yet don't exist.
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from madang.agent.launcher import seccomp
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import Check, Look, Rule, Sandbox, When, rules_of
from madang.wire.policy_base import BASE_RULES
from madang.wire.syscalls import numbers

ARCHITECTURES: Final = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
MAX_CUBES: Final = 1000
"""libseccomp makes up to four instructions of one, and the kernel takes 4096."""

Cube = dict[int, tuple[int, int]]
"""Argument → (mask, value): all of ``argument & mask == value``."""
_LOW: Final = 0xFFFFFFFF
_HIGH_BITS: Final = tuple(1 << bit for bit in range(32, 64))


def profile(sandbox: Sandbox, arch: str | None = None) -> dict[str, Any]:
    """``linux.seccomp`` of an OCI configuration. Raises PolicyInvalid for a policy too large."""
    return _profile(arch or platform.machine(), sandbox.rules, sandbox.widen)


@lru_cache(maxsize=seccomp.KEPT_PROGRAMS)
def _profile(arch: str, rules: tuple[Rule, ...], widen: tuple[str, ...]) -> dict[str, Any]:
    found = seccomp.answers(arch, rules_of(Sandbox(rules=rules, widen=widen), BASE_RULES))
    names: dict[int, list[str]] = {}
    entries: list[dict[str, Any]] = []
    count = 0
    for name, number in sorted(numbers(arch).items()):
        answer = found[number]
        if isinstance(answer, int):
            names.setdefault(answer, []).append(name)
            continue
        for value, cube in decisions(answer):
            count += 1
            _bound(count)
            entries.append(_entry([name], value, cube))
    entries += [_entry(same, value, {}) for value, same in names.items()]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": [ARCHITECTURES[arch]],
        "syscalls": entries,
    }


def _bound(cubes: int) -> None:
    if cubes > MAX_CUBES:
        raise PolicyInvalid(
            "the sandbox policy is too large for this runtime. Check fewer values, or run the "
            "session with `--runtime native`."
        )


def _entry(names: Sequence[str], value: int, cube: Cube) -> dict[str, Any]:
    entry: dict[str, Any] = {"names": list(names), "action": _ACTIONS.get(value, "SCMP_ACT_ERRNO")}
    if value not in _ACTIONS:
        entry["errnoRet"] = value & 0xFFFF
    if cube:
        entry["args"] = [
            {"index": argument, "value": mask, "valueTwo": wanted, "op": "SCMP_CMP_MASKED_EQ"}
            for argument, (mask, wanted) in sorted(cube.items())
        ]
    return entry


_ACTIONS: Final[Mapping[int, str]] = {
    seccomp.ALLOW: "SCMP_ACT_ALLOW",
    seccomp.KILL_PROCESS: "SCMP_ACT_KILL_PROCESS",
    seccomp.LOG: "SCMP_ACT_LOG",
}


def decisions(rules: Sequence[Rule]) -> Iterator[tuple[int, Cube]]:
    """What the filter returns where; the cubes exclude each other and are all there is.

    Raises PolicyInvalid where there are too many.
    """
    rest: list[Cube] = [{}]
    for rule in rules:
        value = seccomp.value_of(rule)
        for count, refused in enumerate(_refused(rule)):
            _bound(max(count, len(rest)))
            hit = [both for part in rest if (both := _both(part, refused)) is not None]
            yield from ((value, cube) for cube in hit)
            if hit:
                rest = [left for part in rest for left in _without(part, refused)]
    yield from ((seccomp.ALLOW, cube) for cube in rest)


def _refused(rule: Rule) -> Iterator[Cube]:
    for asked in _when(rule.when):
        for cube in [{}] if rule.check is None else _check(rule.check):
            if (both := _both(asked, cube)) is not None:
                yield both


def _when(when: When | None) -> Iterable[Cube]:
    return [{}] if when is None else [{when.argument: (_LOW, value)} for value in when.values]


def _check(check: Check) -> Iterator[Cube]:
    """Which arguments are refused."""
    if check.wide:
        yield from ({check.argument: (bit, bit)} for bit in _HIGH_BITS)
    if check.test is Look.DENY_BITS:
        bits = (1 << bit for bit in range(32) if check.values[0] >> bit & 1)
        yield from ({check.argument: (bit, bit)} for bit in bits)
    elif check.test is Look.DENY:
        yield from ({check.argument: (_LOW, value)} for value in check.values)
    else:
        rest: list[Cube] = [{}]
        for value in check.values:
            allowed: Cube = {check.argument: (_LOW, value)}
            rest = [left for part in rest for left in _without(part, allowed)]
            _bound(len(rest))
        yield from rest


def _both(one: Cube, other: Cube) -> Cube | None:
    """What lies in both; None: nothing."""
    found = dict(one)
    for argument, (mask, value) in other.items():
        mine, wanted = found.get(argument, (0, 0))
        if (wanted ^ value) & mine & mask:
            return None
        found[argument] = (mine | mask, wanted | value)
    return found


def _without(one: Cube, other: Cube) -> Iterator[Cube]:
    """*one* less *other*, in pieces that exclude each other: they differ in one bit more each."""
    if _both(one, other) is None:
        yield one
        return
    same = dict(one)
    for argument, (mask, value) in sorted(other.items()):
        mine, wanted = same.get(argument, (0, 0))
        # From the top: values are small, so the first pieces hold nearly everything.
        for bit in (1 << place for place in reversed(range(64))):
            if mask & ~mine & bit:
                yield same | {argument: (mine | bit, wanted | (~value & bit))}
                mine, wanted = mine | bit, wanted | (value & bit)
        same = same | {argument: (mine, wanted)}
