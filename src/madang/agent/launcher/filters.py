"""From a session's checked policy to its system call filter: what this machine allows and keeps."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import seccomp
from madang.agent.launcher.addresses import unresolved
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import Answer, Sandbox

_MOST_NAMED: Final = 3


@dataclass(frozen=True, slots=True)
class Filter:
    """Of one session."""

    program: str = ""
    """Base64; empty: the base."""
    deadly: str = ""
    """Its rules that kill, in words."""
    warnings: tuple[str, ...] = ()


BASE_FILTER: Final = Filter()


class Filters:
    """What root said about policies on this machine, which the server can't change."""

    def __init__(self, widen: Collection[str], *, accept_unkept: bool) -> None:
        """*widen*: the rules of the base that a policy may widen here."""
        self._widen = frozenset(widen)
        self._accept_unkept = accept_unkept

    def of(self, sandbox: Sandbox) -> Filter:
        """Raises PolicyInvalid, PolicyUnkept."""
        if not sandbox:
            return BASE_FILTER
        if sandbox.broken:
            raise PolicyInvalid(sandbox.broken)
        for name in sandbox.widen:
            if name not in self._widen:
                text = f"the sandbox policy widens {name!r}, which this machine does not allow"
                raise PolicyInvalid(
                    f"{text}. Add it to `sandbox.widen` in its settings.", rule=name
                )
        unkept = seccomp.check_kept(sandbox, accept=self._accept_unkept)
        warnings = (*unkept, *unresolved(sandbox))
        program = b64encode(seccomp.program(sandbox=sandbox)).decode()
        return Filter(program, deadly(sandbox), warnings)


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
