"""The profile for OCI runtimes decides like the filter itself, on the base and on any policy."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agent.launcher.test_seccomp import interpret

from madang.agent.launcher import profile, seccomp
from madang.agent.launcher.seccomp import ALLOW, AUDIT_ARCH, ERRNO
from madang.kit.policy import parse
from madang.testing.policies import ARGUMENTS, PATIENT, stacks
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import NO_SANDBOX, SESSION, Sandbox, merge
from madang.wire.syscalls import numbers

ARCHES = sorted(AUDIT_ARCH)
VALUES = {"SCMP_ACT_ALLOW": ALLOW, "SCMP_ACT_LOG": seccomp.LOG}
VALUES |= {"SCMP_ACT_KILL_PROCESS": seccomp.KILL_PROCESS}


def value_of(entry: Mapping[str, Any]) -> int:
    return VALUES.get(entry["action"], ERRNO | int(entry.get("errnoRet", 0)))


def holds(test: Mapping[str, Any], arguments: Sequence[int]) -> bool:
    assert test["op"] == "SCMP_CMP_MASKED_EQ"
    return bool(arguments[test["index"]] & test["value"] == test["valueTwo"])


def asked(found: Mapping[str, Any], call: str, arguments: Sequence[int]) -> int:
    """What libseccomp makes of a call, in whatever order it looks: one answer only may fit."""
    hits = {
        value_of(entry)
        for entry in found["syscalls"]
        if call in entry["names"] and all(holds(each, arguments) for each in entry.get("args", ()))
    }
    assert len(hits) == 1, f"{call}{arguments}: {hits}"
    return hits.pop()


def filtered(arch: str, sandbox: Sandbox, call: str, arguments: Sequence[int]) -> int:
    data = struct.pack("<IIQ6Q", numbers(arch)[call], AUDIT_ARCH[arch], 0, *arguments)
    return interpret(seccomp.program(arch, sandbox), data)


@pytest.mark.parametrize("arch", ARCHES)
@given(arguments=ARGUMENTS)
def test_the_base_is_the_same(arch: str, arguments: list[int]) -> None:
    found = profile.profile(NO_SANDBOX, arch)
    for call in numbers(arch):
        assert asked(found, call, arguments) == filtered(arch, NO_SANDBOX, call, arguments), call


@PATIENT
@given(st.sampled_from(ARCHES), stacks(), ARGUMENTS, st.data())
def test_any_policy_is_the_same(
    arch: str, policy: Any, arguments: list[int], data: st.DataObject
) -> None:
    sandbox = merge(policy, label="")
    try:
        found = profile.profile(sandbox, arch)
        call = data.draw(st.sampled_from(sorted(numbers(arch))))
        wanted = filtered(arch, sandbox, call, arguments)
    except PolicyInvalid as exc:
        assert "too large" in exc.text
        return
    assert asked(found, call, arguments) == wanted


def test_what_is_in_no_table_does_not_exist() -> None:
    found = profile.profile(NO_SANDBOX, "x86_64")

    assert (found["defaultAction"], found["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    assert found["architectures"] == ["SCMP_ARCH_X86_64"]
    assert len(json.dumps(found)) < 200_000


def test_a_policy_that_libseccomp_can_not_hold_is_refused_in_words() -> None:
    values = ", ".join(str(number * 0x1234567) for number in range(1, 60))
    values = ", ".join(str(number * 0x1234567) for number in range(1, 60))
    rule = f"[[check]]\ncalls = ['fcntl']\nargument = 1\nallow = [{values}]\nwith = 'EPERM'\n"
    sandbox = merge([parse(f"version = 1\n{rule}", SESSION)], label="session")
    with pytest.raises(PolicyInvalid, match="--runtime native"):
        profile.profile(sandbox, "x86_64")
