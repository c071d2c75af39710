"""From a session's checked policy to what this machine allows and keeps of it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, cast

from madang.agent.launcher import fakeroot, fanotify, fence, landlock, notify, seccomp, watch
from madang.wire import addresses
from madang.wire.errors import PolicyInvalid, PolicyUnkept
from madang.wire.kernel import NATIVE, RUNSC
from madang.wire.policy import (
    NO_SANDBOX,
    Access,
    Answer,
    Check,
    LiveRule,
    Look,
    Rule,
    Sandbox,
    WriteRule,
)
from madang.wire.policy_kept import LOGS, RULES
from madang.wire.session import RootMode

_MOST_NAMED: Final = 3
_NOT_EXECUTABLE: Final = (8, 9, 10, 11)
"""Flags of memfd_create: MFD_NOEXEC_SEAL, and others that go with it."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Of one session."""

    program: str = ""
    """Base64; empty: the base."""
    deadly: str = ""
    """Its rules that kill, in words."""
    warnings: tuple[str, ...] = ()
    kept: Sandbox = NO_SANDBOX
    """Without the rules that can't be kept here, where root accepts that."""


BASE_FILTER: Final = Filter()


class Filters:
    """What root said about policies on this machine, which the server can't change."""

    def __init__(self, widen: Collection[str], *, accept_unkept: bool) -> None:
        """*widen*: the rules of the base that a policy may widen here."""
        self._widen = frozenset(widen)
        self._accept_unkept = accept_unkept

    def of(
        self,
        sandbox: Sandbox,
        runtime: str = NATIVE,
        root: RootMode = RootMode.READ_ONLY,
    ) -> Filter:
        """*runtime*: what starts the session's programs. Raises PolicyInvalid, PolicyUnkept."""
        more_rules = fakeroot.rules() if root is RootMode.FAKE else ()
        if not sandbox:
            return replace(BASE_FILTER, program=_program(more_rules)) if more_rules else BASE_FILTER
        if sandbox.broken:
            raise PolicyInvalid(sandbox.broken)
        for name in sandbox.widen:
            if name not in self._widen:
                text = f"the sandbox policy widens {name!r}, which this machine does not allow"
                raise PolicyInvalid(
                    f"{text}. Add it to `sandbox.widen` in its settings.", rule=name
                )
        warnings = seccomp.check_kept(sandbox, accept=self._accepts(sandbox, "rules"))
        kept, more = self._kept(sandbox, runtime)
        _check_numbers(kept)
        static = replace(kept, rules=(*kept.rules, *implied(kept), *more_rules))
        program = b64encode(seccomp.program(sandbox=static)).decode()
        return Filter(program, deadly(kept), (*warnings, *more, *addresses.unresolved(kept)), kept)

    def _accepts(self, sandbox: Sandbox, field: str) -> bool:
        """Whether an administrator does without such rules where they can't be kept."""
        return self._accept_unkept or field in sandbox.accepts

    def _kept(self, sandbox: Sandbox, runtime: str) -> tuple[Sandbox, list[str]]:
        """(what can be kept here, what can't, in words). Raises PolicyUnkept."""
        missing: list[str] = []
        if runtime == RUNSC:
            sandbox, missing = self._without_logging(sandbox)
        for field in _ABILITIES:
            rules: tuple[LiveRule | WriteRule, ...] = getattr(sandbox, field)
            if rules and (why := _why_not(field, runtime)):
                missing.append(self._unkept(sandbox, field, rules[0].place, why))
                sandbox = replace(sandbox, **cast(Any, {field: ()}))
        return sandbox, missing

    def _without_logging(self, sandbox: Sandbox) -> tuple[Sandbox, list[str]]:
        """gVisor's kernel takes an answer that it does not know for "kill"."""
        kept = tuple(rule for rule in sandbox.rules if rule.answer is not Answer.LOG)
        text = "gVisor logs no system calls; use another runtime"
        return replace(sandbox, rules=kept), [
            self._unkept(sandbox, "rules", rule.place, text)
            for rule in sandbox.rules
            if rule.answer is Answer.LOG
        ]

    def _unkept(self, sandbox: Sandbox, field: str, place: str, why: str) -> str:
        """In words. Raises PolicyUnkept where no administrator accepts that."""
        found = f"policy: {place} is not kept: {why}"
        if not self._accepts(sandbox, field):
            mend = (
                "Take the rule out, set sandbox.accept_unkept, or let its scaling group "
                f'say accept_unenforced = ["{field}"].'
            )
            raise PolicyUnkept(f"{found}. {mend}", place=place)
        return found


def _program(rules: tuple[Rule, ...]) -> str:
    return b64encode(seccomp.program(sandbox=Sandbox(rules=rules))).decode()


def keeps(runtime: str) -> list[str]:
    """Kinds of rules (``policy_kept.KINDS``) that sessions of *runtime* have kept here."""
    logs = [LOGS] if runtime != RUNSC and seccomp.logs() else []
    return [RULES, *logs, *(field for field in _ABILITIES if not _why_not(field, runtime))]


def _why_not(field: str, runtime: str) -> str:
    """In words; empty: such rules are kept."""
    if runtime == RUNSC and field in _OF_GVISOR:
        return _OF_GVISOR[field]
    if runtime != NATIVE and field in _NATIVE_ALONE:
        return f"{runtime} gives programs mounts and filters of its own; use native"
    possible, takes = _ABILITIES[field]
    return "" if possible() else takes


@cache
def _has_fanotify() -> bool:
    return fanotify.possible()


@cache
def _has_landlock() -> bool:
    return landlock.abi() >= landlock.LEAST_ABI


_ABILITIES: Final[Mapping[str, tuple[Callable[[], bool], str]]] = {
    "files": (_has_fanotify, "rules about files take root and a kernel with fanotify"),
    "writes": (_has_landlock, "rules about changing files take Landlock, of Linux 6.2 or newer"),
    "counts": (cache(notify.possible), "the kernel hands no calls over"),
    "answers": (cache(notify.possible), "the kernel hands no calls over"),
    "nets": (cache(fence.possible), fence.TAKES),
    "watches": (cache(watch.possible), watch.TAKES),
}
"""Fields of a Sandbox, what they take, and what to say where that is not there."""
_NATIVE_ALONE: Final = frozenset({"files", "writes", "counts", "answers"})
"""What hangs on mounts and filters that the init made itself."""
_OF_GVISOR: Final = {
    "nets": "gVisor has a network of its own; use another runtime",
    "watches": "gVisor answers the calls of programs itself; use another runtime",
}
"""What the machine sees nothing of."""


def _check_numbers(sandbox: Sandbox) -> None:
    if len(sandbox.writes) > landlock.MAX_DOMAINS:
        text = f"the sandbox policy has more than {landlock.MAX_DOMAINS} [[write]] rules"
        raise PolicyInvalid(f"{text}, which is what the kernel takes. Put them together.")
    if sum(len(rule.targets) for rule in sandbox.nets) > addresses.MAX_TARGETS:
        text = f"the sandbox policy names more than {addresses.MAX_TARGETS} addresses"
        raise PolicyInvalid(f"{text}. Name networks.")
    if len(sandbox.handed_over) > notify.MAX_CALLS:
        text = f"the sandbox policy counts more than {notify.MAX_CALLS} different calls"
        raise PolicyInvalid(f"{text}. Count fewer.")


def implied(sandbox: Sandbox) -> list[Rule]:
    """A file in memory lies on no mount of the session: where rules say what may be executed, it
    can't be executed."""
    return [
        Rule(
            layer=rule.layer,
            line=rule.line,
            calls=("memfd_create",),
            check=Check(argument=1, test=Look.ALLOW, values=_NOT_EXECUTABLE),
            why=rule.why,
        )
        for rule in sandbox.files
        if Access.EXECUTE in rule.access and rule.answer is not Answer.LOG
    ]


def deadly(sandbox: Sandbox) -> str:
    """``keyctl (site line 3), ptrace (session line 4)``"""
    killing = [rule for rule in sandbox.rules if rule.answer is Answer.KILL]
    named = [_name(rule.calls, rule.place, others=rule.others) for rule in killing[:_MOST_NAMED]]
    more = ["…"] * (len(killing) > _MOST_NAMED)
    return ", ".join([*named, *more])


def _name(calls: tuple[str, ...], place: str, *, others: bool) -> str:
    if others:
        return f"calls it does not name ({place})"
    more = ", …" * (len(calls) > _MOST_NAMED)
    return f"{', '.join(calls[:_MOST_NAMED])}{more} ({place})"
