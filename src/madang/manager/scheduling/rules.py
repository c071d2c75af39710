"""Groups of machines: their settings, what machines offer, what sessions may ask for."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from madang.kit.codec import from_json
from madang.manager.scheduling.planner import plugins
from madang.manager.scheduling.planner.reasons import (
    NETWORK,
    OWN,
    kept_words,
    lacking,
    show,
    slot_name,
)
from madang.manager.scheduling.types import GroupRules, Policy
from madang.wire.errors import GroupInvalid, GroupRefused, SizeInvalid
from madang.wire.kernel import NATIVE, WITHOUT_NETWORK
from madang.wire.labels import LABEL
from madang.wire.policy_kept import ACCEPTED, KEEPS_FACT, KINDS, RULES, UNKEPT_FACT
from madang.wire.queue import MAX_GROUP_TEXT
from madang.wire.size import parse_duration

__all__ = [
    "NETWORK",
    "OWN",
    "group_rules",
    "kept_words",
    "lacking",
    "offers",
    "priority_of",
    "show",
    "slot_name",
    "unkept",
]

PRIORITIES: Final = 1000
"""Priorities lie between this and its negative."""
_RANGE: Final = range(-PRIORITIES, PRIORITIES + 1)

# The settings of a group


@lru_cache(maxsize=256)
def group_rules(text: str, reserve_after_s: float = Policy().reserve_after_s) -> GroupRules:
    """Raises GroupInvalid that names the key. *reserve_after_s* where the text does not say."""
    if len(text) > MAX_GROUP_TEXT:
        raise GroupInvalid(f"the settings have more than {MAX_GROUP_TEXT} characters.")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise GroupInvalid(f"the settings are not TOML: {exc}.") from exc
    return rules_of(table, reserve_after_s)


def rules_of(table: Mapping[str, Any], reserve_after_s: float) -> GroupRules:
    """Of settings that are TOML no more. Raises GroupInvalid."""
    found = _Table("", table)
    preempt = _Table("preempt.", found.take("preempt", _table, {}))
    priority = found.take("priority", _priority, 0)
    rules = GroupRules(
        policy=Policy(
            order=found.take("order", _plugin(plugins.order), "fifo"),
            placement=found.take("placement", _plugin(plugins.placement), "pack"),
            reserve_after_s=found.take("reserve_after", _span, reserve_after_s),
            half_life_s=found.take("half_life", _span, Policy().half_life_s),
            notice_s=found.take("notice", _span, Policy().notice_s),
            usual_run_s=found.take("usual_run", _span, Policy().usual_run_s),
            weights=found.take("weights", _weights, {}),
            grace_s=preempt.take("grace", _span, Policy().grace_s),
            min_run_s=preempt.take("min_run", _span, Policy().min_run_s),
        ),
        share_by=found.take("share_by", _one_of("user", "project"), "user"),
        priority=priority,
        priority_max=found.take("priority_max", _priority, priority),
        preempts_from=preempt.take("from_priority", _priority, None),
        projects=found.take("projects", _words, ()),
        domains=found.take("domains", _words, ()),
        runtimes=found.take("runtimes", _words, ()),
        labels=found.take("labels", _labels, ()),
        accepts=found.take("accept_unenforced", _words, ()),
    )
    preempt.end()
    found.end()
    if rules.priority_max < rules.priority:
        raise GroupInvalid("priority_max is below priority.")
    return rules


def with_changes(text: str, changes: Mapping[str, str], reserve_after_s: float) -> GroupRules:
    """Settings with some of them changed: ``order``, ``preempt.grace``, ``weights.project:lab``.

    Values are TOML, or texts without quotes. Raises GroupInvalid.
    """
    group_rules(text, reserve_after_s)
    table: dict[str, Any] = tomllib.loads(text)
    for key, value in changes.items():
        first, dot, rest = key.partition(".")
        inner = table.setdefault(first, {}) if dot else table
        if not isinstance(inner, dict):
            raise GroupInvalid(f"{first} is no table of settings.", key=key)
        inner[rest if dot else first] = _value(value)
    return rules_of(table, reserve_after_s)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


class _Table:
    """Takes key after key; what is left over is unknown."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self._where: Final = where
        self._values: Final = dict(values)
        self._known: Final[list[str]] = []

    def take(self, key: str, parse: Callable[[Any], Any], default: Any) -> Any:
        self._known.append(key)
        if key not in self._values:
            return default
        try:
            return parse(self._values.pop(key))
        except (ValueError, TypeError, SizeInvalid) as exc:
            raise GroupInvalid(f"{self._where}{key}: {exc}", key=f"{self._where}{key}") from exc

    def end(self) -> None:
        for key in self._values:
            known = ", ".join(self._known)
            text = f"{self._where}{key} is no setting of a group; there are {known}."
            raise GroupInvalid(text, key=f"{self._where}{key}")


def _table(value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError("must be a table.")
    return value


def _span(value: Any) -> float:
    return parse_duration(_text(value), field="time")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} must be a text.")
    return value


def _priority(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in _RANGE:
        raise ValueError(f"{value!r} is no whole number from -{PRIORITIES} to {PRIORITIES}.")
    return value


def _plugin(find: Callable[[str], object]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        find(_text(value))
        return str(value)

    return parse


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}.")
        return str(value)

    return parse


def _weights(value: Any) -> dict[str, float]:
    for name, weight in _table(value).items():
        kind, colon, rest = name.partition(":")
        if kind not in {"user", "project"} or not colon or not rest:
            raise ValueError(f"{name!r} must look like user:NAME or project:NAME.")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
            raise ValueError(f"{weight!r} is no weight above 0.")
    return {name: float(weight) for name, weight in value.items()}


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
        raise TypeError("must be a list of names.")
    return tuple(value)


def _labels(value: Any) -> tuple[str, ...]:
    for word in _words(value):
        if not LABEL.fullmatch(word):
            raise ValueError(f"{word!r} does not look like KEY=VALUE.")
    return tuple(value)


# What sessions may ask of a group


def priority_of(wanted: int | None, group: str, rules: GroupRules, *, administers: bool) -> int:
    """Raises GroupRefused above what the group allows."""
    if wanted is None:
        return rules.priority
    if wanted not in _RANGE:
        text = f"priority {wanted} is not between -{PRIORITIES} and {PRIORITIES}."
        raise GroupRefused(text, priority=wanted)
    if wanted > rules.priority_max and not administers:
        text = (
            f"priority {wanted}: in group {group} it is at most {rules.priority_max} "
            "unless an administrator asks."
        )
        raise GroupRefused(text, group=group, priority=wanted, most=rules.priority_max)
    return wanted


# What machines offer


@lru_cache(maxsize=4096)
def offers(facts: str, labels: tuple[str, ...] = ()) -> tuple[frozenset[str], str]:
    """Labels and offers of a machine by its facts, with *labels* of its group; its architecture.

    An agent that does not say which networks its sessions may have is of an older version.
    """
    told = from_json(dict[str, str], facts)
    found = {label for label in told.get("labels", "").split(", ") if label}
    found |= {f"runtime:{name}" for name in told.get("runtimes", "native").split(", ")}
    found |= {f"network:{mode}" for mode in told.get("networks", "allow, full").split(", ")}
    return frozenset(found | set(labels)), told.get("arch", "")


@lru_cache(maxsize=4096)
def unkept(facts: str, runtime: str) -> frozenset[str]:
    """What sessions of *runtime* can't have kept on a machine; empty: its default runtime.

    An agent that does not say what it keeps is of an older version, and refuses by itself.
    """
    told = from_json(dict[str, str], facts)
    name = runtime or told.get("runtimes", NATIVE).split(", ")[0]
    lacks = {NETWORK} if name in WITHOUT_NETWORK else set()
    if (said := told.get(KEEPS_FACT + name)) is None:
        return frozenset(lacks)
    kept = set(said.split(", "))
    if told.get(UNKEPT_FACT) == ACCEPTED and RULES in kept:
        kept |= KINDS.keys()
    return frozenset(lacks | (KINDS.keys() - kept))
