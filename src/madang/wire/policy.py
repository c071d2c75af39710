"""The sandbox policy: what the programs of a session may do.

A policy is a stack of *layers*: ``base`` (ours, see ``policy_base``), ``site``, ``group`` and
``node`` (the administrator's), ``project`` (of who administers that), ``image`` (kept with it by
who built it), ``session`` (of whoever starts it). A layer is a list of *rules*, and a rule can only
refuse: a call passes if no rule of any layer refuses it. So layers are merged by putting their
rules one after the other, and whatever a later layer says, nothing becomes wider. The one exception
is written down: an administrator's layer may *widen* named rules of the base, which then don't
count; on a machine whose root allows it (``[sandbox] widen``), and never those that the others
stand on (``policy_base.FIXED``).

Of several rules that refuse a call the strictest answer counts (kill, then an error, then only a
line in the kernel's log), of equally strict ones the first.

Rules about system calls and about changing files hold from a session's start on and can't be
changed. Rules about files, addresses, counts and answers are *live*: the session's guard
(``launcher.guard``) keeps them, and takes others at any time.

These values travel to the launcher, which believes none of them (``launcher.checks``) and
compiles them itself (``launcher.seccomp``). Text becomes values in ``kit.policy``; what live rules
may say is checked in ``policy_live``, what others may in ``policy_base``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

BASE, SITE, GROUP, NODE, PROJECT = "base", "site", "group", "node", "project"
IMAGE, SESSION = "image", "session"
LAYERS: Final = (BASE, SITE, GROUP, NODE, PROJECT, IMAGE, SESSION)
"""In the order in which they count."""
WIDENING: Final = (SITE, GROUP, NODE)
"""The administrator's, who may widen the base."""

MAX_RULES: Final = 256
"""Of all layers but the base together."""
MAX_CALLS: Final = 512
"""Named by one rule."""
MAX_VALUES: Final = 64
"""Looked at by one check."""
MAX_TEXT_BYTES: Final = 64 * 1024
"""Of one layer as written."""
MAX_PATTERNS: Final = 128
"""Files, folders or addresses named by one rule."""
MAX_PATTERN: Final = 512
"""Characters of one."""
MAX_NAMES: Final = 256
"""Of machines, in all rules together."""
MAX_ADDRESSES: Final = 64
"""Of one name that count."""
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
class Placed:
    """What all rules have: where it stands, and what who is refused meets."""

    layer: str
    line: int
    """Where it stands in the layer's text."""
    answer: Answer = Answer.ERRNO
    code: int = errno.EPERM
    """With ``errno``."""
    name: str = ""
    """In the base: what ``widen`` names."""
    why: str = ""

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
class Rule(Placed):
    """Refuses some system calls."""

    calls: tuple[str, ...]
    others: bool = False
    """It refuses all calls but ``calls``, instead of those."""
    check: Check | None = None
    """It refuses only what this check refuses; not with ``others``."""
    when: When | None = None

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


class Access(StrEnum):
    """What is done with a file."""

    OPEN = "open"
    """For reading or writing: what interpreters and loaders do, too."""
    EXECUTE = "execute"
    """By the kernel: a program, or the interpreter that it names."""


class Act(StrEnum):
    """What is done with an address."""

    CONNECT = "connect"
    """Also sending to it without a connection."""
    BIND = "bind"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRule(Placed):
    """Refuses the use of files; judged on the object that a path has led to."""

    patterns: tuple[str, ...]
    """Absolute, as the session sees paths: ``*`` within a name, ``**`` any depth."""
    others: bool = False
    """It refuses all files but those, and those that every program needs."""
    access: tuple[Access, ...] = (Access.OPEN,)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRule(Placed):
    """Files may be changed, made and removed only under ``folders``; not live."""

    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetRule(Placed):
    """Refuses addresses."""

    act: Act
    targets: tuple[str, ...]
    """``10.0.0.0/8:5432``, ``[fd00::]/8``, ``0.0.0.0/0:8000-8999``, ``*:25`` (both versions), or a
    name: ``db.example.org:443``, which stands for what ``Sandbox.names`` say."""
    others: bool = False
    """It refuses all addresses but those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a name in the rules stands for now; no addresses: nothing."""

    name: str
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CountRule(Placed):
    """Refuses what exceeds a number of calls."""

    calls: tuple[str, ...]
    limit: int
    """So many pass: in the session's life, or in any ``per_s`` seconds."""
    per_s: float | None = None
    of: str = ""
    """``exec``, ``fork``, ``open`` or ``connect``: ``calls`` are those of ``policy_live.GROUPS``.
    Threads are no forks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRule(Placed):
    """Makes one system call say something else; None and empty: what is true."""

    call: str
    """``uname``, ``sched_getaffinity`` or ``sysinfo``."""
    nodename: str = ""
    release: str = ""
    version: str = ""
    cpus: int | None = None
    mem_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRule(Placed):
    """Writes down which system calls are made, each once; refuses nothing."""


LiveRule = FileRule | NetRule | CountRule | AnswerRule | WatchRule


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
    files: tuple[FileRule, ...] = ()
    writes: tuple[WriteRule, ...] = ()
    nets: tuple[NetRule, ...] = ()
    counts: tuple[CountRule, ...] = ()
    answers: tuple[AnswerRule, ...] = ()
    watches: tuple[WatchRule, ...] = ()
    widen: tuple[Widening, ...] = ()

    @property
    def every(self) -> tuple[Rule | WriteRule | LiveRule, ...]:
        """All its rules, by kind."""
        return (*self.rules, *self.writes, *_live(self))

    def __bool__(self) -> bool:
        """Whether it says anything."""
        return bool(self.every or self.widen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """What a session's layers come to above the base; made by ``merge``."""

    rules: tuple[Rule, ...] = ()
    files: tuple[FileRule, ...] = ()
    writes: tuple[WriteRule, ...] = ()
    nets: tuple[NetRule, ...] = ()
    counts: tuple[CountRule, ...] = ()
    answers: tuple[AnswerRule, ...] = ()
    watches: tuple[WatchRule, ...] = ()
    names: tuple[Resolved, ...] = ()
    """Of what ``nets`` name; the agent looks them up and keeps them fresh."""
    widen: tuple[str, ...] = ()
    """Rules of the base that don't count."""
    accepts: tuple[str, ...] = ()
    """Kinds of rules (``UNENFORCED``) that the scaling group's administrator does without where a
    machine can't keep them; the session then has a warning."""
    label: str = ""
    """Which layers, for showing: ``site 3, session``."""
    broken: str = ""
    """Why its text can't be read, in words: then the session does not start."""

    @property
    def live(self) -> tuple[LiveRule, ...]:
        """What a guard keeps, and what can be replaced while the session runs."""
        return _live(self)

    @property
    def handed_over(self) -> frozenset[str]:
        """The calls that the guard is asked about: a session can't be given more of them later."""
        counted = (call for rule in self.counts for call in rule.calls)
        return frozenset([*counted, *(rule.call for rule in self.answers)])

    def __bool__(self) -> bool:
        return bool(self.rules or self.writes or self.live or self.widen or self.broken)


def _live(found: Layer | Sandbox) -> tuple[LiveRule, ...]:
    return (*found.files, *found.nets, *found.counts, *found.answers, *found.watches)


UNENFORCED: Final = ("rules", "files", "writes", "nets", "counts", "answers", "watches")
"""What ``Sandbox.accepts`` may have: its fields."""
NO_SANDBOX: Final = Sandbox()
"""The base alone."""


def merge(layers: Iterable[Layer], label: str = "") -> Sandbox:
    """Put *layers* together; they come in the order of ``LAYERS``."""
    stack = tuple(layers)
    return Sandbox(
        rules=tuple(rule for layer in stack for rule in layer.rules),
        files=tuple(rule for layer in stack for rule in layer.files),
        writes=tuple(rule for layer in stack for rule in layer.writes),
        nets=tuple(rule for layer in stack for rule in layer.nets),
        counts=tuple(rule for layer in stack for rule in layer.counts),
        answers=tuple(rule for layer in stack for rule in layer.answers),
        watches=tuple(rule for layer in stack for rule in layer.watches),
        widen=tuple(dict.fromkeys(each.name for layer in stack for each in layer.widen)),
        label=label,
    )


def rules_of(sandbox: Sandbox, base: Iterable[Rule]) -> list[Rule]:
    """All rules that count, in their order."""
    return [*(rule for rule in base if rule.name not in sandbox.widen), *sandbox.rules]


P = TypeVar("P", bound=Placed)


def strictest(rules: Iterable[P]) -> Iterator[P]:
    """Strict ones first, otherwise as they come: the first that refuses a call decides."""
    return iter(sorted(rules, key=lambda rule: -SEVERITY[rule.answer]))


def judge(rules: Iterable[Rule], call: str, arguments: Sequence[int]) -> Rule | None:
    """The rule that decides about a call; None: it passes."""
    refusing = (rule for rule in strictest(rules) if rule.refuses(call, arguments))
    return next(refusing, None)


MAX_OBJECT: Final = 300
"""Characters of what a refusal was about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A rule has refused something, while the session ran."""

    at: float
    """Unix time, seconds."""
    layer: str
    line: int
    what: str
    """``open``, ``execute``, ``connect``, ``bind``, ``call``, or the call that was counted."""
    object: str = ""
    """A path, an address:port, or a call's name; printable."""
    name: str = ""
    why: str = ""
    pid: int = 0
    """As the session counts; 0: not known."""
    count: int = 1
    """How often this rule has refused this so far."""
    answer: str = ""
    """``EPERM``, ``SIGKILL``, or ``log``: it passed."""
    of: str = ""
    """Whose policy it is: the name of the project, group or machine. The server knows."""
    ask: str = ""
    """Who can change it."""

    @property
    def text(self) -> str:
        """``connect to 10.0.0.5:5432 refused by project policy lab, line 12 (no mail); ask ann``"""
        did = _DID.get(self.what, f"{self.what}: ")
        refused = "logged" if self.answer == Answer.LOG else "refused"
        why = f" ({self.why or self.name})" if self.why or self.name else ""
        ask = f"; ask {self.ask}" if self.ask and self.answer != Answer.LOG else ""
        policy = f"{self.layer} policy {self.of}".rstrip()
        return f"{did}{self.object} {refused} by {policy}, line {self.line}{why}{ask}"


_DID: Final[Mapping[str, str]] = {
    "open": "open of ",
    "execute": "execution of ",
    "connect": "connect to ",
    "bind": "bind to ",
    "call": "call of ",
}
