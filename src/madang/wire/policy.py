"""The sandbox policy: which system calls the programs of a session may make.

A policy is a stack of *layers*: ``base`` (ours, see ``policy_base``), ``site`` and ``node`` (the
administrator's), ``session`` (of whoever starts it). A layer is a list of *rules*, and a rule can
only refuse: a call passes if no rule of any layer refuses it. So layers are merged by putting their
rules one after the other, and whatever a later layer says, nothing becomes wider. The one exception
is written down: an administrator's layer may *widen* named rules of the base, which then don't
count; on a machine whose root allows it (``[sandbox] widen``), and never those that the others
stand on (``policy_base.FIXED``).

Of several rules that refuse a call the strictest answer counts (kill, then an error, then only a
line in the kernel's log), of equally strict ones the first.

These values travel to the launcher, which believes none of them (``launcher.checks``) and
compiles them itself (``launcher.seccomp``). Text becomes values in ``kit.policy``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

BASE, SITE, NODE, SESSION = "base", "site", "node", "session"
LAYERS: Final = (BASE, SITE, NODE, SESSION)
"""In the order in which they count."""

MAX_RULES: Final = 256
"""Of all layers but the base together."""
MAX_CALLS: Final = 512
"""Named by one rule."""
MAX_VALUES: Final = 64
"""Looked at by one check."""
MAX_TEXT_BYTES: Final = 64 * 1024
"""Of one layer as written."""
MAX_WORDS: Final = 200
"""Characters of ``why`` and ``name``."""
MAX_ERRNO: Final = 133
"""The largest error code that a rule may give; 0 would say that the call was done."""
WORD: Final = 0xFFFF_FFFF


class Answer(StrEnum):
    """What a refusing rule does, from mild to strict."""

    LOG = "log"
    """Let it pass, with a line in the kernel's log."""
    ERRNO = "errno"
    """The call fails with the rule's error code."""
    KILL = "kill"
    """The whole program is killed by SIGSYS."""


SEVERITY: Final[Mapping[Answer, int]] = {answer: rank for rank, answer in enumerate(Answer, 1)}


class Look(StrEnum):
    """What a check does with an argument's value."""

    ALLOW = "allow"
    """Refuse unless it is one of ``values``."""
    DENY = "deny"
    """Refuse if it is one of ``values``."""
    DENY_BITS = "deny_bits"
    """Refuse if it has any bit of the only value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Looks at a scalar argument's lower 32 bits, as the kernel does for an ``int``."""

    argument: int
    """0 to 5."""
    test: Look
    values: tuple[int, ...]
    """Unsigned, 32 bits each."""
    wide: bool = False
    """Anything in the upper 32 bits is refused too; for arguments that the kernel reads whole."""

    def refuses(self, arguments: Sequence[int]) -> bool:
        """*arguments*: six unsigned 64-bit values."""
        value = arguments[self.argument]
        low = value & WORD
        if self.wide and value > WORD:
            return True
        if self.test is Look.DENY_BITS:
            return bool(low & self.values[0])
        return (low in self.values) is (self.test is Look.DENY)


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """The check applies only where this argument's lower 32 bits are one of ``values``."""

    argument: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Refuses some system calls."""

    layer: str
    line: int
    """Where it stands in the layer's text."""
    calls: tuple[str, ...]
    others: bool = False
    """It refuses all calls but ``calls``, instead of those."""
    answer: Answer = Answer.ERRNO
    code: int = errno.EPERM
    """With ``errno``."""
    check: Check | None = None
    """It refuses only what this check refuses; not with ``others``."""
    when: When | None = None
    name: str = ""
    """In the base: what ``widen`` names."""
    why: str = ""

    def covers(self, call: str) -> bool:
        return (call in self.calls) is not self.others

    def refuses(self, call: str, arguments: Sequence[int]) -> bool:
        if not self.covers(call):
            return False
        when = self.when
        if when is not None and arguments[when.argument] & WORD not in when.values:
            return False
        return self.check is None or self.check.refuses(arguments)

    @property
    def always(self) -> bool:
        """Whether the arguments don't matter."""
        return self.check is None and self.when is None

    @property
    def place(self) -> str:
        """``session line 3``"""
        return f"{self.layer} line {self.line}"

    @property
    def words(self) -> str:
        """What the caller meets: ``EPERM``, ``SIGSYS``, or ``a line in the log``."""
        if self.answer is Answer.ERRNO:
            return errno.errorcode.get(self.code, str(self.code))
        return "SIGSYS" if self.answer is Answer.KILL else "a line in the kernel's log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Widening:
    """An administrator's layer lets go of a rule of the base."""

    name: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One text, parsed."""

    layer: str
    rules: tuple[Rule, ...] = ()
    widen: tuple[Widening, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """What a session's layers come to above the base; made by ``merge``."""

    rules: tuple[Rule, ...] = ()
    widen: tuple[str, ...] = ()
    """Rules of the base that don't count."""
    label: str = ""
    """Which layers, for showing: ``site 3, session``."""
    broken: str = ""
    """Why its text can't be read, in words: then the session does not start."""

    def __bool__(self) -> bool:
        return bool(self.rules or self.widen or self.broken)


NO_SANDBOX: Final = Sandbox()
"""The base alone."""


def merge(layers: Iterable[Layer], label: str = "") -> Sandbox:
    """Put *layers* together; they come in the order of ``LAYERS``."""
    rules: list[Rule] = []
    widen: dict[str, None] = {}
    for layer in layers:
        rules += layer.rules
        widen |= dict.fromkeys(widening.name for widening in layer.widen)
    return Sandbox(rules=tuple(rules), widen=tuple(widen), label=label)


def rules_of(sandbox: Sandbox, base: Iterable[Rule]) -> list[Rule]:
    """All rules that count, in their order."""
    return [*(rule for rule in base if rule.name not in sandbox.widen), *sandbox.rules]


def strictest(rules: Iterable[Rule]) -> Iterator[Rule]:
    """Strict ones first, otherwise as they come: the first that refuses a call decides."""
    return iter(sorted(rules, key=lambda rule: -SEVERITY[rule.answer]))


def judge(rules: Iterable[Rule], call: str, arguments: Sequence[int]) -> Rule | None:
    """The rule that decides about a call; None: it passes."""
    refusing = (rule for rule in strictest(rules) if rule.refuses(call, arguments))
    return next(refusing, None)
