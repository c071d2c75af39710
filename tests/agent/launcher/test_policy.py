"""From layers to the filter: no wider than any layer, and it does what the rules say."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.agent.launcher.test_seccomp import interpret

from madang.agent.launcher import checks, seccomp
from madang.agent.launcher.filters import Filters, deadly, keeps
from madang.agent.launcher.seccomp import ALLOW, AUDIT_ARCH, ERRNO, KILL_PROCESS, LOG
from madang.kit.codec import to_builtins
from madang.kit.policy import parse
from madang.kit.policy_live import render
from madang.testing.policies import ARGUMENTS, CALLS, PATIENT, layers, stacks
from madang.testing.sessions import spec
from madang.wire.errors import InvalidRequest, PolicyInvalid, PolicyUnkept
from madang.wire.policy import (
    MAX_RULES,
    NO_SANDBOX,
    SESSION,
    SITE,
    UNENFORCED,
    Layer,
    Rule,
    Sandbox,
    judge,
    merge,
    rules_of,
)
from madang.wire.policy_base import BASE_RULES, FIXED, NAMES
from madang.wire.policy_kept import KINDS, kinds_of
from madang.wire.syscalls import numbers

ARCHES = sorted(AUDIT_ARCH)
RANK = {KILL_PROCESS: 3, ALLOW: 0, LOG: 1}


def rank(value: int) -> int:
    """How strict an answer of the filter is."""
    return RANK.get(value, 2)


def run(program: bytes, arch: str, call: str, arguments: list[int]) -> int:
    data = struct.pack("<IIQ6Q", numbers(arch)[call], AUDIT_ARCH[arch], 0, *arguments)
    return interpret(program, data)


def strictest(rules: list[Rule], call: str, arguments: list[int]) -> int:
    """By brute force, apart from the code under test: what the stack of rules answers."""
    best = ALLOW
    for rule in rules:
        if (call in rule.calls) == rule.others:
            continue
        if rule.when and arguments[rule.when.argument] % 2**32 not in rule.when.values:
            continue
        if rule.check:
            low, high = arguments[rule.check.argument] % 2**32, arguments[rule.check.argument] >> 32
            fine = {
                "allow": low in rule.check.values,
                "deny": low not in rule.check.values,
                "deny_bits": low & rule.check.values[0] == 0,
            }[rule.check.test]
            if fine and not (rule.check.wide and high):
                continue
        value = {"kill": KILL_PROCESS, "log": LOG, "errno": ERRNO + rule.code}[rule.answer]
        if rank(value) > rank(best):
            best = value
    return best


@pytest.mark.parametrize("arch", ARCHES)
@PATIENT
@given(stack=stacks(), questions=st.lists(st.tuples(CALLS, ARGUMENTS), min_size=5, max_size=30))
def test_the_program_does_what_the_rules_say(
    arch: str, stack: list[Layer], questions: list[tuple[str, list[int]]]
) -> None:
    sandbox = merge(stack)
    program = seccomp.program(arch, sandbox)
    rules = rules_of(sandbox, BASE_RULES)
    for call, arguments in questions:
        if call in numbers(arch):
            expected = strictest(rules, call, arguments)
            assert run(program, arch, call, arguments) == expected, call
            rule = judge(rules, call, arguments)
            assert expected == (ALLOW if rule is None else seccomp.value_of(rule))


@PATIENT
@given(stack=stacks(), call=CALLS, arguments=ARGUMENTS)
def test_all_layers_together_are_never_wider_than_any_of_them(
    stack: list[Layer], call: str, arguments: list[int]
) -> None:
    arch = "x86_64" if call in numbers("x86_64") else "aarch64"
    if call not in numbers(arch):
        return
    together = run(seccomp.program(arch, merge(stack)), arch, call, arguments)
    widened = {widening.name for layer in stack for widening in layer.widen}
    for layer in stack:
        alone = run(seccomp.program(arch, merge([layer])), arch, call, arguments)
        own = strictest(list(layer.rules), call, arguments)
        assert rank(together) >= rank(own)
        if not widened:
            assert rank(together) >= rank(alone)
    kept = [rule for rule in BASE_RULES if rule.name not in widened]
    assert rank(together) >= rank(strictest(kept, call, arguments))


@PATIENT
@given(stack=stacks(), later=layers((SESSION,)), call=CALLS, arguments=ARGUMENTS)
def test_one_more_layer_only_makes_it_stricter(
    stack: list[Layer], later: Layer, call: str, arguments: list[int]
) -> None:
    arch = "x86_64"
    if call in numbers(arch):
        before = run(seccomp.program(arch, merge(stack)), arch, call, arguments)
        after = run(seccomp.program(arch, merge([*stack, later])), arch, call, arguments)
        assert rank(after) >= rank(before)


@PATIENT
@given(stack=stacks(), number=st.integers(500, 2**32 - 1) | st.just(0x40000000))
def test_unknown_calls_and_other_architectures_stay_shut(stack: list[Layer], number: int) -> None:
    program = seccomp.program("x86_64", merge(stack))
    unknown = struct.pack("<IIQ6Q", number, AUDIT_ARCH["x86_64"], 0, *[0] * 6)
    assert interpret(program, unknown) == ERRNO | 38
    foreign = struct.pack("<IIQ6Q", 39, 0x40000003, 0, *[0] * 6)
    assert interpret(program, foreign) == KILL_PROCESS


@PATIENT
@given(stacks())
def test_what_the_launcher_takes_is_what_was_merged(stack: list[Layer]) -> None:
    sandbox = merge(stack)
    asked = to_builtins(replace(spec("true"), sandbox=sandbox))
    assert checks.kernel_spec(json.loads(json.dumps(asked))).sandbox == sandbox


PLAIN = merge([parse("version = 1\n[[deny]]\ncalls = ['ptrace']\nwith = 'kill'", SESSION)])
RULE = to_builtins(PLAIN.rules[0])


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "base"}, {"layer": "../x"}, {"line": -1}, {"line": 1.5}, {"calls": ["read"]},
        {"calls": []}, {"calls": ["no_such"]}, {"calls": "ptrace"}, {"calls": [7]},
        {"others": True}, {"others": 1}, {"answer": "allow"}, {"answer": None}, {"code": 0},
        {"code": 4096}, {"code": True}, {"check": {}}, {"check": {"argument": 6}},
        {"check": {"argument": 0, "test": "deny_bits", "values": [1, 2], "wide": False}},
        {"check": {"argument": 0, "test": "allow", "values": [], "wide": False}},
        {"check": {"argument": 0, "test": "allow", "values": [2**32], "wide": False}},
        {"check": {"argument": 0, "test": "allow", "values": [1] * 65, "wide": False}},
        {"check": {"argument": 0, "test": "allow", "values": [1], "wide": False, "x": 1}},
        {"when": {"argument": -1, "values": [1]}}, {"when": []}, {"program": "BgAAAAAA/38="},
        {"why": "x" * 1000}, {"calls": ["execve"], "others": False},
    ],
    ids=str,
)  # fmt: skip
def test_the_launcher_believes_no_value(change: dict[str, object]) -> None:
    asked = to_builtins(spec("true")) | {"sandbox": {"rules": [RULE | change]}}
    with pytest.raises(InvalidRequest):
        checks.kernel_spec(asked)


@pytest.mark.parametrize(
    "sandbox",
    [
        [], "deny", {"rules": {}}, {"rules": [RULE] * (MAX_RULES + 1)}, {"program": ""},
        {"rules": [RULE], "path": "/etc/passwd"}, {"rules": [RULE], "widen": ["io-uring"]},
        {"widen": ["none"]}, {"widen": "perf"}, {"rules": ["x"]},
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_the_launcher_takes_values_alone_no_paths_and_no_programs(sandbox: object) -> None:
    with pytest.raises(InvalidRequest):
        checks.kernel_spec(to_builtins(spec("true")) | {"sandbox": sandbox})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["rules", "widen", "calls", "check", "values", "argument", "layer", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@PATIENT
@given(JSON)
@example({"rules": [None]})
def test_whatever_the_server_sends_is_refused_in_words_or_compiled(value: object) -> None:
    try:
        found = checks.kernel_spec(to_builtins(spec("true")) | {"sandbox": value})
    except InvalidRequest as exc:
        assert exc.text
    else:
        assert seccomp.program("x86_64", found.sandbox)


def test_root_of_the_machine_says_what_may_be_widened() -> None:
    widening = merge([parse("version = 1\nwiden = ['perf']", SITE)])
    with pytest.raises(PolicyInvalid, match=r"widens 'perf'.*sandbox.widen"):
        Filters((), accept_unkept=True).of(widening)
    assert Filters(["perf"], accept_unkept=False).of(widening).program


@pytest.mark.parametrize("name", sorted({*NAMES} - FIXED))
def test_a_widened_rule_lets_go_of_its_calls_and_of_nothing_else(name: str) -> None:
    sandbox = Sandbox(widen=(name,))
    before, after = seccomp.program("x86_64"), seccomp.program("x86_64", sandbox)
    let_go = {call for rule in BASE_RULES if rule.name == name for call in rule.calls}
    for call in numbers("x86_64"):
        old, new = (run(each, "x86_64", call, [99] * 6) for each in (before, after))
        assert new == old or call in let_go
        assert rank(new) <= rank(old)


def test_a_rule_that_the_kernel_can_not_keep_is_named(tmp_path: object) -> None:
    sandbox = merge([parse("version = 1\n\n[[deny]]\ncalls = ['ptrace']\nwith = 'log'", SITE)])
    logged = f"{tmp_path}/actions_logged"
    for content in ("kill_process errno\n", None):
        if content is not None:
            with open(logged, "w") as file:
                file.write(content)
        with pytest.raises(PolicyUnkept, match=r"site line 3 is not kept.*accept_unkept") as caught:
            seccomp.check_kept(sandbox, accept=False, logged=logged)
        assert caught.value.details == {"place": "site line 3"}
        assert len(seccomp.check_kept(sandbox, accept=True, logged=logged)) == 1
    with open(logged, "w") as file:
        file.write("kill_process log\n")
    assert seccomp.check_kept(sandbox, accept=False, logged=logged) == []
    assert seccomp.check_kept(PLAIN, accept=False, logged="/nowhere") == []


def test_a_policy_beyond_what_the_kernel_takes_is_refused_and_soon() -> None:
    rule = parse(
        "version = 1\n[[check]]\ncalls = ['prctl', 'ioctl', 'mbind', 'kill']\nargument = 3\n"
        f"allow = {list(range(64))}",
        SITE,
    ).rules[0]
    few = Sandbox(rules=(rule,) * 10)
    assert len(seccomp.program("x86_64", few)) // 8 <= seccomp.MAX_INSTRUCTIONS
    with pytest.raises(PolicyInvalid, match="too large"):
        seccomp.program("x86_64", Sandbox(rules=(rule,) * MAX_RULES))


def test_a_policy_is_compiled_once() -> None:
    sandbox = merge([parse("version = 1\n[[deny]]\ncalls = ['mbind', 'kcmp']", SITE)])
    again = merge([parse("version = 1\n[[deny]]\ncalls = ['mbind', 'kcmp'] # same", SITE)])
    assert seccomp.program(sandbox=sandbox) is seccomp.program(sandbox=again)
    assert seccomp.program(sandbox=NO_SANDBOX) is seccomp.program()
    assert Filters((), accept_unkept=False).of(NO_SANDBOX).program == ""


def test_what_kills_is_named_in_few_words() -> None:
    text = "version = 1\n[[deny]]\ncalls = ['ptrace', 'kcmp', 'mbind', 'bpf']\nwith = 'kill'\n"
    assert deadly(merge([parse(text, SITE)])) == "ptrace, kcmp, mbind, … (site line 2)"
    only = "version = 1\n[[only]]\ncalls = []\nwith = 'kill'\n"
    assert deadly(merge([parse(only, SESSION)])) == "calls it does not name (session line 2)"
    assert deadly(NO_SANDBOX) == ""


@pytest.mark.parametrize("kind", ["files", "writes", "counts", "answers"])
def test_what_a_runtime_can_not_keep_is_refused_unless_the_group_accepts_it(kind: str) -> None:
    text = {
        "files": "[[files]]\ndeny = ['/x']",
        "writes": "[[write]]\nonly = ['/tmp']",
        "counts": "[[count]]\nof = 'exec'\nlimit = 1",
        "answers": "[[answer]]\ncall = 'uname'\nnodename = 'x'",
    }[kind]
    asked = merge([parse(f"version = 1\n{text}", SITE)])
    filters = Filters((), accept_unkept=False)
    others = replace(asked, accepts=tuple({*UNENFORCED} - {kind}))
    for refused in (asked, others):
        with pytest.raises(PolicyUnkept, match=rf'accept_unenforced = \["{kind}"\]'):
            filters.of(refused, "crun")

    found = filters.of(replace(asked, accepts=(kind,)), "crun")
    assert getattr(found.kept, kind) == ()
    assert "site line 2 is not kept" in found.warnings[0]


RULES_OF = {
    "rules": "[[deny]]\ncalls = ['kcmp']",
    "logs": "[[deny]]\ncalls = ['kcmp']\nwith = 'log'",
    "files": "[[files]]\ndeny = ['/x']",
    "writes": "[[write]]\nonly = ['/tmp']",
    "nets": "[[connect]]\ndeny = ['10.0.0.0/8']",
    "counts": "[[count]]\nof = 'exec'\nlimit = 1",
    "answers": "[[answer]]\ncall = 'uname'\nnodename = 'x'",
    "watches": "[[watch]]\nof = 'calls'",
}


@pytest.mark.parametrize("runtime", ["native", "crun", "runc", "runsc", "docker"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_machine_says_of_each_runtime_exactly_what_it_keeps(kind: str, runtime: str) -> None:
    layer = parse(f"version = 1\n{RULES_OF[kind]}", SITE)
    assert kinds_of(layer).keys() == {"rules", kind}
    try:
        Filters((), accept_unkept=False).of(merge([layer]), runtime)
    except PolicyUnkept:
        assert kind not in keeps(runtime)
    else:
        assert kind in keeps(runtime)


@pytest.mark.parametrize("accepts", [["nonsense"], [1], "files", [["files"]]])
def test_only_kinds_of_rules_can_be_accepted(accepts: object) -> None:
    with pytest.raises(InvalidRequest):
        checks.sandbox({**to_builtins(PLAIN), "accepts": accepts})


@pytest.mark.parametrize("per_s", [0.5, 1, 10, 86_400, 0.01])
def test_a_span_may_be_a_fraction_of_a_second(per_s: float) -> None:
    text = f'version = 1\n\n[[count]]\nof = "exec"\nlimit = 3\nper_s = {per_s}\n'
    layer = parse(text, SITE)
    assert layer.counts[0].per_s == per_s
    assert parse("\n".join(["version = 1", *render(layer.counts)]), SITE).counts[0].per_s == per_s
    sandbox = merge([layer])
    assert checks.sandbox(to_builtins(sandbox)) == sandbox


@pytest.mark.parametrize("per_s", [0, 0.001, -1, 86_401, True, "1", float("nan"), float("inf")])
def test_a_span_that_can_not_be_kept_is_refused(per_s: object) -> None:
    layer = parse("version = 1\n[[count]]\nof = 'exec'\nlimit = 3\nper_s = 1", SITE)
    value = to_builtins(merge([layer]))
    value["counts"][0]["per_s"] = per_s
    with pytest.raises(InvalidRequest):
        checks.sandbox(value)
    if not isinstance(per_s, str):
        with pytest.raises(PolicyInvalid, match="line 5"):
            parse(f"version = 1\n[[count]]\nof = 'exec'\nlimit = 3\nper_s = {per_s}", SITE)
