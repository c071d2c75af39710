"""Rules about files, addresses, counts and answers as text."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from madang.kit.lines import BadLine, Table
from madang.kit.policy_keys import (
    COMMON,
    answer,
    number,
    only_keys,
    quoted,
    render_common,
    texts,
    whole,
)
from madang.kit.policy_keys import words as words_of
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import (
    Access,
    Act,
    Answer,
    AnswerRule,
    CountRule,
    FileRule,
    LiveRule,
    NetRule,
    WatchRule,
    WriteRule,
)
from madang.wire.policy_live import (
    ANSWERED,
    GROUPS,
    MAX_CPUS,
    MAX_LIMIT,
    MAX_MEM_BYTES,
    MAX_PER_S,
    MIN_PER_S,
    check_live,
)

KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "files": ("access", "deny", "only", *COMMON),
    "write": ("only", "name", "why"),
    "connect": ("deny", "only", *COMMON),
    "bind": ("deny", "only", *COMMON),
    "count": ("of", "calls", "limit", "per_s", *COMMON),
    "answer": ("call", "nodename", "release", "version", "cpus", "mem_bytes", "name", "why"),
    "watch": ("of", "name", "why"),
}
"""Headers → keys."""
_WATCHED: Final = "calls"
"""What can be watched."""
_HEADERS: Final = {
    FileRule: "files",
    WriteRule: "write",
    CountRule: "count",
    AnswerRule: "answer",
    WatchRule: "watch",
}


def read(tables: Iterable[Table], layer: str) -> dict[str, tuple[Any, ...]]:
    """The fields of a ``Layer``. Raises BadLine."""
    found: dict[str, list[LiveRule | WriteRule]] = {
        "files": [], "writes": [], "nets": [], "counts": [], "answers": [], "watches": [],
    }  # fmt: skip
    for table in tables:
        if table.name not in KINDS:
            continue
        if not table.repeated:
            raise BadLine(table.line, f"[{table.name}] is unknown; write [[{table.name}]]")
        only_keys(table, KINDS[table.name])
        field, rule = _rule(table, layer)
        try:
            check_live(rule)
        except PolicyInvalid as exc:
            raise BadLine(table.line, exc.text) from exc
        found[field].append(rule)
    return {field: tuple(rules) for field, rules in found.items()}


def _rule(table: Table, layer: str) -> tuple[str, LiveRule | WriteRule]:
    common: dict[str, Any] = {
        "layer": layer, "line": table.line,
        "name": words_of(table, "name"), "why": words_of(table, "why"),
    }  # fmt: skip
    if table.name == "write":
        return "writes", WriteRule(folders=_listed(table, "only"), code=errno.EACCES, **common)
    if table.name == "answer":
        return "answers", _answer_rule(table, common)
    if table.name == "watch":
        return "watches", _watch_rule(table, common)
    does, code = answer(table)
    common |= {"answer": does, "code": code}
    if table.name == "count":
        return "counts", _count_rule(table, common)
    others = "only" in table.keys
    if others is ("deny" in table.keys):
        raise BadLine(table.line, f"[[{table.name}]] takes one of deny, only")
    named = _listed(table, "only" if others else "deny")
    if table.name == "files":
        rule = FileRule(patterns=named, others=others, access=_access(table), **common)
        return "files", rule
    return "nets", NetRule(act=Act(table.name), targets=named, others=others, **common)


def _listed(table: Table, key: str) -> tuple[str, ...]:
    item = table.keys.get(key)
    if item is None:
        raise BadLine(table.line, f"[[{table.name}]] needs {key} = [...]")
    return tuple(dict.fromkeys(str(each.value) for each in texts(item, key)))


def _access(table: Table) -> tuple[Access, ...]:
    if "access" not in table.keys:
        return (Access.OPEN,)
    found = []
    for each in texts(table.keys["access"], "access"):
        if each.value not in set(Access):
            raise BadLine(each.line, 'access takes "open" and "execute"')
        found.append(Access(str(each.value)))
    return tuple(dict.fromkeys(found))


def _count_rule(table: Table, common: dict[str, Any]) -> CountRule:
    of = _text(table, "of")
    if bool(of) is ("calls" in table.keys):
        raise BadLine(table.line, f"[[count]] takes one of calls, of = {_choice(GROUPS)}")
    if of and of not in GROUPS:
        raise BadLine(table.keys["of"].line, f"of takes {_choice(GROUPS)}")
    limit = whole(table, "limit", 1, MAX_LIMIT)
    if limit is None:
        raise BadLine(table.line, "[[count]] needs limit = how many calls pass")
    calls = GROUPS[of] if of else _listed(table, "calls")
    per_s = number(table, "per_s", MIN_PER_S, MAX_PER_S)
    return CountRule(calls=calls, of=of, limit=limit, per_s=per_s, **common)


def _answer_rule(table: Table, common: dict[str, Any]) -> AnswerRule:
    call = _text(table, "call")
    if call not in ANSWERED:
        line = table.keys["call"].line if "call" in table.keys else table.line
        raise BadLine(line, f"[[answer]] takes call = {_choice(ANSWERED)}")
    return AnswerRule(
        call=call,
        nodename=_text(table, "nodename"),
        release=_text(table, "release"),
        version=_text(table, "version"),
        cpus=whole(table, "cpus", 1, MAX_CPUS),
        mem_bytes=whole(table, "mem_bytes", 1, MAX_MEM_BYTES),
        **common,
    )


def _watch_rule(table: Table, common: dict[str, Any]) -> WatchRule:
    if _text(table, "of") != _WATCHED:
        raise BadLine(table.line, f"[[watch]] takes of = {quoted(_WATCHED)}")
    return WatchRule(answer=Answer.LOG, **common)


def _text(table: Table, key: str) -> str:
    """Empty: not given."""
    item = table.keys.get(key)
    if item is None:
        return ""
    if not isinstance(item.value, str) or not item.value:
        raise BadLine(item.line, f"{key} takes a text in quotes")
    return item.value


def _choice(known: Iterable[str]) -> str:
    return ", ".join(map(quoted, known))


def render(rules: Iterable[LiveRule | WriteRule]) -> Iterator[str]:
    """Lines that parse to the same rules."""
    for rule in rules:
        yield from ("", f"[[{_header(rule)}]]")
        if rule.name:
            yield f"name = {quoted(rule.name)}"
        yield from _render(rule)
        if isinstance(rule, WriteRule | WatchRule):
            if rule.why:
                yield f"why = {quoted(rule.why)}"
        else:
            yield from render_common(rule)


def _header(rule: LiveRule | WriteRule) -> str:
    if isinstance(rule, NetRule):
        return rule.act.value
    return _HEADERS[type(rule)]


def _render(rule: LiveRule | WriteRule) -> Iterator[str]:
    if isinstance(rule, WriteRule):
        yield f"only = {_list(rule.folders)}"
    elif isinstance(rule, WatchRule):
        yield f"of = {quoted(_WATCHED)}"
    elif isinstance(rule, FileRule):
        yield f"access = {_list(rule.access)}"
        yield f"{_verb(rule)} = {_list(rule.patterns)}"
    elif isinstance(rule, NetRule):
        yield f"{_verb(rule)} = {_list(rule.targets)}"
    elif isinstance(rule, CountRule):
        yield f"of = {quoted(rule.of)}" if rule.of else f"calls = {_list(rule.calls)}"
        yield f"limit = {rule.limit}"
        if rule.per_s is not None:
            yield f"per_s = {rule.per_s:.15g}"
    else:
        yield f"call = {quoted(rule.call)}"
        for key in ANSWERED[rule.call]:
            value = getattr(rule, key)
            if value:
                yield f"{key} = {quoted(value) if isinstance(value, str) else value}"


def _verb(rule: FileRule | NetRule) -> str:
    return "only" if rule.others else "deny"


def _list(found: Iterable[str]) -> str:
    return f"[{', '.join(map(quoted, found))}]"
