"""Sandbox policies as text: parse, check, show. The language: docs/reference/policy.md.

Strict: what is not understood is an error that names its line, never passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Final

from madang.kit import policy_live
from madang.kit.lines import BadLine, Item, Table, read
from madang.kit.policy_keys import COMMON, answer, only_keys, quoted, render_common, texts, words
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import (
    BASE,
    MAX_RULES,
    MAX_TEXT_BYTES,
    MAX_VALUES,
    WIDENING,
    WORD,
    Check,
    Layer,
    LiveRule,
    Look,
    Rule,
    When,
    Widening,
    WriteRule,
)
from madang.wire.policy_base import BASE_RULES, FIXED, NAMES, NEEDED, check_call, check_rule

VERSION: Final = 1
"""Of the language; each text says for which it was written."""
CONSTANTS: Final = {
    "AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16, "AF_PACKET": 17,
    "SOCK_STREAM": 1, "SOCK_DGRAM": 2, "SOCK_RAW": 3,
    "PROT_READ": 1, "PROT_WRITE": 2, "PROT_EXEC": 4,
    "CLONE_NEWNS": 0x20000, "CLONE_NEWCGROUP": 0x2000000, "CLONE_NEWUTS": 0x4000000,
    "CLONE_NEWIPC": 0x8000000, "CLONE_NEWUSER": 0x10000000, "CLONE_NEWPID": 0x20000000,
    "CLONE_NEWNET": 0x40000000,
    "MFD_EXEC": 0x10, "PR_SET_DUMPABLE": 4, "PR_SET_NAME": 15, "PTRACE_TRACEME": 0,
    "TIOCSTI": 0x5412, "TIOCLINUX": 0x541C,
}  # fmt: skip
"""Names that stand for numbers in checks."""

_TOP: Final = ("version", "widen")
_KEYS: Final = {
    "deny": ("calls", *COMMON),
    "only": ("calls", *COMMON),
    "check": (
        *("calls", *COMMON, "argument", "allow", "deny", "deny_bits", "wide"),
        *("when_argument", "when"),
    ),
}
_TESTS: Final = {test.value: test for test in Look}


@lru_cache(maxsize=64)
def parse(text: str, layer: str) -> Layer:
    """A layer's text. Raises PolicyInvalid, which names the line."""
    try:
        if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise BadLine(1, f"the policy is longer than {MAX_TEXT_BYTES} bytes")
        return _parse(read(text), layer)
    except BadLine as exc:
        raise PolicyInvalid(f"policy, line {exc.line}: {exc.text}.", line=exc.line) from exc


def _parse(tables: list[Table], layer: str) -> Layer:
    top, *others = tables
    only_keys(top, _TOP)
    version = top.keys.get("version")
    if version is None:
        raise BadLine(1, f"a policy begins with version = {VERSION}")
    if version.value is True or version.value != VERSION:
        raise BadLine(version.line, f"version is {VERSION}; this Madang knows no other")
    widen = _widen(top.keys.get("widen"), layer)
    if len(others) > MAX_RULES:
        raise BadLine(others[MAX_RULES].line, f"a policy has at most {MAX_RULES} rules")
    static = [table for table in others if table.name not in policy_live.KINDS]
    return Layer(
        layer=layer,
        rules=tuple(_rule(table, layer) for table in static),
        widen=widen,
        **policy_live.read(others, layer),
    )


def _widen(item: Item | None, layer: str) -> tuple[Widening, ...]:
    if item is None:
        return ()
    if layer not in WIDENING:
        raise BadLine(item.line, "only an administrator's layer can widen rules of the base")
    found = []
    for name in texts(item, "widen"):
        if name.value in FIXED:
            raise BadLine(name.line, f"{name.value!r} can't be widened: other rules stand on it")
        if name.value not in NAMES:
            text = f"{str(name.value)[:60]!r} is no rule of the base (madang policy show base)"
            raise BadLine(name.line, text)
        found.append(Widening(name=str(name.value), line=name.line))
    return tuple(found)


def _rule(table: Table, layer: str) -> Rule:
    if table.name not in _KEYS or not table.repeated:
        known = ", ".join(f"[[{name}]]" for name in (*_KEYS, *policy_live.KINDS))
        written = f"[[{table.name}]]" if table.repeated else f"[{table.name}]"
        raise BadLine(table.line, f"{written} is unknown; known: {known}")
    only_keys(table, _KEYS[table.name])
    if "calls" not in table.keys:
        raise BadLine(table.line, f"[[{table.name}]] needs calls = [...]")
    calls = texts(table.keys["calls"], "calls")
    does, code = answer(table)
    rule = Rule(
        layer=layer,
        line=table.line,
        calls=(),
        others=table.name == "only",
        answer=does,
        code=code,
        check=_check(table) if table.name == "check" else None,
        when=_when(table),
        name=words(table, "name"),
        why=words(table, "why"),
    )
    for call in calls:
        _named(rule, call)
    names = dict.fromkeys(str(call.value) for call in calls)
    if rule.others:
        names |= dict.fromkeys(sorted(NEEDED))
    return _checked(replace(rule, calls=tuple(names)), table.line)


def _named(rule: Rule, call: Item) -> None:
    if rule.layer == BASE:
        return
    try:
        check_call(rule, str(call.value))
    except PolicyInvalid as exc:
        raise BadLine(call.line, exc.text) from exc


def _checked(rule: Rule, line: int) -> Rule:
    if rule.layer == BASE:
        return rule
    try:
        return check_rule(rule)
    except PolicyInvalid as exc:
        raise BadLine(line, exc.text) from exc


def _check(table: Table) -> Check:
    given = [key for key in _TESTS if key in table.keys]
    if len(given) != 1:
        raise BadLine(table.line, "[[check]] takes one of allow, deny, deny_bits")
    test, item = _TESTS[given[0]], table.keys[given[0]]
    values = _values(item, given[0])
    if test is Look.DENY_BITS:
        values = (_bits(values),)
    wide = table.keys.get("wide")
    if wide is not None and not isinstance(wide.value, bool):
        raise BadLine(wide.line, "wide takes true or false")
    if wide is not None and wide.value and test is Look.DENY:
        raise BadLine(wide.line, "wide goes with allow or deny_bits; deny looks at the lower half")
    return Check(
        argument=_argument(table, "argument"),
        test=test,
        values=values,
        wide=wide is not None and bool(wide.value),
    )


def _bits(values: tuple[int, ...]) -> int:
    found = 0
    for value in values:
        found |= value
    return found


def _when(table: Table) -> When | None:
    item = table.keys.get("when")
    if item is None and "when_argument" not in table.keys:
        return None
    if item is None or "when_argument" not in table.keys:
        raise BadLine(table.line, "when and when_argument go together")
    return When(argument=_argument(table, "when_argument"), values=_values(item, "when"))


def _argument(table: Table, key: str) -> int:
    item = table.keys.get(key)
    if item is None:
        raise BadLine(table.line, f"[[{table.name}]] needs {key} = 0 to 5")
    if isinstance(item.value, bool) or not isinstance(item.value, int) or not 0 <= item.value <= 5:
        raise BadLine(item.line, f"{key} is 0 to 5: a system call has six arguments")
    return item.value


def _values(item: Item, key: str) -> tuple[int, ...]:
    items = item.value if isinstance(item.value, list) else [item]
    if not 1 <= len(items) <= MAX_VALUES:
        raise BadLine(item.line, f"{key} takes 1 to {MAX_VALUES} numbers")
    return tuple(_number(each, key) for each in items)


def _number(item: Item, key: str) -> int:
    value = CONSTANTS.get(item.value) if isinstance(item.value, str) else item.value
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadLine(item.line, f"{key}: {str(item.value)[:40]!r} is no number and no known name")
    if not -(2**31) <= value <= WORD:
        raise BadLine(item.line, f"{key}: {value} does not fit into 32 bits")
    return value & WORD


def render(rules: Iterable[Rule], live: Iterable[LiveRule | WriteRule] = ()) -> str:
    """Rules as text that parses to the same rules, lines apart."""
    return "\n".join([*_render(rules), *policy_live.render(live)]) + "\n"


def _render(rules: Iterable[Rule]) -> Iterator[str]:
    yield f"version = {VERSION}"
    for rule in rules:
        kind = "only" if rule.others else "deny" if rule.always else "check"
        yield from ("", f"[[{kind}]]")
        if rule.name:
            yield f"name = {quoted(rule.name)}"
        yield f"calls = [{', '.join(map(quoted, rule.calls))}]"
        yield from _render_checks(rule)
        yield from render_common(rule)


def _render_checks(rule: Rule) -> Iterator[str]:
    if rule.check is not None:
        yield f"argument = {rule.check.argument}"
        yield f"{rule.check.test.value} = {_numbers(rule.check.values)}"
        if rule.check.wide:
            yield "wide = true"
    if rule.when is not None:
        yield f"when_argument = {rule.when.argument}"
        yield f"when = {_numbers(rule.when.values)}"


def _numbers(values: tuple[int, ...]) -> str:
    return f"[{', '.join(hex(value) if value > 4096 else str(value) for value in values)}]"


BASE_TEXT: Final = render(BASE_RULES)
"""What ``madang policy show base`` prints; refusals by the base name its lines."""


def base_rules() -> tuple[Rule, ...]:
    """The base with the lines of its text."""
    return parse(BASE_TEXT, BASE).rules
